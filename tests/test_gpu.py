"""Tests that need a CUDA device; `make test-gpu` runs them.

`conftest.py` makes the settings that torch and cuBLAS read at their start.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import run
from tiny_models import fill_lora
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import qlora_kit as qk
from qlora_kit.config import StepOptions
from qlora_kit.data.batch import collate
from qlora_kit.layers import kernels, segments
from qlora_kit.layers.kernels.norm import rms_norm
from qlora_kit.layers.weight import FourBitWeight
from qlora_kit.model.hardware import make_deterministic
from qlora_kit.model.head import head_of
from qlora_kit.model.load import Digest, Placement
from qlora_kit.model.names import find_model
from qlora_kit.step.kernels import choose_kernels
from qlora_kit.step.reducers import MLP_TILE_TOKENS, Reducers, apply
from qlora_kit.tasks.causal import loss_sum

# Nobody knows yet which warnings libraries give on a GPU, so warnings are shown and are no fault.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _fresh_gpu() -> Iterator[None]:
    """Free the memory of each test, and reset its peak, its limit and its mode."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    forget()
    yield
    torch.use_deterministic_algorithms(False)
    kernels.use(())
    torch.cuda.set_per_process_memory_fraction(1.0)
    forget()


def forget() -> None:
    """Give back memory that is no longer referenced, and reset the allocator's peak."""
    # pytest keeps the error of a failed test here, and with it the tensors of its frames.
    for name in ("last_type", "last_value", "last_exc", "last_traceback"):
        vars(sys).pop(name, None)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@contextmanager
def deterministic() -> Iterator[None]:
    """Compute the same bits each time: attention's backward otherwise adds in any order."""
    make_deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Rows of whole blocks: bitsandbytes' CPU kernel for AVX-512 unpacks shorter ones wrongly.
WHOLE_BLOCKS = {"intermediate_size": 128}


def load(folder: Path, bits: int, device: str, dtype: str) -> qk.Base:
    source = find_model(str(folder))
    spec = qk.BaseSpec(source, folder, qk.Quantization(bits))
    return qk.load_base(spec, qk.choose_hardware(device, dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_cpu(save_tiny: Callable[..., Path], bits: int) -> None:
    """A GPU divides approximately: a value between two codes may be rounded to the other one."""
    folder = save_tiny("tinyllama", **WHOLE_BLOCKS)
    sides = [load(folder, bits, device, "float32") for device in ("cpu", "cuda")]
    weights = [{path: layer.weight for path, layer in frozen_of(base).items()} for base in sides]
    differing = total = 0
    for path, weight in weights[0].items():
        other = weights[1][path]
        codes, other_codes = codes_of(weight), codes_of(other)
        assert (codes - other_codes).abs().max() <= 1, path
        same = codes == other_codes
        differing, total = differing + int((~same).sum()), total + same.numel()
        values, other_values = (w.dequantize(torch.float32).cpu() for w in (weight, other))
        assert (values - other_values)[same].abs().max() < 1e-3 * values.abs().max(), path
    assert differing < 1e-3 * total


def codes_of(weight: torch.nn.Module) -> Tensor:
    """Return the code of every weight (K, D), on the CPU; neighbours differ by one."""
    codes = weight.codes.cpu().int()
    if not isinstance(weight, FourBitWeight):
        return codes
    halves = torch.stack([codes >> 4, codes & 15], dim=-1)
    return halves.flatten()[: weight.shape[0] * weight.shape[1]].view(weight.shape)


def frozen_of(base: qk.Base) -> dict[str, torch.nn.Module]:
    from qlora_kit.layers.projections import projections

    return {path: each.frozen for path, each in projections(base.model).items()}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_loss_and_gradients_are_those_of_the_cpu(
    save_tiny: Callable[..., Path], bits: int, dtype: str, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (2, 20), generator=generator).tolist()
    batch = collate([{"input_ids": r, "labels": r, "row": 0} for r in ids], 0)
    found = []
    for device, kind in (("cpu", "float32"), ("cuda", dtype)):
        folder = save_tiny("tinyllama", initializer_range=0.05, **WHOLE_BLOCKS)
        base = load(folder, bits, device, kind)
        adapter = qk.attach(base, qk.LoraSpec(targets=("all-linear",)))
        loss = loss_sum(base.model.train(), batch.to(base.hardware.device), head_of(base.model))
        loss.backward()
        grads = [p.grad.cpu() for n, p in adapter.parameters().items() if n.endswith("lora_B")]
        found.append((loss.item(), torch.cat([g.flatten() for g in grads])))
    assert found[1][0] == pytest.approx(found[0][0], rel=tolerance)
    assert (found[1][1] - found[0][1]).norm() < 2 * tolerance * found[0][1].norm()


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        ("adamw", "bfloat16"),
        ("adamw8bit", "bfloat16"),
        ("paged-adamw", "bfloat16"),
        ("paged-adamw8bit", "bfloat16"),
        ("adamw", "float16"),
    ],
)
def test_the_demo_learns_on_a_gpu(optimizer: str, dtype: str) -> None:
    options = qk.BaseModelOptions(model="demo", device="cuda", dtype=dtype)
    opened = qk.open_base(options)
    adapter = qk.attach(opened.base, qk.LoraSpec(targets=("all-linear",)))
    rows = qk.load_data(None, opened.tokenizer, qk.TokenOptions(max_length=128)).rows
    config = qk.TrainConfig(
        max_steps=60, batch_size=16, gradient_accumulation_steps=1, learning_rate=2e-3,
        optimizer=optimizer, max_grad_norm=1.0,
    )  # fmt: skip
    pad = opened.tokenizer.pad_token_id
    before = qk.evaluate(opened.base, rows.select(range(64)), pad_token_id=pad).loss
    qk.train_adapter(adapter, rows, config, pad_token_id=pad)
    after = qk.evaluate(opened.base, rows.select(range(64)), pad_token_id=pad).loss
    assert after < 0.3 * before


def test_a_run_keeps_its_prediction_and_its_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "long.txt"
    data.write_text("forty-two comes before forty-three and after forty-one. " * 2000)
    code, _, err = run(
        "train", "--model", "deepseek-7b", "--weights", "random", "--data", str(data),
        "--max-length", "2048", "--vram", "9GB", "--max-steps", "3", "--validation-fraction", "0",
        "--output", str(tmp_path / "run"), capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    account = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert abs(account["rehearsal"]["difference"]) < 0.02
    assert account["run"]["peak_allocated_bytes"] <= account["rehearsal"]["measured_peak_bytes"]
    # The 9 GB are of the whole card, with the memory that other processes hold.
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    assert torch.cuda.max_memory_reserved() + beside < 9e9


def gpu_adapter(folder: Path, dtype: str) -> qk.Adapter:
    base = load(folder, 4, "cuda", dtype)
    return qk.attach(base, qk.LoraSpec(rank=4, dropout=0.2, targets=("all-linear",)), seed=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_deterministic_run_resumes_with_the_same_bits(
    save_tiny: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    from training import make_rows, options, weights_of

    from qlora_kit.train.loop import Saving

    with deterministic():
        whole = gpu_adapter(save_tiny(), dtype)
        config = options(max_steps=8, batch_size=2, save_steps=3, deterministic=True)
        saving = Saving(tmp_path, qk.BaseRecord.of(whole.base))
        qk.train_adapter(whole, make_rows(12), config, saving=saving)
        part = gpu_adapter(save_tiny(), dtype)
        again = Saving(tmp_path / "again", saving.record, tmp_path / "checkpoint-3")
        qk.train_adapter(part, make_rows(12), config, saving=again)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(part)[name]), name


def test_a_card_too_small_for_the_micro_batch_takes_a_smaller_one() -> None:
    """The shortage is real: the allocator is limited to little more than the base."""
    from qlora_kit.events import Event, MicroBatchHalved, StepFinished

    source = find_model("smollm2-135m")
    spec = qk.BaseSpec(source, None, qk.Quantization(4), random=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (16, 1024), generator=generator).tolist()
    rows = [{"input_ids": r, "labels": r, "row": n} for n, r in enumerate(ids)]
    config = qk.TrainConfig(
        max_steps=1, batch_size=16, gradient_accumulation_steps=1, recompute=False
    )
    found: list[list[Event]] = []
    whole = torch.cuda.get_device_properties(0).total_memory
    for limit in (None, 4e9):
        adapter = qk.attach(qk.load_base(spec, qk.choose_hardware("cuda")), qk.LoraSpec())
        events: list[Event] = []
        forget()
        if limit:
            torch.cuda.set_per_process_memory_fraction(limit / whole)
        qk.train_adapter(adapter, rows, config, announce=events.append)
        del adapter
        found.append(events)
    assert any(isinstance(event, MicroBatchHalved) for event in found[1])
    (one,), (other,) = ([e for e in each if isinstance(e, StepFinished)] for each in found)
    assert other.loss == pytest.approx(one.loss, rel=1e-3)
    assert other.tokens == one.tokens


# ---------------------------------------------------------------- memory reducers


def one_step(adapter: qk.Adapter, tokens: int, reducers: Reducers) -> tuple[float, list[Tensor]]:
    """Loss and gradients of two rows of unequal length."""
    base = adapter.base
    apply(base.model.train(), reducers, base.hardware)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (tokens, tokens // 3)]
    batch = collate([{"input_ids": r, "labels": r, "row": 0} for r in ids], 0)
    torch.manual_seed(5)
    loss = loss_sum(base.model, batch.to(base.hardware.device), head_of(base.model))
    loss.backward()
    grads = []
    for parameter in adapter.parameters().values():
        assert parameter.grad is not None
        grads.append(parameter.grad)
        parameter.grad = None
    return loss.item(), grads


PLAIN = Reducers(recompute=True, offload_checkpoints=False, mlp_tile_tokens=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_offloaded_checkpoints_change_no_bit(dtype: str) -> None:
    """Sizes are large enough for copies to run beside kernels, and for memory to be reused."""
    spec = qk.BaseSpec(find_model("smollm2-135m"), None, qk.Quantization(4), random=True)
    base = qk.load_base(spec, qk.choose_hardware("cuda", dtype))
    adapter = qk.attach(base, qk.LoraSpec(rank=4, dropout=0.1, targets=("all-linear",)))
    offloaded = Reducers(recompute=True, offload_checkpoints=True, mlp_tile_tokens=0)
    with deterministic():
        for tokens in (2048, 700, 2048, 1500):
            loss, grads = one_step(adapter, tokens, PLAIN)
            for _ in range(3):
                found, found_grads = one_step(adapter, tokens, offloaded)
                assert found == loss
                assert all(torch.equal(a, b) for a, b in zip(grads, found_grads, strict=True))


def test_offloading_lowers_the_measured_peak() -> None:
    spec = qk.BaseSpec(find_model("smollm2-135m"), None, qk.Quantization(4), random=True)
    adapter = qk.attach(qk.load_base(spec, qk.choose_hardware("cuda")), qk.LoraSpec(rank=4))
    layers = adapter.base.model.config.num_hidden_layers
    peaks = {}
    for offload in (True, False):
        reducers = Reducers(
            recompute=True, offload_checkpoints=offload, mlp_tile_tokens=MLP_TILE_TOKENS
        )
        one_step(adapter, 4096, reducers)
        torch.cuda.reset_peak_memory_stats()
        one_step(adapter, 4096, reducers)
        peaks[offload] = torch.cuda.max_memory_allocated()
    checkpoint = 2 * 4096 * adapter.base.model.config.hidden_size * 2
    # At the peak the checkpoints of two or three layers are on the device, not those of all.
    assert peaks[False] - peaks[True] > (layers - 4) * checkpoint


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_a_tiled_mlp_computes_the_same_on_a_gpu(
    save_tiny: Callable[..., Path], dtype: str, tolerance: float
) -> None:
    for name in ("tinyllama", "gemma-2-9b", "phi-4-mini"):
        base = load(save_tiny(name, initializer_range=0.05), 4, "cuda", dtype)
        adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)), seed=1)
        fill_lora(adapter)
        loss, grads = one_step(adapter, 60, PLAIN)
        tiles = Reducers(recompute=True, offload_checkpoints=True, mlp_tile_tokens=16)
        found, found_grads = one_step(adapter, 60, tiles)
        assert found == pytest.approx(loss, rel=tolerance)
        for ours, theirs in zip(found_grads, grads, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("name", ["tinyllama", "gemma-2-9b", "qwen3-8b", "phi-4-mini"])
def test_a_step_with_all_kernels_agrees_with_the_plain_code(
    save_tiny: Callable[..., Path], name: str, dtype: str, tolerance: float
) -> None:
    base = load(save_tiny(name, initializer_range=0.05), 4, "cuda", dtype)
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)), seed=1)
    fill_lora(adapter)
    tiles = Reducers(recompute=True, offload_checkpoints=True, mlp_tile_tokens=16)
    loss, grads = one_step(adapter, 60, tiles)
    chosen = choose_kernels(base.model, StepOptions(mlp_tile_tokens=16), base.hardware)
    assert chosen.left_out == {}, chosen.described()
    assert set(chosen.serving) == set(kernels.NAMES) - ({"lora"} if dtype == "float32" else set())
    found, found_grads = one_step(adapter, 60, tiles)
    assert found == pytest.approx(loss, rel=tolerance)
    for ours, theirs in zip(found_grads, grads, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_kernel_attends_among_segments_as_among_each_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None
) -> None:
    lengths, device = (70, 1, 200, 33), torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(1, heads, sum(lengths), 64, device=device, dtype=dtype, generator=generator)
        for heads in (8, 2, 2)
    ]
    module = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=4)

    def attend() -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in inputs]
        of_row = {segments.ARGUMENT: segments.Segments.of(lengths, device)}
        out, _ = segments.by_segments(sdpa_attention_forward)(
            module, *leaves, None, scaling=0.2, sliding_window=window, **of_row
        )
        (
            out.float() * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        ).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    together = attend()
    monkeypatch.setattr(segments, "_flash_computes", lambda *_: False)
    for found, alone in zip(together, attend(), strict=True):
        assert (found.float() - alone.float()).norm() <= 2e-2 * alone.float().norm()


def test_a_norm_takes_the_memory_that_a_plan_says() -> None:
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    y = rms_norm(x, weight, 1e-5)
    assert torch.cuda.max_memory_allocated() == before + y.nbytes + 512
    grad = torch.randn_like(y)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.backward(y, grad)
    assert torch.cuda.max_memory_allocated() == before + x.nbytes


@pytest.mark.parametrize("name", ["tinyllama", "gemma-2-9b", "phi-4-mini"])
def test_an_embedding_on_the_cpu_changes_no_bit(save_tiny: Callable[..., Path], name: str) -> None:
    """Gemma-2 scales its embeddings; Phi-4-mini's embedding is its head, and stays on the GPU."""
    folder = save_tiny(name, initializer_range=0.05)
    spec = qk.BaseSpec(find_model(str(folder)), folder, qk.Quantization(4))
    found = []
    for on_cpu in (False, True):
        placement = Placement(embedding_on_cpu=on_cpu)
        base = qk.load_base(spec, qk.choose_hardware("cuda", "bfloat16"), placement=placement)
        is_tied = bool(base.model.all_tied_weights_keys)
        where = base.model.get_input_embeddings().weight.device.type
        assert where == ("cpu" if on_cpu and not is_tied else "cuda")
        assert base.model.device.type == "cuda", "generation asks for this"
        adapter = qk.attach(base, qk.LoraSpec(rank=4), seed=1)
        ids = torch.tensor([[5, 7, 11]], device="cuda")
        text = base.model.eval().generate(ids, max_new_tokens=8, do_sample=False)
        with deterministic():
            found.append((one_step(adapter, 60, PLAIN), text.tolist()))
    ((loss, grads), text), ((other, other_grads), other_text) = found
    assert (loss, text) == (other, other_text)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


# ---------------------------------------------------------------- a 7B


def random_7b(bits: int) -> Iterator[qk.Base]:
    """Load deepseek-7b with random weights; free it at the end.

    Its digest is left out: copying 14 GB to the host takes longer than all that is tested.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = qk.BaseSpec(find_model("deepseek-7b"), None, qk.Quantization(bits), random=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digest, "add", lambda *_: None)
        base = qk.load_base(spec, qk.choose_hardware("cuda"))
    yield base
    del base
    forget()


@pytest.fixture(scope="class")
def base_in_4_bits() -> Iterator[qk.Base]:
    """A 7B in 4 bits, for all tests of a class."""
    yield from random_7b(4)


@pytest.fixture(scope="class")
def base_in_8_bits() -> Iterator[qk.Base]:
    """A 7B in 8 bits, for all tests of a class."""
    yield from random_7b(8)


def peak_of_two_steps(base: qk.Base, tokens: int, rows: int = 1) -> int:
    """Return the peak of allocated bytes of two steps on rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 102400, (rows, tokens), generator=generator).tolist()
    data = [{"input_ids": r, "labels": r, "row": n} for n, r in enumerate(ids)]
    config = qk.TrainConfig(max_steps=2, gradient_accumulation_steps=1, max_length=tokens)
    adapter = qk.attach(base, qk.LoraSpec())
    forget()
    try:
        qk.train_adapter(adapter, data, config)
    finally:
        qk.detach(adapter)
    return torch.cuda.max_memory_allocated()


class TestSevenBillionIn4Bits:
    """Only the reducers that are on by default, which are exact; random weights of deepseek-7b."""

    def test_the_run_of_the_headline_fits_ten_gigabytes(self, base_in_4_bits: qk.Base) -> None:
        assert peak_of_two_steps(base_in_4_bits, 1024, rows=2) < 10e9

    @pytest.mark.parametrize(
        ("tokens", "limit"), [(2048, 5.0e9), (4096, 5.3e9), (8192, 5.8e9), (32768, 10e9)]
    )
    def test_7b_stays_under_its_bar(
        self, base_in_4_bits: qk.Base, tokens: int, limit: float
    ) -> None:
        assert peak_of_two_steps(base_in_4_bits, tokens) < limit


class TestSevenBillionIn8Bits:
    """See `TestSevenBillionIn4Bits`."""

    def test_7b_stays_under_its_bar(self, base_in_8_bits: qk.Base) -> None:
        assert peak_of_two_steps(base_in_8_bits, 2048) < 8.0e9

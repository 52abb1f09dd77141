"""Each exact reducer keeps loss and gradients the same, and lowers the predicted peak."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative_error, slow
from tiny_models import ARCHITECTURES, fill_lora, load_folder, mask_of
from torch import Tensor, nn
from training import make_adapter
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_kit.config import StepOptions, TrainConfig
from qlora_kit.data.batch import Batch, collate
from qlora_kit.infer.evaluate import evaluate
from qlora_kit.layers import head as head_module
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import Head
from qlora_kit.layers.loss import chunked_loss_sum, cross_entropy_sum, score_tokens
from qlora_kit.layers.mlp import TiledMLP
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import FourBitWeight, PlainWeight
from qlora_kit.lora.attach import Adapter, attach
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.head import head_of
from qlora_kit.model.load import Base, BaseSpec, Placement, load_base
from qlora_kit.model.names import find_model
from qlora_kit.plan.simulate import Prediction, predict
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.step import offload as offload_module
from qlora_kit.step.offload import Offload
from qlora_kit.step.recompute import set_recompute
from qlora_kit.step.reducers import (
    MLP_TILE_TOKENS,
    Applied,
    Reducers,
    apply,
    resolve,
    without_effect,
)
from qlora_kit.step.tiles import set_mlp_tiles
from qlora_kit.tasks.causal import loss_sum, scores, supervised_states

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
GPU = Hardware(torch.device("meta"), torch.bfloat16, "stands in for a GPU")
PLAIN = Reducers(recompute=False, offload_checkpoints=False, mlp_tile_tokens=0)
# 5 cuts every row in two tiles or more, 4,096 none.
REDUCED = {
    "recompute": replace(PLAIN, recompute=True),
    "offload": replace(PLAIN, recompute=True, offload_checkpoints=True),
    "tiles": replace(PLAIN, mlp_tile_tokens=5),
    "one tile": replace(PLAIN, mlp_tile_tokens=4096),
    "one kept": replace(PLAIN, recompute=True, offload_checkpoints=True, keep_layers=1),
    "unpacked": replace(PLAIN, recompute=True, unpacked_layers=1),
    "all unpacked, in one tile": replace(PLAIN, mlp_tile_tokens=4096, unpacked_layers=99),
    "all": Reducers(recompute=True, offload_checkpoints=True, mlp_tile_tokens=5),
}
TARGETS = ("attention", "mlp", "all-linear")
Gradients = dict[str, Tensor]


def padded_batch(vocabulary: int = 96) -> Batch:
    """Return a batch with rows of 21, 13 and 4 tokens, the first with a prompt."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row, length in enumerate((21, 13, 4)):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids, "row": row})
    rows[0]["labels"] = [-100] * 6 + rows[0]["labels"][6:]
    return collate(rows, 0)


def step(adapter: Adapter, batch: Batch) -> tuple[float, Gradients]:
    """Run one forward and backward in training, always with the same masks of dropout."""
    model = adapter.base.model.train()
    torch.manual_seed(5)
    loss: Any = loss_sum(model, batch, head_of(model), chunk_tokens=7)
    loss.backward()
    return loss.item(), gradients_of(adapter)


def gradients_of(adapter: Adapter) -> Gradients:
    grads = {}
    for name, parameter in adapter.parameters().items():
        assert parameter.grad is not None, name
        grads[name], parameter.grad = parameter.grad, None
    return grads


def filled_adapter(folder: Path, bits: int, targets: str, dropout: float = 0.0) -> Adapter:
    adapter = make_adapter(folder, bits, dropout, rank=3, alpha=4.0, targets=targets)
    fill_lora(adapter, std=0.05)
    return adapter


def assert_equal_steps(adapter: Adapter, batch: Batch) -> None:
    """Compare every combination in `REDUCED` with a step without reducers, on one model."""
    model = adapter.base.model
    apply(model, PLAIN, CPU)
    loss, grads = step(adapter, batch)
    assert all(grad.norm() > 0 for grad in grads.values())
    for name, reducers in REDUCED.items():
        apply(model, reducers, CPU)
        found, found_grads = step(adapter, batch)
        if reducers.mlp_tile_tokens == 0:  # tiles sum in another order
            assert found == loss, name
            assert all(torch.equal(grads[n], found_grads[n]) for n in grads), name
        assert found == pytest.approx(loss, rel=1e-6), name
        for n, grad in grads.items():
            assert relative_error(found_grads[n], grad) <= 3e-5, (name, n)


# By default each kind of target, each number of bits, with dropout and without.
USUAL = ((4, "attention", 0.3), (4, "mlp", 0.0), (16, "all-linear", 0.3))
OTHER = set(itertools.product((4, 16), TARGETS, (0.0, 0.3))) - {*USUAL}


@pytest.mark.parametrize(("bits", "targets", "dropout"), [*USUAL, *slow(*sorted(OTHER))])
def test_reducers_change_no_loss_and_no_gradient_on_real_weights(
    stories: Path, bits: int, targets: str, dropout: float
) -> None:
    assert_equal_steps(filled_adapter(stories, bits, targets, dropout), padded_batch(500))


def own_step(adapter: Adapter, batch: Batch) -> tuple[float, Gradients]:
    """Run a step in the usual way: with all logits of the model itself, and torch's loss."""
    model = adapter.base.model.train()
    torch.manual_seed(5)
    logits = model(input_ids=batch.input_ids, attention_mask=mask_of(batch)).logits
    targets = batch.labels[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    loss.backward()
    return loss.item(), gradients_of(adapter)


# By default each size of a chunk, each number of bits and each kind of target once.
CHUNKED = ((4, "all-linear", 1), (8, "attention", 7), (16, "mlp", 4096))
CHUNKED_OTHERWISE = {(b, t, chunk) for b, t, _ in CHUNKED for _, _, chunk in CHUNKED} - {*CHUNKED}


@pytest.mark.parametrize(
    ("bits", "targets", "chunk_tokens"), [*CHUNKED, *slow(*sorted(CHUNKED_OTHERWISE))]
)
def test_all_of_them_and_no_logits_equal_none_of_them_on_real_weights(
    stories: Path, bits: int, targets: str, chunk_tokens: int
) -> None:
    adapter, batch = filled_adapter(stories, bits, targets, dropout=0.2), padded_batch(500)
    model = adapter.base.model
    apply(model, PLAIN, CPU)
    loss, grads = own_step(adapter, batch)
    assert all(grad.norm() > 0 for grad in grads.values())
    apply(model, REDUCED["all"], CPU)
    torch.manual_seed(5)
    found: Any = loss_sum(model.train(), batch, head_of(model), chunk_tokens=chunk_tokens)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6)
    for name, grad in gradients_of(adapter).items():
        assert relative_error(grad, grads[name]) <= 3e-5, name


# With LoRA on attention alone the MLPs are recomputed and cut without it: by default one of each
# kind of MLP.
MLP_KINDS = ("tinyllama", "phi-4-mini", "gemma-2-9b", "phi")
EVERY_KIND = (*ARCHITECTURES, "cohere", "granite", "qwen2-tied", "phi")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *((name, "all-linear") for name in EVERY_KIND),
        *((name, "attention") for name in MLP_KINDS),
        *slow(*((name, "attention") for name in EVERY_KIND if name not in MLP_KINDS)),
    ],
)
def test_reducers_change_nothing_on_any_architecture(
    folder_of: Callable[[str], Path],
    name: str,
    targets: str,
) -> None:
    """With norms behind the MLP (gemma-2), a fused gate (phi-4-mini), MLPs without one (phi).

    A mixture's experts compute a bounded number of tokens anyway.
    """
    adapter = filled_adapter(folder_of(name), 4, targets, dropout=0.2)
    assert_equal_steps(adapter, padded_batch())
    tiled = apply(adapter.base.model, REDUCED["tiles"], CPU)
    assert tiled.tiled_mlps == (0 if name in ("phi", "qwen3-30b-a3b") else 2)


def test_reducers_are_equal_at_8_bits_too(save_tiny: Callable[..., Path]) -> None:
    assert_equal_steps(filled_adapter(save_tiny("qwen2.5-7b"), 8, "all-linear"), padded_batch())


def test_bfloat16_rounds_no_more_in_tiles(save_tiny: Callable[..., Path]) -> None:
    """In bfloat16, the gradients in tiles are within 2 % of the gradients without tiles."""
    base = load_folder(save_tiny("tinyllama"), 4, dtype="bfloat16")
    adapter = attach(base, LoraSpec(rank=3, targets=("all-linear",)))
    fill_lora(adapter, std=0.05)
    _, grads = step(adapter, padded_batch())
    assert set_mlp_tiles(base.model, 7, torch.bfloat16) == 2
    _, found = step(adapter, padded_batch())
    assert max(relative_error(found[name], grads[name]) for name in grads) < 2e-2


def test_scores_are_the_same_in_tiles(save_tiny: Callable[..., Path]) -> None:
    adapter = filled_adapter(save_tiny("phi-4-mini"), 4, "all-linear", dropout=0.3)
    model, batch = adapter.base.model.eval(), padded_batch()
    expected = scores(model, batch, head_of(model))
    apply(model, REDUCED["all"], CPU)
    torch.testing.assert_close(scores(model, batch, head_of(model)).logprobs, expected.logprobs)


# ---------------------------------------------------------------- nothing computed for nothing


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record each time that a 4-bit weight is unpacked."""
    noted: list[str] = []
    real = FourBitWeight.dequantize

    def noting(self: FourBitWeight, dtype: torch.dtype) -> Tensor:
        noted.append("unpacked")
        return real(self, dtype)

    monkeypatch.setattr(FourBitWeight, "dequantize", noting)
    return noted


@pytest.mark.parametrize("targets", TARGETS)
def test_a_recomputed_layer_stops_before_its_last_product(
    stories: Path, unpacked: list[str], targets: str
) -> None:
    """Seven weights a layer: 7 in forward, 6 when it runs again, 7 in backward.

    The second forward leaves out the down projection: no later operation saves its output, and a
    LoRA layer saves its input before it multiplies. In backward, the first layer leaves out q, k
    and v if its input needs no gradient.
    """
    adapter = filled_adapter(stories, 4, targets)
    layers = adapter.base.model.config.num_hidden_layers
    apply(adapter.base.model, REDUCED["recompute"], CPU)
    unpacked.clear()
    step(adapter, padded_batch(500))
    first = 3
    if targets == "mlp":
        first = 4 + 2  # nor o, and of gate and up no gradient goes further down
    assert len(unpacked) == layers * (7 + 6 + 7) - first


def test_a_tiled_mlp_is_not_run_a_third_time(stories: Path, unpacked: list[str]) -> None:
    """A layer unpacks 20 weights here too: recomputing stops before the MLP.

    Forward unpacks 7; the second forward q, k, v and o; backward these 4, and for the MLP down once
    and gate and up twice.
    """
    adapter = filled_adapter(stories, 4, "attention")
    layers = adapter.base.model.config.num_hidden_layers
    apply(adapter.base.model, replace(REDUCED["all"], mlp_tile_tokens=4096), CPU)
    unpacked.clear()
    step(adapter, padded_batch(500))
    assert len(unpacked) == layers * (7 + 4 + 4 + 5) - 3


def test_many_tiles_unpack_a_weight_once_a_pass(stories: Path, unpacked: list[str]) -> None:
    adapter = filled_adapter(stories, 4, "attention")
    layers = adapter.base.model.config.num_hidden_layers
    apply(adapter.base.model, REDUCED["all"], CPU)
    unpacked.clear()
    step(adapter, padded_batch(500))
    assert len(unpacked) == layers * (7 + 4 + 4 + 3) - 3


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_an_mlp_keeps_its_input_only(save_tiny: Callable[..., Path], targets: str) -> None:
    adapter = filled_adapter(save_tiny("tinyllama"), 4, targets)
    apply(adapter.base.model, REDUCED["tiles"], CPU)
    mlp = adapter.base.model.base_model.layers[0].mlp
    x = torch.randn(2, 11, 64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(x)
    known = {parameter.data_ptr() for parameter in adapter.parameters().values()}
    (kept,) = (tensor for tensor in saved if tensor.data_ptr() not in known)
    assert kept.data_ptr() == x.data_ptr()


def test_what_was_saved_first_is_freed_after_backward_and_not_before(
    save_tiny: Callable[..., Path],
) -> None:
    adapter = filled_adapter(save_tiny("tinyllama"), 4, "all-linear")
    apply(adapter.base.model, REDUCED["tiles"], CPU)
    mlp = adapter.base.model.base_model.layers[0].mlp
    source = torch.randn(2, 11, 64, requires_grad=True)
    x = source * 1
    alive = weakref.ref(x.untyped_storage())
    y = mlp(x).sum()
    del x
    (once,) = torch.autograd.grad(y, source, retain_graph=True)
    assert alive() is not None
    (again,) = torch.autograd.grad(y, source)
    assert torch.equal(once, again)
    assert alive() is None, "the graph is still there, what it saved is not"
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, source)


def test_few_tiles_hold_one_unpacked_weight_at_a_time(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three weights of an MLP of deepseek-7b are 0.27 GB, which is more than two tiles save."""
    adapter = filled_adapter(stories, 4, "all-linear")
    layer = adapter.base.model.base_model.layers[0]
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    real = FourBitWeight.dequantize

    def noting(self: FourBitWeight, dtype: torch.dtype) -> Tensor:
        weight = real(self, dtype)
        made.append(weakref.ref(weight))
        alive.append(sum(ref() is not None for ref in made))
        return weight

    x = torch.randn(20, 64, requires_grad=True)
    for tile, most in ((20, 1), (10, 1), (5, 3)):
        set_mlp_tiles(adapter.base.model, tile, torch.float32)
        monkeypatch.setattr(FourBitWeight, "dequantize", noting)
        layer.mlp(x).sum().backward()
        monkeypatch.undo()
        assert max(alive) == most
        made.clear()
        alive.clear()


# ---------------------------------------------------------------- which MLPs


class _Twisted(LlamaMLP):
    """Has the parts of a gated MLP, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return hidden


def test_an_mlp_of_another_formula_is_left_alone(save_tiny: Callable[..., Path]) -> None:
    adapter = filled_adapter(save_tiny("tinyllama"), 4, "all-linear")
    model = adapter.base.model
    model.base_model.layers[1].mlp.__class__ = _Twisted
    assert apply(model, REDUCED["tiles"], CPU).tiled_mlps == 1
    assert isinstance(model.base_model.layers[0].mlp, TiledMLP)
    assert isinstance(model.base_model.layers[1].mlp, _Twisted)


def test_tiles_can_be_switched_off_and_leave_nothing_behind(
    save_tiny: Callable[..., Path],
) -> None:
    adapter = filled_adapter(save_tiny("tinyllama"), 4, "attention")
    model = adapter.base.model
    names = list(model.state_dict())
    assert set_mlp_tiles(model, 8, torch.float32) == 2
    assert list(model.state_dict()) == names
    assert set_mlp_tiles(model, 0, torch.float32) == 0
    assert not any(isinstance(module, TiledMLP) for module in model.modules())


def test_a_tiled_mlp_dies_with_its_last_user(save_tiny: Callable[..., Path]) -> None:
    adapter = filled_adapter(save_tiny("tinyllama"), 4, "attention")
    set_mlp_tiles(adapter.base.model, 8, torch.float32)
    mlp = weakref.ref(adapter.base.model.base_model.layers[0].mlp)
    gc.collect()
    gc.disable()
    try:
        adapter.base.model.base_model.layers[0].mlp = nn.Identity()
        assert mlp() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- checkpoints in host memory


class _Late:
    """Copies as late as a stream may, in order; detects memory freed before its copy is done."""

    def __init__(self) -> None:
        self.queue: list[tuple[object, weakref.ref[Tensor], weakref.ref[Tensor], bool]] = []
        self.log: list[str] = []
        self.faults: list[str] = []
        self.on_device: list[weakref.ref[Tensor]] = []
        self.most_on_device = 0
        self._on_host: list[weakref.ref[Tensor]] = []

    def host_memory(self, like: Tensor) -> Tensor:
        made = torch.full_like(like, torch.nan)
        self._on_host.append(weakref.ref(made))
        return made

    def copy(self, target: Tensor, source: Tensor) -> object:
        is_out = any(ref() is target for ref in self._on_host)
        if not is_out:
            target.fill_(torch.nan)
        self.log.append("out" if is_out else "in")
        self.on_device.append(weakref.ref(source if is_out else target))
        self.most_on_device = max(self.most_on_device, self.alive())
        end = object()
        self.queue.append((end, weakref.ref(target), weakref.ref(source), is_out))
        return end

    def wait(self, end: object) -> None:
        while any(pending[0] is end for pending in self.queue):
            _, target, source, is_out = self.queue.pop(0)
            to, of = target(), source()
            if to is not None and of is not None:
                to.copy_(of)
            elif not is_out:
                self.faults.append("writes into memory of the device that was given up")

    def alive(self) -> int:
        """Return how many inputs of layers are on the device."""
        return sum(ref() is not None for ref in self.on_device)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return how many inputs of layers are held."""
    made: list[weakref.ref[Any]] = []
    real = offload_module._Held

    def noting(*arguments: Any) -> Any:
        one = real(*arguments)
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(offload_module, "_Held", noting)
    return lambda: sum(ref() is not None for ref in made)


@pytest.fixture
def offloaded(save_tiny: Callable[..., Path]) -> tuple[Adapter, _Late]:
    """A model of five layers whose checkpoints are copied late."""
    adapter = filled_adapter(save_tiny("tinyllama", num_hidden_layers=5), 4, "all-linear", 0.2)
    lane = _Late()
    set_recompute(adapter.base.model, True, Offload(lane, CPU.device))
    return adapter, lane


def expected_of(adapter: Adapter, batch: Batch, lane: _Late) -> Gradients:
    set_recompute(adapter.base.model, True)
    _, grads = step(adapter, batch)
    set_recompute(adapter.base.model, True, Offload(lane, CPU.device))
    return grads


def assert_equal(found: Gradients, expected: Gradients) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoints_go_out_and_come_back_in_time(
    offloaded: tuple[Adapter, _Late], held: Callable[[], int]
) -> None:
    """The input of the last layer is still there; every other input is fetched a layer ahead."""
    adapter, lane = offloaded
    expected = expected_of(adapter, padded_batch(), lane)
    model = adapter.base.model.train()
    torch.manual_seed(5)
    loss: Any = loss_sum(model, padded_batch(), head_of(model), chunk_tokens=7)
    assert held() == 5
    assert lane.alive() == 1
    loss.backward()
    assert_equal(gradients_of(adapter), expected)
    assert lane.log == ["out"] * 5 + ["in"] * 4
    assert lane.most_on_device == 2
    assert lane.faults == []
    assert held() == 0, "though the loss is still there"


def test_several_forwards_before_their_backwards(offloaded: tuple[Adapter, _Late]) -> None:
    adapter, lane = offloaded
    model, head = adapter.base.model.train(), head_of(adapter.base.model)
    batches = [padded_batch(), padded_batch(50)]
    separate = [expected_of(adapter, batch, lane) for batch in batches]
    losses: list[Any] = []
    for batch in batches:
        torch.manual_seed(5)
        losses.append(loss_sum(model, batch, head, chunk_tokens=7))
        with torch.no_grad():  # an evaluation between them holds nothing
            scores(model.eval(), batch, head)
        model.train()
    for loss, expected in zip(losses, separate, strict=True):
        loss.backward()
        assert_equal(gradients_of(adapter), expected)
    assert lane.faults == []


def test_backward_twice_finds_the_checkpoints_again(offloaded: tuple[Adapter, _Late]) -> None:
    adapter, lane = offloaded
    expected = expected_of(adapter, padded_batch(), lane)
    model = adapter.base.model.train()
    torch.manual_seed(5)
    loss: Any = loss_sum(model, padded_batch(), head_of(model), chunk_tokens=7)
    for retain in (True, False):
        loss.backward(retain_graph=retain)
        assert_equal(gradients_of(adapter), expected)
    assert lane.faults == []


def test_only_what_holds_memory_of_the_device_is_copied_out(held: Callable[[], int]) -> None:
    """torch 2.11's checkpoint packs an empty tensor beside each input, in host memory."""
    lane = _Late()
    offload = Offload(lane, CPU.device)
    inputs = [torch.full((4,), float(layer)) for layer in range(3)]
    others = [torch.empty(0), torch.empty(4, device="meta"), torch.empty(0, requires_grad=True)]
    packed = []
    for x, other in zip(inputs, others, strict=True):
        packed += [offload.pack(x.clone()), offload.pack(other)]
    assert held() == 3
    assert lane.log == ["out"] * 3
    for x, other in zip(reversed(inputs), reversed(others), strict=True):
        assert offload.unpack(packed.pop()) is other
        assert torch.equal(offload.unpack(packed.pop()), x)
    assert lane.most_on_device == 2
    assert lane.faults == []


@contextmanager
def raising_in(adapter: Adapter, where: str) -> Iterator[None]:
    """Let a forward or a backward raise an error in the middle of the model."""

    def stop(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    layer = adapter.base.model.base_model.layers[2]
    if where == "forward":
        hook = layer.self_attn.register_forward_hook(stop)
    else:
        hook = next(p for p in layer.parameters() if p.requires_grad).register_hook(stop)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_ends_in_the_middle_leaves_nothing(
    offloaded: tuple[Adapter, _Late], held: Callable[[], int], where: str
) -> None:
    adapter, lane = offloaded
    expected = expected_of(adapter, padded_batch(), lane)
    with raising_in(adapter, where):
        step(adapter, padded_batch())
    gc.collect()
    if where == "forward":
        assert held() == lane.alive() == 0
    for parameter in adapter.parameters().values():
        parameter.grad = None
    _, grads = step(adapter, padded_batch())
    assert_equal(grads, expected)
    # The rest of a backward that failed stays in torch's queue until the next backward.
    gc.collect()
    assert held() == lane.alive() == 0
    assert lane.faults == []


# ---------------------------------------------------------------- what is on


@pytest.mark.parametrize(
    ("options", "hardware", "expected"),
    [
        ({}, GPU, (True, True, MLP_TILE_TOKENS)),
        ({}, CPU, (True, False, MLP_TILE_TOKENS)),
        ({"recompute": False}, GPU, (False, False, 0)),
        ({"recompute": False, "mlp_tile_tokens": 64}, GPU, (False, False, 64)),
        ({"offload_checkpoints": False, "mlp_tile_tokens": 0}, GPU, (True, False, 0)),
        ({"offload_checkpoints": True}, CPU, (True, False, MLP_TILE_TOKENS)),
    ],
)
def test_what_is_left_open_is_decided_by_the_hardware(
    options: dict[str, Any], hardware: Hardware, expected: tuple[bool, bool, int]
) -> None:
    assert resolve(StepOptions(**options), hardware) == Reducers(*expected)


def test_what_has_no_effect_is_said() -> None:
    asked = StepOptions(offload_checkpoints=True, mlp_tile_tokens=64)
    assert without_effect(asked, resolve(asked, CPU), Applied(0, 0)) == [
        "--offload-checkpoints has no effect: the model runs on a CPU",
        "--mlp-tile-tokens has no effect: the model's MLPs are of another kind",
    ]
    asked = StepOptions(offload_checkpoints=True, recompute=False)
    assert without_effect(asked, resolve(asked, GPU), Applied(0, 0)) == [
        "--offload-checkpoints has no effect: nothing is recomputed"
    ]
    assert without_effect(StepOptions(), resolve(StepOptions(), GPU), Applied(0, 0)) == []


@pytest.mark.parametrize(
    ("asked", "device", "tied", "expected"),
    [
        (None, "meta", False, True),
        (None, "meta", True, False),
        (None, "cpu", False, False),
        (False, "meta", False, False),
        (True, "meta", True, False),
    ],
)
def test_where_the_embedding_goes(
    asked: bool | None, device: str, tied: bool, expected: bool
) -> None:
    placed = Placement(asked).resolved(torch.device(device), tied=tied)
    assert placed.embedding_on_cpu is expected


# ---------------------------------------------------------------- a head in fewer bits


def with_head(folder: Path, head_bits: Any, bits: int = 16) -> Base:
    spec = BaseSpec(find_model(str(folder)), folder, Quantization(bits))
    return load_base(spec, CPU, placement=Placement(head_bits=head_bits))


def summed_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def measured(base: Base, head: Head, batch: Batch) -> tuple[Tensor, ...]:
    """Return losses, gradients of the hidden states, and scores through a head."""
    states = supervised_states(base.model, batch)
    hidden = states.hidden.detach().requires_grad_()
    found = cross_entropy_sum(hidden, states.targets, head, 7)
    own = chunked_loss_sum(hidden, states.targets, head, summed_entropy, 7)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (found, own)]
    logprobs = score_tokens(hidden.detach(), states.targets, head, 7).logprobs
    return found, own, *grads, logprobs


SLICED = ("tinyllama", "gemma-2-9b", "cohere", "phi", "qwen2-tied")


# The bits belong to the weight and the formula to the head, so by default each is tested once.
@pytest.mark.parametrize(
    ("name", "head_bits"),
    [*((name, 4) for name in SLICED), (SLICED[0], 8), *slow(*((name, 8) for name in SLICED[1:]))],
)
def test_a_sliced_head_computes_as_its_unpacked_twin(
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    head_bits: int,
) -> None:
    monkeypatch.setattr(head_module, "_SLICE_ROWS", 40)  # three slices, the last one of 16
    base = with_head(folder_of(name), head_bits)
    packed = head_of(base.model)
    assert len(packed.linear.weight.parts) == 3
    twin = FrozenLinear(packed.linear.in_features, packed.linear.out_features, bias=False)
    twin.weight = PlainWeight(packed.linear.weight.dequantize(torch.float32))
    twin.bias = packed.linear.bias
    adapter, batch = attach(base, LoraSpec(rank=3)), padded_batch()
    expected = measured(base, replace(packed, linear=twin), batch)
    for ours, theirs in zip(measured(base, packed, batch), expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    with torch.no_grad():
        logits = base.model(input_ids=batch.input_ids[:1]).logits
        exact = packed.logits(base.model.base_model(input_ids=batch.input_ids[:1])[0][0])
    assert relative_error(logits[0], exact) <= 1e-5
    _, grads = step(adapter, batch)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_tied_embedding_keeps_its_16_bits(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("phi-4-mini")
    stored = load_folder(folder).model.get_input_embeddings().weight
    model = with_head(folder, 4).model
    assert torch.equal(model.get_input_embeddings().weight, stored)
    assert model.get_output_embeddings().weight.stored_bytes < stored.nbytes / 4
    placed = Placement(head_bits=4).resolved(GPU.device, tied=True)
    assert placed.embedding_on_cpu, "it is not the head any more"


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.002), (4, 0.03)])
def test_a_head_in_fewer_bits_changes_the_loss_a_little(
    stories: Path, bits: Any, limit: float
) -> None:
    """The text is the model's own, so that its loss is as low as that of a real language model."""
    base, packed = load_folder(stories), with_head(stories, bits)
    model: Any = base.model
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=120, do_sample=False)[0].tolist()
    rows = [{"input_ids": ids, "labels": ids, "row": 0}]
    stored, quantised = evaluate(base, rows).loss, evaluate(packed, rows).loss
    assert 0 < abs(quantised - stored) < limit
    sizes = [head_of(each.model).linear.weight.stored_bytes for each in (base, packed)]
    assert sizes[1] < sizes[0] * bits / 25


# ---------------------------------------------------------------- predicted memory


def predicted(
    tokens: int, *, model: str = "deepseek-7b", layers: int | None = None, **options: Any
) -> Prediction:
    config = TrainConfig(model=model, eval_batch_size=1, **options)
    source = find_model(model)
    if layers is not None:
        numbers = {**dict(source.architecture or {}), "num_hidden_layers": layers}
        source = replace(source, architecture=numbers)
    spec = BaseSpec(source, None, Quantization(config.bits), random=True)
    return predict(Subject(spec, LoraSpec(), GPU, RowSizes(tokens)), config)


@pytest.mark.parametrize(
    ("tokens", "bits", "limit"),
    [
        (2048, 4, 5.0e9),
        pytest.param(32768, 4, 10e9, marks=pytest.mark.slow),
        pytest.param(4096, 4, 5.3e9, marks=pytest.mark.slow),
        pytest.param(8192, 4, 5.8e9, marks=pytest.mark.slow),
        pytest.param(2048, 8, 8.0e9, marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_of_7b(tokens: int, bits: int, limit: float) -> None:
    """Exact reducers only: fp32 LoRA of rank 16 on attention, fp32 Adam, one row."""
    assert predicted(tokens, bits=bits).peak.bytes <= limit


OFF = {"embedding_on_cpu": False, "offload_checkpoints": False, "mlp_tile_tokens": 0}


@pytest.fixture(scope="module")
def without_reducers() -> Prediction:
    return predicted(8192, layers=4, **OFF)


@pytest.mark.parametrize("name", OFF)
def test_each_reducer_lowers_the_predicted_peak(without_reducers: Prediction, name: str) -> None:
    alone = predicted(8192, layers=4, **{k: v for k, v in OFF.items() if k != name})
    assert alone.peak.bytes < without_reducers.peak.bytes - 50e6


def test_a_head_in_fewer_bits_lowers_the_predicted_peak() -> None:
    peaks = [predicted(2048, layers=4, head_bits=bits).peak.bytes for bits in (16, 8, 4)]
    assert peaks[0] - peaks[1] > 0.3e9
    # With 4 bits a step takes less than loading does, which has the whole head in 16 bits.
    assert peaks[0] - peaks[2] > 0.45e9


def test_checkpoints_on_the_device_do_not_grow_with_layers() -> None:
    peaks = {n: predicted(4096, layers=n).device["backward"] for n in (3, 6)}
    parts = ("layer checkpoints", "activations")
    grown = [sum(peaks[n].by_purpose.get(part, 0) for part in parts) for n in (3, 6)]
    assert grown[1] <= grown[0] * 1.01


@pytest.mark.parametrize("name", [*ARCHITECTURES, "qwen2-tied"])
def test_host_and_device_are_not_mixed_up_on_any_architecture(
    folder_of: Callable[[str], Path],
    name: str,
) -> None:
    """Two devices on a machine with one: an operation on tensors of both would fail."""
    folder = folder_of(name)
    spec = BaseSpec(find_model(str(folder)), folder, Quantization(4))
    config = TrainConfig(eval_batch_size=2, batch_size=2)
    lora = LoraSpec(targets=("all-linear",))
    found = predict(Subject(spec, lora, GPU, RowSizes(32)), config)
    tied = bool(spec.architecture().get_text_config().tie_word_embeddings)
    on_host = found.host["forward"].by_purpose.get("embeddings", 0)
    on_device = found.device["forward"].by_purpose.get("embeddings", 0)
    assert (on_host > 0, on_device > 0) == (not tied, tied)

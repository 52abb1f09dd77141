"""Which kernels serve: by a model's parts in a plan, by trial on a device, and none on a CPU.

No test here needs a GPU. Where a kernel has to serve on a CPU, it is let to, as in Triton's
interpreter; `test_gpu.py` has the trials on a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import relative_error
from tiny_models import NAMES, fill_lora, load_folder
from torch import Tensor, nn
from training import make_adapter, make_rows, options, weights_of
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

import qlora_kit as qk
from qlora_kit.config import StepOptions
from qlora_kit.data.batch import collate
from qlora_kit.layers import kernels
from qlora_kit.layers.kernels.norm import FusedNorm
from qlora_kit.layers.quantize import Quantization
from qlora_kit.lora.attach import Adapter
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.head import head_of
from qlora_kit.model.load import BaseSpec
from qlora_kit.model.names import find_model
from qlora_kit.plan.simulate import Prediction, predict
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.recipe.run import Run
from qlora_kit.recipe.training import train
from qlora_kit.report.facts import header
from qlora_kit.step import kernels as chosen
from qlora_kit.step import rotary
from qlora_kit.step.kernels import Kernels, choose_kernels, decided
from qlora_kit.step.norms import set_norms
from qlora_kit.step.rotary import Rotation, set_rotary
from qlora_kit.step.trials import Tried
from qlora_kit.tasks.causal import loss_sum
from qlora_kit.train.loop import train_adapter
from qlora_kit.train.resume import differences

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
GPU = Hardware(torch.device("meta"), torch.bfloat16, "stands in for a GPU")
# Kinds whose norms subtract the mean, or which rotate in a way of their own.
OTHER_NORMS = {"gpt2", "cohere", "phi"}
OTHER_ROTATIONS = {"gpt2", "cohere", "gpt-oss"}


@pytest.fixture(autouse=True)
def nothing_stays_in_use() -> Iterator[None]:
    yield
    kernels.use(())
    modeling_llama.apply_rotary_pos_emb = getattr(
        modeling_llama.apply_rotary_pos_emb, "replaced", modeling_llama.apply_rotary_pos_emb
    )


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_DEVICES", {"cpu", "meta"})


def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate as the kernel does, for any width of cos and sin."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotary._rotated(q, cos, sin), rotary._rotated(k, cos, sin)


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Put the formula in the place of rotary's kernel; return the shapes of all queries it got."""
    asked: list[tuple[int, ...]] = []

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(tuple(q.shape))
        return formula(q, k, cos, sin)

    stand_in: Any = ModuleType(rotary._KERNEL)
    stand_in.rotate, stand_in.__spec__ = rotate, ModuleSpec(rotary._KERNEL, None)
    monkeypatch.setitem(sys.modules, rotary._KERNEL, stand_in)
    return asked


def names_and_kinds(model: nn.Module) -> tuple[list[str], list[str]]:
    return [name for name, _ in model.named_modules()], list(model.state_dict())


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_recognised_and_every_name_stays(
    folder_of: Callable[[str], Path], name: str
) -> None:
    model = load_folder(folder_of(name)).model
    modules, names = dict(model.named_modules()), names_and_kinds(model)
    weights = model.state_dict()
    count = sum("norm" in type(module).__name__.lower() for module in modules.values())
    assert set_norms(model, True, torch.float32) == (0 if name in OTHER_NORMS else count)
    assert names_and_kinds(model) == names
    assert all(torch.equal(model.state_dict()[each], weights[each]) for each in weights)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in load_folder(folder_of(name)).model.named_parameters()
    ]
    model.eval()
    set_norms(model, False, torch.float32)
    assert dict(model.named_modules()) == modules
    assert not any(module.training for module in model.modules())


def test_gemmas_norms_are_told_from_llamas(folder_of: Callable[[str], Path]) -> None:
    for name, adds_one in (("gemma-2-9b", True), ("tinyllama", False), ("qwen3-8b", False)):
        model = load_folder(folder_of(name)).model
        set_norms(model, True, torch.float32)
        norms = [module for module in model.modules() if isinstance(module, FusedNorm)]
        assert {norm.adds_one for norm in norms} == {adds_one}, name


class _Centred(modeling_llama.LlamaRMSNorm):
    """Has all parts of an RMSNorm, and subtracts the mean."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class _Squared(modeling_llama.LlamaRMSNorm):
    """Differs from an RMSNorm only where the numbers are as small as its ε."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon**2)
        return self.weight * hidden_states * wide


class _Gated(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(hidden_states)
        return y if gate is None else y * gate


@pytest.mark.parametrize("kind", [_Centred, _Squared, _Gated, nn.LayerNorm])
def test_other_norms_are_left_alone(kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"norm": kind(32)}).requires_grad_(False)
    assert set_norms(model, True, torch.float32) == 0
    assert type(model["norm"]) is kind


def test_a_norm_that_is_trained_is_left_alone() -> None:
    model = nn.ModuleDict({"norm": modeling_llama.LlamaRMSNorm(32)})
    assert set_norms(model, True, torch.float32) == 0
    assert set_norms(model.requires_grad_(False), True, torch.float32) == 1


# ---------------------------------------------------------------- rotary


@pytest.mark.usefixtures("on_a_cpu")
def test_a_models_own_function_is_replaced_and_put_back(
    folder_of: Callable[[str], Path], rotations: list[tuple[int, ...]]
) -> None:
    model = load_folder(folder_of("tinyllama")).model
    own = modeling_llama.apply_rotary_pos_emb
    (placed,) = set_rotary(model, True)
    assert modeling_llama.apply_rotary_pos_emb is placed
    assert set_rotary(model, True) == [placed] == [Rotation(own, takes_part=False)]
    ids = torch.arange(6).unsqueeze(0)
    logits = model(ids).logits
    assert not rotations  # it is placed, and not in use
    kernels.use(["rotary"])
    assert torch.allclose(model(ids).logits, logits, atol=1e-5)
    assert rotations == [(1, 4, 6, 16)] * 2
    assert set_rotary(model, False) == []
    assert modeling_llama.apply_rotary_pos_emb is own


@pytest.mark.usefixtures("on_a_cpu")
def test_unusual_arguments_go_to_the_models_own_function(rotations: list[tuple[int, ...]]) -> None:
    kernels.use(["rotary"])
    place = Rotation(modeling_llama.apply_rotary_pos_emb, takes_part=False)
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    angles = torch.randn(1, 5, 8).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    own = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.allclose(place(q, k, cos, sin)[1], own[1], atol=1e-6)
    assert torch.allclose(place(q, k, cos, sin, unsqueeze_dim=1)[0], own[0], atol=1e-6)
    assert len(rotations) == 2
    turned = [x.transpose(1, 2) for x in (q, k)]
    assert torch.equal(place(*turned, cos, sin, 2)[0].transpose(1, 2), own[0])
    assert torch.equal(place(*turned, cos, sin, unsqueeze_dim=2)[0].transpose(1, 2), own[0])
    assert place(q, k, cos.double(), sin.double())[0].dtype == torch.float64
    with pytest.raises(RuntimeError, match="size"):
        place(q, k, cos[..., :8], sin[..., :8])
    assert len(rotations) == 2


@pytest.mark.parametrize("name", NAMES)
def test_functions_that_compute_the_same_are_recognised(
    folder_of: Callable[[str], Path], rotations: list[tuple[int, ...]], name: str
) -> None:
    model = load_folder(folder_of(name)).model
    try:
        assert bool(set_rotary(model, True)) == (name not in OTHER_ROTATIONS)
    finally:
        set_rotary(model, False)
    assert not rotations


def test_interleaved_pairs_are_another_formula_and_a_part_is_recognised() -> None:
    assert not rotary._computes_the_same(modeling_glm.apply_rotary_pos_emb, part=1)
    assert rotary._computes_the_same(modeling_llama.apply_rotary_pos_emb, part=1)
    assert not rotary._computes_the_same(modeling_llama.apply_rotary_pos_emb, part=2)

    def with_a_part(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return formula(q, k, cos, sin)

    assert rotary._computes_the_same(with_a_part, part=2)


# ---------------------------------------------------------------- which serve


def subject(folder: Path, bits: int = 4) -> Subject:
    spec = BaseSpec(find_model(str(folder)), folder, Quantization(bits))
    return Subject(spec, LoraSpec(targets=("all-linear",)), GPU, RowSizes(24))


def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> list[Kernels]:
    """Return the kernels that a plan for a GPU has chosen."""
    found: list[Kernels] = []

    def noted(tried: Tried) -> Kernels:
        found.append(decided(tried))
        return found[-1]

    monkeypatch.setattr(chosen, "decided", noted)
    predict(subject(folder, config.pop("bits", 4)), qk.TrainConfig(eval_batch_size=1, **config))
    return found


@pytest.mark.usefixtures("rotations")
@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("tinyllama", {}, kernels.NAMES),
        ("tinyllama", {"bits": 16}, ("lora", "norm", "rotary", "gate", "loss")),
        ("tinyllama", {"mlp_tile_tokens": 0}, ("nf4", "lora", "norm", "rotary", "loss")),
        ("gemma-2-9b", {}, kernels.NAMES),
        ("gpt2", {}, ("nf4", "lora", "loss")),
    ],
)
def test_a_plan_chooses_by_the_parts_of_the_model(
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    expected: tuple[str, ...],
) -> None:
    found = planned(folder_of(name), monkeypatch, **changes)
    assert found
    assert all(each == Kernels(expected) for each in found)
    assert kernels.in_use() == frozenset()  # a plan leaves what serves as it was


def test_nothing_serves_on_a_cpu_or_where_the_plain_code_is_asked_for(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(folder_of("tinyllama"), monkeypatch, kernels="plain") == []
    model = load_folder(folder_of("tinyllama")).model
    kernels.use(["norm"])
    assert choose_kernels(model, StepOptions(), CPU) == Kernels()
    assert kernels.in_use() == frozenset()
    assert not any(isinstance(module, FusedNorm) for module in model.modules())


def test_a_plan_with_kernels_needs_no_more_memory(folder_of: Callable[[str], Path]) -> None:
    def peaks(name: str, asked: str, **more: Any) -> Prediction:
        config = qk.TrainConfig(eval_batch_size=1, batch_size=4, kernels=asked, **more)
        return predict(subject(folder_of(name)), config)

    for name in ("tinyllama", "gemma-2-9b", "qwen3-8b"):
        for recompute in (True, False):
            plain, fused = (peaks(name, k, recompute=recompute) for k in ("plain", "auto"))
            assert fused.peak.bytes <= plain.peak.bytes, (name, recompute)
        # Without recompute, the copies in fp32 that a plain norm keeps are gone.
        kept = [each.peak.by_purpose["activations"] for each in (plain, fused)]
        assert kept[1] < kept[0], name


def filled(folder: Path) -> Adapter:
    adapter = make_adapter(folder, 4, targets="all-linear")
    fill_lora(adapter, std=0.05)
    return adapter


def tried_on_a_cpu(folder: Path, dtype: torch.dtype = torch.float32) -> Kernels:
    """Try the kernels of a model as on a GPU."""
    model: Any = filled(folder).base.model
    set_norms(model, True, dtype)
    return decided(Tried(model, replace(CPU, dtype=dtype), True, tuple(set_rotary(model, True))))


without_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is not None, reason="triton is installed"
)


@without_triton
@pytest.mark.usefixtures("on_a_cpu", "rotations")
def test_without_triton_the_others_serve_and_the_run_says_what_to_install(
    folder_of: Callable[[str], Path],
) -> None:
    found = tried_on_a_cpu(folder_of("tinyllama"))
    assert found.described() == "norm; not nf4, rotary, gate, loss: install triton"


@pytest.mark.usefixtures("on_a_cpu", "rotations")
def test_a_kernel_that_computes_otherwise_is_left_out(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen, "_lacks_triton", lambda _: False)
    folder = folder_of("tinyllama")
    assert {"norm", "rotary"} <= set(tried_on_a_cpu(folder).serving)

    def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return formula(q, k, cos, 1.001 * sin)

    def without_gradient(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned, own = formula(q, k, cos, sin), formula(q, k, cos, -sin)
        return own[0] + (turned[0] - own[0]).detach(), turned[1]

    def raising(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise ZeroDivisionError("of a kernel")

    for rotate, reason in (
        (wrong, "differs from the plain code"),
        (without_gradient, "differs from the plain code"),
        (raising, "raises ZeroDivisionError"),
    ):
        monkeypatch.setattr(sys.modules[rotary._KERNEL], "rotate", rotate)
        found = tried_on_a_cpu(folder)
        assert found.left_out["rotary"] == reason
        assert "norm" in found.serving
        assert "rotary" not in found.serving
        assert kernels.in_use() == frozenset()


def test_lora_has_a_kernel_for_16_bits_only(folder_of: Callable[[str], Path]) -> None:
    model: Any = filled(folder_of("tinyllama")).base.model
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 1)):
        assert len(Tried(model, replace(CPU, dtype=dtype), True).trials("lora")) == count


def test_trials_change_no_weight_and_leave_no_gradient(folder_of: Callable[[str], Path]) -> None:
    adapter = filled(folder_of("tinyllama"))
    model: Any = adapter.base.model.train()
    set_norms(model, True, torch.float32)
    before, state = weights_of(adapter), torch.get_rng_state()
    decided(Tried(model, CPU, True, tuple(set_rotary(model, True))))
    assert all(torch.equal(before[name], p) for name, p in adapter.parameters().items())
    assert not any(p.grad is not None for p in adapter.parameters().values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


# ---------------------------------------------------------------- a step with them


@pytest.mark.usefixtures("on_a_cpu", "rotations")
@pytest.mark.parametrize("name", ["tinyllama", "gemma-2-9b", "qwen3-8b", "phi-4-mini"])
def test_a_step_with_norms_and_rotations_of_kernels_agrees(
    folder_of: Callable[[str], Path], name: str
) -> None:
    adapter = filled(folder_of(name))
    model: Any = adapter.base.model.train()
    batch = collate(make_rows(3), 0)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        loss = loss_sum(model, batch, head_of(model))
        grads = torch.autograd.grad(loss, list(adapter.parameters().values()))
        return loss.detach(), dict(zip(adapter.parameters(), grads, strict=True))

    loss, grads = step()
    assert set_norms(model, True, torch.float32)
    assert set_rotary(model, True)
    kernels.use(["norm", "rotary"])
    try:
        found, found_grads = step()
    finally:
        set_rotary(model, False)
    assert relative_error(found, loss) <= 1e-6
    assert all(relative_error(found_grads[each], grads[each]) <= 2e-5 for each in grads)
    assert not all(torch.equal(found_grads[each], grads[each]) for each in grads)


def test_on_a_cpu_both_choices_train_the_same_bits(folder_of: Callable[[str], Path]) -> None:
    weights = []
    for asked in ("auto", "plain"):
        adapter = make_adapter(folder_of("tinyllama"))
        train_adapter(adapter, make_rows(6), options(kernels=asked))
        weights.append(weights_of(adapter))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ---------------------------------------------------------------- what a run says


@pytest.mark.usefixtures("few_rows")
def test_the_header_names_the_kernels_on_a_gpu_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready: list[Run] = []
    monkeypatch.setattr(Run, "taken", lambda run: ready.append(run) or {})
    train(qk.TrainConfig(output=tmp_path))
    (run,) = ready
    assert run.identity["kernels"] == "plain"

    def lines(hardware: Hardware, kernels: Kernels) -> dict[str, str]:
        adapter = replace(run.adapter, base=replace(run.adapter.base, hardware=hardware))
        return dict(header(adapter, run.learnt, run.rows, run.held_out, run.config, kernels, "off"))

    assert "kernels" not in lines(run.adapter.base.hardware, run.kernels)
    assert lines(GPU, Kernels())["kernels"] == "plain"
    found = lines(GPU, Kernels(("lora", "norm"), {"nf4": "install triton", "gate": "it raises"}))
    assert found["kernels"] == "lora, norm; not nf4: install triton; not gate: it raises"


def test_a_run_with_other_kernels_has_other_bits() -> None:
    now = {"kernels": "nf4, norm"}
    (refused,), _ = differences(now, {"kernels": "plain"})
    assert "kernels was 'plain' and is now 'nf4, norm'" in refused
    assert differences(now, {}, ["precision"])[0] == []
    assert differences({"kernels": "plain"}, {}) == ([], [])

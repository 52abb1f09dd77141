"""DoRA, a learned scale, a frozen A and VB-LoRA: forward, gradients, files and merge, against PEFT.

Where PEFT has no such variant, its plain LoRA or the equations of the paper are the reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from peft_twin import peft_twin, their_loss, transformers_model
from support import relative_error
from tiny_models import load_folder, mask_of, padded_batch
from torch import Tensor, nn

from qlora_kit.config import TrainConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.layers.dora import DoRALinear
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.learned_scale import LearnedScaleLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.mlp import Parts
from qlora_kit.layers.vector_bank import VectorBankLinear
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.attach import Adapter, attach, count_trainable, detach, merge
from qlora_kit.lora.files import BaseRecord
from qlora_kit.lora.reading import read_adapter
from qlora_kit.lora.several import load_adapters
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.writing import save_adapter
from qlora_kit.model.head import head_of
from qlora_kit.step.groups import set_groups
from qlora_kit.step.tiles import set_mlp_tiles
from qlora_kit.tasks.causal import loss_sum

TOLERANCE = 1e-5
FORMS = {
    "dora": Variant(dora=True),
    "dora-frozen-a": Variant(dora=True, freeze_a=True),
    "learned-scale": Variant(learned_scale=True),
    "frozen-a": Variant(freeze_a=True),
    "frozen-a-learned-scale": Variant(freeze_a=True, learned_scale=True),
    "vblora": Variant(vblora=True),
}
BATCH = padded_batch()


def spec_of(name: str, **more: Any) -> LoraSpec:
    patterns = {} if name == "vblora" else {"rank_pattern": {"v_proj": 3}, "rslora": True}
    values = {"rank": 4, "alpha": 6.0, "targets": ("all-linear",), **patterns, **more}
    return LoraSpec(variant=FORMS[name], **values)


def attached(folder: Path, name: str, bits: int = 16, **more: Any) -> Adapter:
    """Return an adapter that has been trained a little: all of its parameters are moved."""
    adapter = attach(load_folder(folder, bits), spec_of(name, **more))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            spread = 0.2 * parameter.abs().mean() + 0.02
            parameter += torch.empty(parameter.shape).normal_(0, 1, generator=generator) * spread
    return adapter


def our_loss(adapter: Adapter) -> Tensor:
    model = adapter.base.model
    return loss_sum(model, BATCH, head_of(model), chunk_tokens=7) / BATCH.weight


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    found: Tensor = model(input_ids=BATCH.input_ids, attention_mask=mask_of(BATCH)).logits
    return found


def saved(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_adapter(adapter, folder, BaseRecord.of(adapter.base))
    return folder


# ---------------------------------------------------------------- the layers


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", FORMS)
def test_attaching_detaching_and_merging(
    save_tiny: Callable[..., Path], name: str, bits: int
) -> None:
    base = load_folder(save_tiny("qwen2.5-7b"), bits)  # queries, keys and values have a bias
    before = logits(base.model)
    adapter = attach(base, spec_of(name))
    if name == "vblora":
        assert 0 < relative_error(logits(base.model), before) < 0.1
    else:
        assert torch.equal(logits(base.model), before)
    trained = {n: p for n, p in base.model.named_parameters() if p.requires_grad}
    assert trained == adapter.parameters()
    assert adapter.trainable == count_trainable(base.spec.skeleton(), adapter.spec)
    detach(adapter)
    assert torch.equal(logits(base.model), before)
    adapter = attached(save_tiny("qwen2.5-7b"), name, bits)
    model = adapter.base.model
    expected = logits(model)
    assert relative_error(before, expected) > 1e-2
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    merge(adapter)
    assert relative_error(logits(model), expected) <= TOLERANCE


@pytest.mark.parametrize("name", FORMS)
def test_groups_and_tiles_change_no_gradient(save_tiny: Callable[..., Path], name: str) -> None:
    adapter = attached(save_tiny("tinyllama"), name, rank_pattern={})
    model = adapter.base.model.train()

    def gradients() -> dict[str, Tensor]:
        """Return those of each layer; that of a scale alone is a difference of large sums."""
        model.zero_grad()
        our_loss(adapter).backward()
        return {
            path: torch.cat([each.grad.flatten() for each in layer.trained().values()])
            for path, layer in adapter.layers.items()
        }

    expected = gradients()
    groups, tiles = set_groups(model), set_mlp_tiles(model, 9, torch.float32)
    assert (groups, tiles) == ((0, 0) if "dora" in name else (4, 2))
    assert all((Parts.of(m) is not None) <= ("dora" not in name) for m in model.modules())
    for path, found in gradients().items():
        assert relative_error(found, expected[path]) <= TOLERANCE, path


def test_a_frozen_a_keeps_no_input() -> None:
    """The graph of a layer holds h (N, R) and B, and not x (N, D)."""
    frozen = FrozenLinear.holding(torch.randn(24, 40), None)
    held = {}
    for freeze_a in (False, True):
        layer, sizes = LoRALinear(frozen, rank=2, scaling=1.0, freeze_a=freeze_a), []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda each: (sizes.append(tuple(each.shape)), each)[1],  # noqa: B023
            lambda each: each,
        )
        with keep:
            layer(torch.randn(7, 40)).sum().backward()
        held[freeze_a] = sizes
        assert (layer.lora_A.grad is None) is freeze_a
        assert layer.lora_B.grad is not None
    assert (7, 40) in held[False]
    assert (7, 40) not in held[True]
    assert (7, 2) in held[True]


@pytest.mark.parametrize("freeze_a", [False, True])
def test_a_learned_scale_computes_its_equation(freeze_a: bool) -> None:
    torch.manual_seed(1)
    weight, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(7, 40, requires_grad=True)
    frozen = FrozenLinear.holding(weight, bias)
    layer = LearnedScaleLinear(frozen, rank=3, scaling=1.5, freeze_a=freeze_a)
    assert layer.lora_scale.tolist() == [1.5]
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_scale += 0.25
    a, b, g = (each.detach().clone().requires_grad_() for each in layer.made_of())
    expected = x @ weight.T + bias + g * (x @ a.T @ b.T)
    y = layer(x)
    assert relative_error(y, expected) <= 1e-6
    own = torch.autograd.grad(y.square().sum(), [x, *layer.trained().values()])
    wanted = [x, b, g] if freeze_a else [x, a, b, g]
    theirs = torch.autograd.grad(expected.square().sum(), wanted)
    assert len(own) == len(theirs)
    assert all(relative_error(*pair) <= TOLERANCE for pair in zip(own, theirs, strict=True))


def test_dora_measures_its_rows_once_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from qlora_kit.layers import dora

    real = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *given: calls.append(1) or real(*given))
    frozen = FrozenLinear.holding(torch.randn(24, 40), None)
    layer = DoRALinear(frozen, dtype=torch.float32, rank=2, scaling=1.0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for steps in (1, 2, 3):
        for _ in range(2):
            layer(torch.randn(7, 40)).square().sum().backward()
        optimizer.step()
        assert len(calls) == steps
        norms = real(frozen.weight.dequantize(torch.float32), layer.lora_A, layer.lora_B, 1.0)
        assert torch.equal(layer._norms(), norms)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 8)
    weight[1] = 0
    frozen = FrozenLinear.holding(weight, None)
    layer = DoRALinear(frozen, dtype=torch.float32, rank=2, scaling=1.0)
    y = layer(torch.randn(3, 8))
    y.sum().backward()
    assert not y[:, 1].any()
    assert all(torch.isfinite(each.grad).all() for each in layer.trained().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dora_in_bfloat16_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight, bias, x = torch.randn(24, 40).to(dtype), torch.randn(24), torch.randn(7, 40).to(dtype)
    layer = DoRALinear(FrozenLinear.holding(weight, bias), dtype=dtype, rank=2, scaling=1.0)
    assert torch.equal(layer(x), layer.frozen(x))
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector *= 1.5
    y = layer(x)
    assert y.dtype == dtype
    expected = x.float() @ layer.merged_weight().T + bias
    assert relative_error(y.float(), expected) <= (1e-2 if dtype == torch.bfloat16 else TOLERANCE)


# ---------------------------------------------------------------- against PEFT


def dora_twin(folder: Path, bits: int, adapter: Adapter, tmp_path: Path) -> Any:
    return PeftModel.from_pretrained(
        transformers_model(folder, bits), saved(adapter, tmp_path / "own"), is_trainable=True
    )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bits", [16, 4])
def test_gradients_of_dora_equal_those_of_peft(
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    bits: int,
    dropout: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_tiny("qwen2.5-7b")
    adapter = attached(folder, "dora", bits, dropout=dropout)
    twin = dora_twin(folder, bits, adapter, tmp_path)
    if dropout:
        # Both drop the same numbers: every third.
        def dropped(x: Tensor) -> Tensor:
            return torch.arange(x.numel()).view(x.shape) % 3 > 0

        monkeypatch.setattr(LoRALinear, "draw_kept", lambda self, x: dropped(x).flatten(0, -2))
        monkeypatch.setattr(
            nn.Dropout, "forward", lambda self, x: x * dropped(x) / (1 - self.p) if self.p else x
        )
    adapter.base.model.train()
    twin.train()
    our_loss(adapter).backward()
    their_loss(twin, BATCH).backward()
    for path, layer in adapter.layers.items():
        theirs = twin.get_submodule(f"base_model.model.{path}")
        pairs = {
            "lora_A": theirs.lora_A["default"].weight,
            "lora_B": theirs.lora_B["default"].weight,
            "lora_magnitude_vector": theirs.lora_magnitude_vector["default"].weight,
        }
        for name, own in layer.trained().items():
            assert relative_error(own.grad, pairs[name].grad) <= TOLERANCE, (path, name)


@pytest.mark.parametrize("name", ["frozen-a", "learned-scale"])
def test_gradients_of_b_equal_those_of_peft(save_tiny: Callable[..., Path], name: str) -> None:
    """A frozen A and an untouched scale leave B the gradients of plain LoRA."""
    folder = save_tiny("tinyllama")
    adapter = attach(load_folder(folder), spec_of(name))
    twin = peft_twin(folder, 16, adapter)
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            layer.lora_B.normal_(0, 0.1)
            theirs = twin.get_submodule(f"base_model.model.{path}.lora_B.default")
            theirs.weight.copy_(layer.lora_B)
    our_loss(adapter).backward()
    their_loss(twin.train(), BATCH).backward()
    for path, layer in adapter.layers.items():
        theirs = twin.get_submodule(f"base_model.model.{path}")
        pairs = [(layer.lora_B.grad, theirs.lora_B["default"].weight.grad)]
        if name == "learned-scale":
            pairs.append((layer.lora_A.grad, theirs.lora_A["default"].weight.grad))
        assert all(relative_error(*pair) <= TOLERANCE for pair in pairs), path


def test_gradients_of_vblora_equal_those_of_peft(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_tiny("tinyllama")
    adapter = attached(folder, "vblora")
    twin = PeftModel.from_pretrained(
        transformers_model(folder, 16), saved(adapter, tmp_path / "own"), is_trainable=True
    )
    our_loss(adapter).backward()
    their_loss(twin.train(), BATCH).backward()
    first = next(iter(adapter.layers.values()))
    assert isinstance(first, VectorBankLinear)
    bank = twin.base_model.vblora_vector_bank["default"]
    assert relative_error(first.vector_bank.grad, bank.grad) <= TOLERANCE
    for path, layer in adapter.layers.items():
        theirs = twin.get_submodule(f"base_model.model.{path}")
        # The kit's numbers are logits in units of ten, so their gradients are ten times as large.
        for own, side in ((layer.logits_a, "A"), (layer.logits_b, "B")):
            wanted = 10 * getattr(theirs, f"vblora_logits_{side}")["default"].grad
            assert relative_error(own.grad, wanted) <= TOLERANCE, (path, side)


@pytest.mark.parametrize("model", ["qwen2.5-7b", "gpt2"])
@pytest.mark.parametrize("name", FORMS)
def test_our_files_open_in_peft_and_in_ours(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str, model: str
) -> None:
    more = {"rank_pattern": {}} if model == "gpt2" else {}
    folder = folder_of(model)
    adapter = attached(folder, name, **more)
    expected = logits(adapter.base.model)
    own = saved(adapter, tmp_path / "own")
    theirs = PeftModel.from_pretrained(transformers_model(folder, 16), own)
    assert relative_error(logits(theirs), expected) <= TOLERANCE
    again = load_folder(folder)
    load_adapter(again, own)
    assert relative_error(logits(again.model), expected) <= TOLERANCE
    several = load_folder(folder)
    adapters = load_adapters(several, {"one": own})
    adapters.set_adapter("one")
    assert relative_error(logits(several.model), expected) <= TOLERANCE
    plain = logits(load_folder(folder).model)
    adapters.set_adapter([None, "one"])
    mixed = logits(several.model)
    assert relative_error(mixed[0], plain[0]) <= TOLERANCE
    assert relative_error(mixed[1], expected[1]) <= TOLERANCE


def test_a_dora_adapter_of_peft_opens(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny("tinyllama")
    config = LoraConfig(
        r=4, lora_alpha=6, use_dora=True, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(transformers_model(folder, 16), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "magnitude" in key:
                parameter *= 1.2
    theirs.save_pretrained(tmp_path)
    base = load_folder(folder)
    adapter = load_adapter(base, tmp_path)
    assert adapter.spec.variant.dora
    assert relative_error(logits(base.model), logits(theirs)) <= TOLERANCE


@pytest.mark.parametrize("only_top", [False, True])
def test_a_vblora_adapter_of_peft_opens(
    save_tiny: Callable[..., Path], tmp_path: Path, only_top: bool
) -> None:
    folder = save_tiny("tinyllama")
    config = VBLoRAConfig(
        r=3, num_vectors=20, vector_length=8, topk=3, target_modules="all-linear",
        save_only_topk_weights=only_top, task_type="CAUSAL_LM", init_vector_bank_bound=0.5,
    )  # fmt: skip
    theirs = get_peft_model(transformers_model(folder, 16), config).eval()
    theirs.save_pretrained(tmp_path)
    base = load_folder(folder)
    plain = logits(base.model)
    load_adapter(base, tmp_path)
    assert relative_error(plain, logits(theirs)) > 1e-2
    assert relative_error(logits(base.model), logits(theirs)) <= TOLERANCE


def test_files_that_do_not_fit_are_refused(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def changed(name: str, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
        folder = saved(attached(save_tiny("tinyllama"), name), tmp_path / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        change(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterError) as raised:
            read_adapter(folder)
        return str(raised.value)

    key = "base_model.model.model.layers.0.mlp.up_proj"
    unset = changed("dora", lambda config, _: config.update(use_dora=False))
    assert "use_dora is not set" in unset
    missing = changed("dora", lambda _, t: t.pop(f"{key}.lora_magnitude_vector"))
    assert "up_proj has no lora_magnitude_vector" in missing
    no_bank = changed("vblora", lambda _, t: t.pop("base_model.vblora_vector_bank"))
    assert "no base_model.vblora_vector_bank" in no_bank
    no_logits = changed("vblora", lambda _, t: t.pop(f"{key}.vblora_logits_B"))
    assert "up_proj has no logits of A and B" in no_logits


# ---------------------------------------------------------------- what cannot be combined


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"dora": True, "learned_scale": True}, "--dora and --learned-scale contradict"),
        ({"dora": True, "init": "pissa"}, "--dora and --init pissa contradict"),
        ({"vblora": True, "dora": True}, "--vblora and --dora contradict"),
        ({"vblora": True, "freeze_a": True}, "--vblora and --freeze-a contradict"),
        ({"vblora": True, "rank_pattern": {"q_proj": 3}}, "--vblora and --rank-pattern contradict"),
        ({"freeze_a": True, "loraplus_ratio": 4.0}, "--freeze-a and --loraplus-ratio 4 contradict"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], found: str) -> None:
    config = TrainConfig(model="demo", data=("x.jsonl",), output=Path("o"), **values)
    with pytest.raises(ConfigError, match=found):
        LoraSpec.of(config)


@pytest.mark.parametrize("name", FORMS)
def test_experts_have_plain_lora_only(save_tiny: Callable[..., Path], name: str) -> None:
    base = load_folder(save_tiny("qwen3-30b-a3b"))
    spec = spec_of(name, targets=("experts",), rank_pattern={})
    with pytest.raises(ConfigError, match="a stack of experts, which has plain LoRA only"):
        count_trainable(base.spec.skeleton(), spec)


def test_vectors_must_divide_the_layers(save_tiny: Callable[..., Path]) -> None:
    numbers = {"hidden_size": 68, "intermediate_size": 97, "num_attention_heads": 2}
    skeleton = load_folder(save_tiny("tinyllama", **numbers)).spec.skeleton()
    with pytest.raises(ConfigError, match="68, 97 inputs and outputs, which no vector"):
        count_trainable(skeleton, spec_of("vblora", targets=("mlp",)))

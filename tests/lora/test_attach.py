"""Attaching LoRA to a base, taking it off, and merging it; and the layers that a target names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from tiny_models import fill_lora, load_folder
from torch import Tensor

from qlora_kit.errors import ConfigError
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.projections import Projection, group_of, projections
from qlora_kit.lora.attach import attach, detach, merge
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.targets import check_patterns, resolve_targets

IDS = torch.tensor([[1, 7, 30, 41, 52, 63, 2], [5, 9, 11, 90, 80, 70, 60]])
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4-double": {"bits": 4},
    "fp4": {"bits": 4, "quant_type": "fp4", "double_quant": False},
    "int8": {"bits": 8},
    "plain": {"bits": 16},
}
PATHS = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
LAYER = torch.nn.Linear(2, 2)
FOUND = {path: Projection(path, LAYER, group_of(path)) for path in PATHS}


@torch.no_grad()
def logits(base: Any) -> Tensor:
    return base.model(input_ids=IDS).logits


def carries_lora(base: Any) -> bool:
    return any(isinstance(module, LoRALinear) for module in base.model.modules())


# ---------------------------------------------------------------- attach, detach, merge


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["tinyllama", "qwen2.5-7b", "phi-4-mini"])
def test_attaching_leaves_and_detaching_restores_every_bit(
    save_tiny: Callable[..., Path], name: str, scheme: str, dtype: str
) -> None:
    base = load_folder(save_tiny(name), **SCHEMES[scheme], dtype=dtype)
    modules = {path: module for path, module in base.model.named_modules() if path}
    before = logits(base)
    adapter = attach(base, LoraSpec(targets=("all-linear",), dropout=0.1))
    assert torch.equal(logits(base), before)
    fill_lora(adapter)
    assert relative_error(logits(base), before) > 0.01
    assert detach(adapter) is base
    assert torch.equal(logits(base), before)
    assert not carries_lora(base)
    assert dict(base.model.named_modules()).keys() - {""} == modules.keys()
    assert all(base.model.get_submodule(path) is module for path, module in modules.items())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["tinyllama", "qwen2.5-7b", "gemma-2-9b"])
def test_merged_equals_attached(save_tiny: Callable[..., Path], name: str, scheme: str) -> None:
    base = load_folder(save_tiny(name), **SCHEMES[scheme])
    plain = logits(base)
    adapter = attach(base, LoraSpec(rank=4, alpha=6.0, rslora=True, targets=("mlp", "q_proj")))
    fill_lora(adapter)
    attached = logits(base)
    assert merge(adapter) is base
    assert relative_error(plain, attached) > 0.01
    assert relative_error(logits(base), attached) <= 1e-5
    assert not carries_lora(base)
    layers = {path: each.frozen for path, each in projections(base.model).items()}
    assert all(layers[path].weight.bits == 16 for path in adapter.layers)
    untouched = layers["model.layers.0.self_attn.o_proj"].weight.bits
    assert untouched == SCHEMES[scheme]["bits"]


def test_a_merge_can_be_rounded_to_float16(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("tinyllama"), 4)
    adapter = attach(base, LoraSpec(rank=4))
    fill_lora(adapter)
    attached = logits(base)
    merge(adapter, torch.float16)
    path = next(iter(adapter.layers))
    assert projections(base.model)[path].frozen.weight.values.dtype == torch.float16
    assert 1e-7 < relative_error(logits(base), attached) < 2e-3


def test_projections_are_the_same_with_and_without_an_adapter(
    save_tiny: Callable[..., Path],
) -> None:
    base = load_folder(save_tiny("tinyllama"))
    before = projections(base.model)
    attach(base, LoraSpec())
    after = projections(base.model)
    assert list(after) == list(before)
    assert len(before) == 14
    assert all(after[path].layer is before[path].layer for path in before)


def test_only_the_adapter_is_trained(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("tinyllama"), 4)
    adapter = attach(base, LoraSpec(rank=3, targets=("q_proj",)))
    trained = {n for n, p in base.model.named_parameters() if p.requires_grad}
    assert trained == set(adapter.parameters())
    assert adapter.trainable == 2 * (3 * 64 + 64 * 3)


def test_the_seed_decides_a(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("tinyllama"))
    drawn = []
    for seed in (1, 1, 2):
        adapter = attach(base, LoraSpec(rank=3), seed)
        drawn.append(torch.cat([layer.lora_A.flatten() for layer in adapter.layers.values()]))
        detach(adapter)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_attaching_twice_is_refused(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("tinyllama"))
    attach(base, LoraSpec())
    with pytest.raises(ConfigError, match="carries an adapter already"):
        attach(base, LoraSpec())


def test_a_layer_is_attached_in_the_mode_of_its_model(save_tiny: Callable[..., Path]) -> None:
    """Dropout must not act in an evaluation that nobody switched to training."""
    base = load_folder(save_tiny("tinyllama"))
    adapter = attach(base, LoraSpec(dropout=0.5))
    fill_lora(adapter)
    assert torch.equal(logits(base), logits(base))
    base.model.train()
    assert not torch.equal(logits(base), logits(base))


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("attention",), ["self_attn.q_proj", "self_attn.o_proj"]),
        (("mlp",), ["mlp.up_proj", "mlp.down_proj"]),
        (("all-linear",), ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]),
        (("down_proj", "q_proj"), ["self_attn.q_proj", "mlp.down_proj"]),
        (("mlp.up_proj",), ["mlp.up_proj"]),
        (
            ("attention", "q_proj", "down_proj"),
            ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"],
        ),
        ((r".*\.(q|up)_proj",), ["self_attn.q_proj", "mlp.up_proj"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_targets_name_layers(targets: tuple[str, ...], expected: list[str]) -> None:
    wanted = [path for path in PATHS if path.split(".", 3)[3] in expected]
    assert len(wanted) == 3 * len(expected)
    assert resolve_targets(FOUND, targets) == wanted


def test_a_path_or_an_expression_can_name_single_layers() -> None:
    assert resolve_targets(FOUND, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    found = resolve_targets(FOUND, [r"model\.layers\.(0|10)\.self_attn\..*"])
    assert found == [PATHS[0], PATHS[1], PATHS[8], PATHS[9]]
    assert resolve_targets(FOUND, [r"model\.layers\.1\..*"]) == PATHS[4:8]  # not layer 10


@pytest.mark.parametrize(
    "target", ["proj", "no_such", "q_pro", ".*lm_head", "layers.7.mlp.up_proj"]
)
def test_a_target_that_matches_nothing_lists_the_layers(target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_targets(FOUND, [target])
    (fault,) = caught.value.faults
    assert f"'{target}' matches no linear layer" in fault
    assert "attention, mlp, all-linear, or one of q_proj, o_proj, up_proj, down_proj" in fault


def test_targets_that_match_in_part_are_refused_one_line_a_fault(
    save_tiny: Callable[..., Path],
) -> None:
    base = load_folder(save_tiny("tinyllama"))
    with pytest.raises(ConfigError) as caught:
        attach(base, LoraSpec(targets=("q_proj", "qkv_proj", "attention", "wte")))
    assert [fault.split("'")[1] for fault in caught.value.faults] == ["qkv_proj", "wte"]
    assert not carries_lora(base)  # nothing half done
    with pytest.raises(ConfigError, match="empty"):
        attach(base, LoraSpec(targets=()))


@pytest.mark.parametrize(
    "target", ["lm_head", ".*lm_head", "embed_tokens", "model.embed_tokens", ".*embed.*"]
)
def test_head_and_embedding_are_targets_by_name(
    save_tiny: Callable[..., Path], target: str
) -> None:
    base = load_folder(save_tiny("tinyllama"))
    adapter = attach(base, LoraSpec(targets=("q_proj", target)))
    wanted = "lm_head" if "lm_head" in target else "model.embed_tokens"
    assert [path for path in {**adapter.layers, **adapter.others()} if "q_proj" not in path] == [
        wanted
    ]


def test_all_linear_leaves_head_and_embedding_out(save_tiny: Callable[..., Path]) -> None:
    adapter = attach(load_folder(save_tiny("tinyllama")), LoraSpec(targets=("all-linear",)))
    assert not any(
        "lm_head" in path or "embed" in path for path in {**adapter.layers, **adapter.others()}
    )


def test_an_expression_is_told_as_it_was_given() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_targets(FOUND, [r"layers\.\d{1,2}\.q"])
    assert r"'layers\.\d{1,2}\.q' matches" in caught.value.faults[0]


def test_a_broken_expression_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'\(q_proj' is no regular expression"):
        resolve_targets(FOUND, ["(q_proj"])


# ---------------------------------------------------------------- rank and alpha


def test_patterns_change_rank_and_scaling_of_what_they_name() -> None:
    spec = LoraSpec(
        rank=8,
        alpha=16.0,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 4},
        alpha_pattern={"down_proj": 40.0},
    )
    assert spec.rank_of("model.layers.0.self_attn.q_proj") == 2  # the first that matches
    assert spec.rank_of("model.layers.1.self_attn.q_proj") == 4
    assert spec.rank_of("model.layers.1.self_attn.xq_proj") == 8  # whole names only
    assert spec.scaling_of("model.layers.0.self_attn.q_proj") == 8
    assert spec.scaling_of("model.layers.0.mlp.down_proj") == 5
    assert spec.scaling_of("model.layers.0.mlp.up_proj") == 2


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    spec = LoraSpec(rank=16, alpha=8.0, rslora=True, rank_pattern={"q_proj": 4})
    assert spec.scaling_of("a.o_proj") == 2
    assert spec.scaling_of("a.q_proj") == 4


def test_patterned_ranks_are_those_of_the_layers(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("tinyllama"))
    adapter = attach(
        base, LoraSpec(rank=8, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 4})
    )
    ranks = {path.rsplit(".", 1)[1]: layer.rank for path, layer in adapter.layers.items()}
    assert ranks == {"q_proj": 8, "k_proj": 8, "v_proj": 3, "o_proj": 8}
    shapes = {tuple(layer.lora_B.shape) for path, layer in adapter.layers.items() if "v_" in path}
    assert shapes == {(32, 3)}
    scalings = {path.rsplit(".", 1)[1]: layer.scaling for path, layer in adapter.layers.items()}
    assert scalings == {"q_proj": 0.5, "k_proj": 4, "v_proj": 32 / 3, "o_proj": 4}


def test_patterns_that_name_no_targeted_layer_are_refused() -> None:
    spec = LoraSpec(rank_pattern={"up_proj": 4, "q_proj": 2}, alpha_pattern={"nothing": 3.0})
    paths = resolve_targets(FOUND, ["attention"])
    with pytest.raises(ConfigError) as caught:
        check_patterns(paths, spec)
    assert [fault.split(" ")[0] for fault in caught.value.faults] == [
        "--rank-pattern:",
        "--alpha-pattern:",
    ]
    assert "'up_proj'" in caught.value.faults[0]
    assert "q_proj, o_proj" in caught.value.faults[0]
    check_patterns(PATHS, LoraSpec(rank_pattern={"up_proj": 4}))

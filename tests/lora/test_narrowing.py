"""`--layers-to-transform` and `--exclude-modules`: the same layers as in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import fill_lora, load_folder
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import ConfigError
from qlora_kit.lora.attach import attach
from qlora_kit.lora.shortened import shortened
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.targets import block_of, targeted_paths
from qlora_kit.plan.simulate import predict
from qlora_kit.plan.subject import RowSizes, Subject

SPECS: dict[str, dict[str, Any]] = {
    "blocks": {"layers_to_transform": (0, 2)},
    "names": {"exclude_modules": ("k_proj", "model.layers.1.mlp.up_proj")},
    "expression": {"exclude_modules": (r".*\.[0-2]\.self_attn\..*",)},
    "both": {"layers_to_transform": (1,), "exclude_modules": ("down_proj",)},
    "a whole path": {"layers_to_transform": (2,),
                     "targets": ("q_proj", "model.layers.2.mlp.up_proj")},
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "up_proj", "down_proj")


def adapted(wrapped: Any) -> set[str]:
    """Return the layers of PEFT's model that carry LoRA."""
    prefix = "base_model.model."
    return {
        path.removeprefix(prefix)
        for path, module in wrapped.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }


def of_peft(spec: LoraSpec) -> dict[str, Any]:
    """Return PEFT's options for a spec; it takes a text for an expression, a list for names."""
    excluded: Any = list(spec.exclude_modules)
    if excluded and "*" in excluded[0]:
        excluded = excluded[0]
    return {
        "target_modules": list(spec.targets),
        "exclude_modules": excluded or None,
        "layers_to_transform": list(spec.layers_to_transform) or None,
    }


@pytest.mark.parametrize("name", SPECS)
def test_the_layers_are_those_of_peft_and_peft_opens_the_file_with_them(
    save_tiny: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = save_tiny("tinyllama", num_hidden_layers=3)
    spec = LoraSpec(rank=2, **{"targets": TARGETS, **SPECS[name]})
    base = load_folder(folder)
    adapter = attach(base, spec)
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = adapted(get_peft_model(model, LoraConfig(r=2, **of_peft(spec))))
    assert adapter.layers.keys() == theirs
    assert 0 < len(theirs) < 12
    fill_lora(adapter)
    qk.save_adapter(adapter, tmp_path, qk.BaseRecord.of(base))
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert adapted(opened) == theirs


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layers_to_transform": (0, 3)}, "found 3, and the model has no such block; expected 0"),
        ({"exclude_modules": ("gate_proj",)}, "'gate_proj' excludes no targeted layer"),
        ({"exclude_modules": ("(",)}, "--exclude-modules: '(' is no regular expression"),
        ({"exclude_modules": ("attention", "mlp")}, "leave none of the layers"),
    ],
)
def test_what_names_no_layer_is_refused(
    save_tiny: Callable[..., Path], changes: dict[str, Any], line: str
) -> None:
    base = load_folder(save_tiny("tinyllama", num_hidden_layers=3))
    with pytest.raises(ConfigError) as refused:
        targeted_paths(base.model, LoraSpec(targets=TARGETS, **changes))
    assert line in str(refused.value)


def test_the_head_may_be_excluded_from_all_linear_layers(save_tiny: Callable[..., Path]) -> None:
    """Users of PEFT write it out of habit."""
    model = load_folder(save_tiny()).model
    every = LoraSpec(targets=("all-linear",))
    without = LoraSpec(targets=("all-linear",), exclude_modules=("lm_head",))
    assert targeted_paths(model, without) == targeted_paths(model, every)


def test_a_block_is_the_first_number_behind_two_names() -> None:
    assert block_of("model.layers.11.mlp.experts.3.up_proj") == 11
    assert block_of("encoder.block.0.layer.1.wo") == 0
    assert block_of("score") is None


def test_a_plan_knows_which_blocks_are_trained(save_tiny: Callable[..., Path]) -> None:
    """Of a model with fewer blocks a plan trains the same kinds of layers."""
    folder = save_tiny("tinyllama", num_hidden_layers=5)
    lora = LoraSpec(rank=3, layers_to_transform=(4,), rank_pattern={"4.self_attn.q_proj": 5})
    spec = qk.BaseSpec(qk.find_model(str(folder)), folder, qk.Quantization(4))
    short = spec.skeleton(2)
    found = shortened(lora, spec.skeleton(), short)
    paths = targeted_paths(short, found)
    assert len(paths) == 8
    assert found.rank_of("model.layers.0.self_attn.q_proj") == 5
    plain = LoraSpec(rank=3)
    assert shortened(plain, spec.skeleton(), short) is plain
    subject = Subject(spec, lora, qk.choose_hardware("cpu"), RowSizes(16))
    base = load_folder(folder, 4)
    assert predict(subject, qk.TrainConfig()).trainable == attach(base, lora).trainable

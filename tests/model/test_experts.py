"""A mixture's stacked experts are linear layers like all others, and a stack again in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import difference, plain, save, spec_of
from safetensors import safe_open
from support import relative_error
from tiny_models import OTHERS, fill_lora, load_folder, save_model
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import ModelError
from qlora_kit.export.verify import verify_merge
from qlora_kit.layers.projections import projections, stacks

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
# Stacked alone; transposed, with biases and a gate of its own as well.
KINDS = ("mixtral", "gpt-oss")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), OTHERS[request.param])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_experts_compute_what_their_unpacked_twins_do(folder: Path, bits: int) -> None:
    base = load_folder(folder, bits)
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, each in projections(base.model).items():
            weight = each.frozen.weight.dequantize(torch.float32)
            if not each.is_expert:
                twin.get_submodule(path).weight.copy_(weight)
                continue
            stack_path, _, number = path.rpartition(".")
            stacked = twin.get_parameter(stack_path)[int(number)]
            is_transposed = stacks(base.model)[stack_path].is_transposed
            stacked.copy_(weight.T if is_transposed else weight)
    assert any(each.is_expert for each in projections(base.model).values())
    assert all(each.frozen.weight.bits == bits for each in projections(base.model).values())
    assert relative_error(logits(base.model), logits(twin)) <= 1e-5


@pytest.mark.parametrize("bits", [16, 4])
def test_a_merge_has_its_stacks_again(folder: Path, tmp_path: Path, bits: int) -> None:
    adapter = qk.attach(load_folder(folder, bits), qk.LoraSpec(rank=4))
    fill_lora(adapter, std=0.05)
    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    qk.merge_to(
        tmp_path / "merged", stored, spec_of(folder, bits), make_tokenizer(),
        dtype=torch.float32, check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.mlp.experts.down_proj" in names
    assert not any(".down_proj.0" in name for name in names)
    assert "qlora_kit" not in (tmp_path / "merged" / "config.json").read_text()
    assert difference(adapter, plain(tmp_path / "merged")) <= 1e-5
    again = load_folder(tmp_path / "merged", 16)
    assert relative_error(logits(again.model), logits(adapter.base.model)) <= 1e-5


def test_all_linear_leaves_experts_out(folder: Path) -> None:
    adapter = qk.attach(load_folder(folder, 16), qk.LoraSpec(targets=("all-linear",)))
    assert {path.rsplit(".", 1)[-1] for path in adapter.layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    assert not adapter.stacks


def test_a_checkpoint_of_bitsandbytes_cannot_hold_a_stack(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"keeps its experts stacked .*gate_up_proj.* expected"):
        qk.quantize_to(tmp_path / "q", spec_of(folder, 16), qk.Quantization(4), make_tokenizer())
    assert not (tmp_path / "q").exists()

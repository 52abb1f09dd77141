"""An adapter whose start changed its base: stored for PEFT, and rebuilt bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_twin import transformers_model
from support import relative_error
from tiny_models import SIZES, fill_lora, load_folder, save_model
from torch import Tensor

from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.attach import Adapter, attach
from qlora_kit.lora.files import RECORD, BaseRecord
from qlora_kit.lora.reading import read_adapter
from qlora_kit.lora.several import load_adapters
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.lora.starts.check import check_start
from qlora_kit.lora.starts.loading import FreshStart, stored_start
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.lora.writing import save_adapter
from qlora_kit.model.load import load_base

SPEC = LoraSpec(
    rank=4,
    alpha=10.0,
    targets=("all-linear",),
    rslora=True,
    rank_pattern={"q_proj": 6},
    alpha_pattern={"v_proj": 7.0},
    variant=Variant(init="pissa"),
)


def trained(folder: Path, spec: LoraSpec = SPEC, bits: int = 4) -> Adapter:
    """Return an adapter on a base that is less its start, as if it had been trained."""
    plain = load_folder(folder, bits)
    start = FreshStart(spec, targeted_paths(plain.model, spec), bits=bits, seed=1)
    base = load_base(replace(plain.spec, start=start), plain.hardware)
    adapter = attach(base, spec)
    fill_lora(adapter)
    return adapter


def saved(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    save_adapter(adapter, folder, BaseRecord.of(adapter.base))
    return folder


def logits(model: Any) -> Tensor:
    ids = torch.tensor([[1, 5, 9, 20, 31, 7]])
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def test_the_file_holds_the_trained_adapter_and_its_start_bit_for_bit(
    stories: Path, tmp_path: Path
) -> None:
    adapter = trained(stories)
    stored = read_adapter(saved(adapter, tmp_path / "run"))
    for path, layer in adapter.layers.items():
        assert torch.equal(stored.tensors[path][0], layer.lora_A)
        assert torch.equal(stored.tensors[path][1], layer.lora_B)
        assert all(map(torch.equal, stored.start[path], adapter.start[path]))
        assert stored.scaling_of(path) == layer.scaling
    assert stored.spec.rank == 4


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_is_rebuilt_to_the_same_codes(stories: Path, tmp_path: Path, init: str) -> None:
    spec = replace(SPEC, variant=Variant(init=init))
    adapter = trained(stories, spec)
    folder = saved(adapter, tmp_path / "run")
    plain = load_folder(stories, 4)
    again = load_base(replace(plain.spec, start=stored_start(folder)), plain.hardware)
    loaded = load_adapter(again, folder)
    for path, layer in adapter.layers.items():
        own, other = layer.frozen.weight.stored(), loaded.layers[path].frozen.weight.stored()
        assert all(torch.equal(one[1], two[1]) for one, two in zip(own, other, strict=True))
    assert torch.equal(logits(adapter.base.model), logits(again.model))


def test_peft_opens_it_on_the_original_base(stories: Path, tmp_path: Path) -> None:
    adapter = trained(stories, bits=16)
    folder = saved(adapter, tmp_path / "run")
    theirs = PeftModel.from_pretrained(transformers_model(stories, 16), str(folder))
    assert relative_error(logits(adapter.base.model), logits(theirs)) <= 1e-4


def test_another_base_is_refused(stories: Path, tmp_path: Path) -> None:
    folder = saved(trained(stories), tmp_path / "run")
    with pytest.raises(AdapterError, match="trained from pissa, and the base was not loaded"):
        load_adapter(load_folder(stories, 4), folder)
    with pytest.raises(AdapterError, match="use it by itself"):
        load_adapters(load_folder(stories, 4), {"one": folder})


def test_a_record_that_does_not_fit_its_file_is_refused(stories: Path, tmp_path: Path) -> None:
    spec = LoraSpec(rank=3, targets=("q_proj",))
    adapter = attach(load_folder(stories, 4), spec)
    folder = saved(adapter, tmp_path / "run")
    record = json.loads((folder / RECORD).read_text())
    record["start"] = {"init": "pissa", "alpha": 32.0}
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(AdapterError, match="expected twice the trained rank"):
        read_adapter(folder)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_model_of_transposed_layers_computes_as_before(tmp_path: Path, init: str) -> None:
    numbers = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2,
        "n_head": 4, "n_positions": 64, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.2,
    }  # fmt: skip
    folder = save_model(tmp_path / "gpt2", numbers)
    plain = load_folder(folder)
    spec = LoraSpec(rank=70, alpha=35.0, targets=("all-linear",), variant=Variant(init=init))
    start = FreshStart(spec, targeted_paths(plain.model, spec), bits=16, seed=1)
    base = load_base(replace(plain.spec, start=start), plain.hardware)
    attach(base, spec)
    assert relative_error(logits(base.model), logits(plain.model)) <= 1e-4


@pytest.mark.parametrize(
    ("changes", "bits", "says"),
    [
        ({"init": "loftq"}, 16, "--bits 16 quantises nothing"),
        ({"init": "pissa", "dora": True}, 4, "--dora needs plain ones"),
        ({"init": "eva", "rank_budget": 8}, 4, "--rank-budget needs plain ones"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    stories: Path, changes: dict[str, Any], bits: int, says: str
) -> None:
    base = load_folder(stories, bits)
    spec = replace(SPEC, variant=Variant(**changes))
    with pytest.raises(ConfigError, match=says):
        check_start(spec, base.spec, base.spec.skeleton())


def test_experts_are_refused(tmp_path: Path) -> None:
    numbers = {
        **SIZES, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    base = load_folder(save_model(tmp_path / "mixture", numbers))
    spec = replace(SPEC, targets=("experts",), rank_pattern={}, alpha_pattern={})
    with pytest.raises(ConfigError, match="a stack of experts"):
        check_start(spec, base.spec, base.spec.skeleton())

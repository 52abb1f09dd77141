"""A layer that is trained whole has a place in training, checkpoint, adapter file and merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from peft import PeftModel
from support import relative_error
from tiny_models import load_folder
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import ConfigError
from qlora_kit.train.loop import Saving

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
WHOLE = "model.layers.1.mlp.down_proj"
SPEC = qk.LoraSpec(rank=4, targets=("attention", "up_proj"), whole=(WHOLE,))
ROWS = [
    {"input_ids": row.tolist(), "labels": row.tolist(), "row": index}
    for index, row in enumerate(torch.randint(3, 96, (6, 12)))
]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def options(**changes: Any) -> qk.TrainConfig:
    values = {"batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, **changes}
    return qk.TrainConfig(**values)


@pytest.mark.parametrize("bits", [4, 16])
def test_it_is_trained_saved_merged_and_taken_off(
    save_tiny: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    folder = save_tiny("tinyllama")
    base = load_folder(folder, bits)
    before = logits(base.model)
    adapter = qk.attach(base, SPEC)
    start = adapter.whole[WHOLE].weight.detach().clone()
    assert torch.equal(logits(base.model), before), "it starts as the layer it replaces"
    qk.train_adapter(adapter, ROWS, options(max_steps=3))
    assert relative_error(adapter.whole[WHOLE].weight, start) > 1e-3
    trained = logits(base.model)
    (tmp_path / "adapter").mkdir()
    qk.save_adapter(adapter, tmp_path / "adapter", qk.BaseRecord.of(base))

    again = load_folder(folder, bits)
    qk.load_adapter(again, tmp_path / "adapter")
    assert relative_error(logits(again.model), trained) <= 1e-5
    stored = qk.read_adapter(tmp_path / "adapter")
    qk.merge_to(tmp_path / "merged", stored, base.spec, make_tokenizer(), dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative_error(logits(merged), trained) <= 1e-5
    if bits == 16:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert relative_error(logits(theirs), trained) <= 1e-5

    assert torch.equal(logits(qk.detach(adapter).model), before)


def test_merged_in_memory_it_computes_the_same(save_tiny: Callable[..., Path]) -> None:
    adapter = qk.attach(load_folder(save_tiny("tinyllama"), 4), SPEC)
    qk.train_adapter(adapter, ROWS, options(max_steps=2))
    trained = logits(adapter.base.model)
    assert relative_error(logits(qk.merge(adapter).model), trained) <= 1e-5


def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_tiny("tinyllama")
    found = []
    for resumes in (False, True):
        adapter = qk.attach(load_folder(folder, 4), SPEC)
        record, resume = qk.BaseRecord.of(adapter.base), tmp_path / "checkpoint-2"
        saving = Saving(tmp_path / "second" if resumes else tmp_path, record)
        if resumes:
            saving = Saving(tmp_path / "second", record, resume)
        (tmp_path / "second").mkdir(exist_ok=True)
        qk.train_adapter(adapter, ROWS, options(max_steps=4, save_steps=2), saving=saving)
        found.append({name: p.detach().clone() for name, p in adapter.parameters().items()})
    assert f"{WHOLE}.weight" in found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("path", ["model.layers.0", "model.rotary_emb"])
def test_what_cannot_be_trained_whole_is_refused(save_tiny: Callable[..., Path], path: str) -> None:
    spec = qk.LoraSpec(targets=("attention",), whole=(path,))
    with pytest.raises(ConfigError, match=f"{path}: cannot be trained whole"):
        qk.attach(load_folder(save_tiny("tinyllama"), 4), spec)

"""A run with `--rank-budget` that goes on has the ranks of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import load_folder

import qlora_kit as qk
from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import TokenRows
from qlora_kit.lora.spec import LoraSpec, Variant
from qlora_kit.parallel.one import OneProcess
from qlora_kit.recipe import ranks


def test_the_ranks_of_the_checkpoint_are_taken_and_not_decided_again(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.self_attn.q_proj": 1}
    content = {"peft_type": "LORA", "rank_pattern": stored}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    found: Any = type("Found", (), {"folder": tmp_path})
    monkeypatch.setattr(ranks, "find_checkpoint", lambda *_: found)
    monkeypatch.setattr(ranks, "decided", None)  # calling it would fail
    told: list[Any] = []
    spec = LoraSpec(rank=2, alpha=4.0, targets=("q_proj",), variant=Variant(rank_budget=4))
    base = load_folder(save_tiny("tinyllama"))
    opened: Any = None
    made = ranks.with_decided_ranks(
        spec, base, TokenRows([]), TrainConfig(resume="latest"), opened, tmp_path, told.append,
        OneProcess(),
    )  # fmt: skip
    adapter = qk.attach(base, made)
    assert {path: layer.rank for path, layer in adapter.layers.items()} == stored
    assert {layer.scaling for layer in adapter.layers.values()} == {2.0}
    assert told[0].rows == (("q_proj", "3 1"),)

"""LoRA+: B learns at a multiple of A's rate, as PEFT's own optimiser lets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft_twin import peft_twin, their_loss, twin_parameters
from support import relative_error
from tiny_models import load_folder
from training import make_adapter, make_rows, options, record, weights_of

import qlora_kit as qk
from qlora_kit.data.batch import collate
from qlora_kit.events import Event, StepFinished
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.train.checkpoint import find_checkpoint
from qlora_kit.train.groups import parameter_groups
from qlora_kit.train.loop import Saving
from qlora_kit.train.optimizer import build_optimizer, learning_rate_at

STEPS, RATIO, DECAY = 4, 16.0, 0.1


def config_of(**changes: Any) -> qk.TrainConfig:
    return options(
        loraplus_ratio=RATIO, weight_decay=DECAY, learning_rate=1e-3, max_grad_norm=0.0,
        max_steps=STEPS, scheduler="cosine", **changes,
    )  # fmt: skip


def test_steps_are_those_of_pefts_optimizer(save_tiny: Callable[..., Path]) -> None:
    folder, config = save_tiny(), config_of()
    adapter = make_adapter(folder, bits=16)
    twin = peft_twin(folder, 16, adapter)
    before = weights_of(adapter)
    theirs = create_loraplus_optimizer(
        twin, torch.optim.AdamW, lr=config.learning_rate, loraplus_lr_ratio=RATIO,
        loraplus_weight_decay=DECAY,
    )  # fmt: skip
    highest = [group["lr"] for group in theirs.param_groups]
    rows = make_rows(1)
    batch = collate(rows, 0)
    for step in range(1, STEPS + 1):
        their_loss(twin, batch).backward()
        share = learning_rate_at(step, STEPS, config) / config.learning_rate
        for group, rate in zip(theirs.param_groups, highest, strict=True):
            group["lr"] = rate * share
        theirs.step()
        theirs.zero_grad()
    qk.train_adapter(adapter, rows, config.model_copy(update={"epochs": STEPS}))
    expected = twin_parameters(twin, adapter)
    for name, found in weights_of(adapter).items():
        assert relative_error(found, expected[name]) <= 1e-5
        assert not torch.equal(found, before[name])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged-adamw"])
def test_a_resumed_run_has_the_same_bits_and_tells_the_rate_of_a(
    save_tiny: Callable[..., Path], tmp_path: Path, optimizer: str
) -> None:
    """A rank of 64 gives matrices of 4,096 elements and more, whose state has 8 bits."""
    folder, rows = save_tiny(), make_rows(STEPS)
    config = config_of(optimizer=optimizer)
    whole = make_adapter(folder, rank=64)
    events: list[Event] = []
    qk.train_adapter(whole, rows, config, announce=record(events))
    told = [event.learning_rate for event in events if isinstance(event, StepFinished)]
    assert told == [learning_rate_at(step, STEPS, config) for step in range(1, STEPS + 1)]
    first = make_adapter(folder, rank=64)
    saving = Saving(tmp_path, qk.BaseRecord.of(first.base))
    qk.train_adapter(
        first, rows, config, saving=saving,
        stop_when=lambda e: isinstance(e, StepFinished) and e.optimizer_step == 2,
    )  # fmt: skip
    again = make_adapter(folder, rank=64)
    resume = find_checkpoint(tmp_path, "latest").folder
    assert resume is not None
    qk.train_adapter(
        again, rows, config, saving=Saving(tmp_path, qk.BaseRecord.of(again.base), resume)
    )
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(again)[name], weight), name
    moved = {name[-1]: float((weight - weights_of(again)[name]).abs().max()) for name, weight in
             weights_of(make_adapter(folder, rank=64)).items()}  # fmt: skip
    assert moved["B"] > 4 * moved["A"]


def test_without_a_ratio_there_is_one_group_as_before(save_tiny: Callable[..., Path]) -> None:
    adapter = make_adapter(save_tiny())
    plain = parameter_groups(adapter, options())
    assert [*plain[0]] == ["params"]
    assert plain[0]["params"] == [*adapter.parameters().values()]
    groups = build_optimizer(parameter_groups(adapter, config_of()), config_of()).param_groups
    assert [group.get("rate_ratio") for group in groups] == [None, RATIO]


def test_the_head_of_a_classifier_learns_at_the_rate_of_a(save_tiny: Callable[..., Path]) -> None:
    """Its bias learns as B does, and does not decay, as in PEFT."""
    folder = save_tiny("qwen2.5-7b")
    spec = LoraSpec(targets=("k_proj",), whole=("model.layers.0.self_attn.q_proj",))
    adapter = qk.attach(load_folder(folder), spec)
    groups = parameter_groups(adapter, config_of())
    whole = adapter.whole["model.layers.0.self_attn.q_proj"]
    assert [[*group][1:] for group in groups] == [
        [],
        ["rate_ratio"],
        ["rate_ratio", "weight_decay"],
    ]
    assert any(each is whole.weight for each in groups[0]["params"])
    assert groups[2]["params"] == [whole.bias]
    assert groups[2]["weight_decay"] == 0

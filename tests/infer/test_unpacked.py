"""Weights that stay unpacked while a model answers: the same bits, and only where there is room."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qlora_kit as qk
from qlora_kit.events import Event, Notice
from qlora_kit.infer import unpacked
from qlora_kit.infer.unpacked import keep_unpacked
from qlora_kit.layers.weight import FrozenWeight

IDS = torch.arange(3, 40)[None]


def opened(bits: int) -> qk.Base:
    options = qk.BaseModelOptions(model="demo", bits=bits, device="cpu", dtype="float32")
    base = qk.open_base(options).base
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)))
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    return base


@torch.inference_mode()
def logits(base: qk.Base) -> Tensor:
    found: Tensor = base.model(input_ids=IDS).logits
    return found


def kept(base: qk.Base) -> list[FrozenWeight]:
    weights = [each for each in base.model.modules() if isinstance(each, FrozenWeight)]
    return [weight for weight in weights if weight.kept_dtype is not None]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_no_bit_of_an_answer_changes(bits: int) -> None:
    base = opened(bits)
    expected = logits(base)
    told: list[Event] = []
    keep_unpacked(base, told.append)
    assert torch.equal(logits(base), expected)
    weights = kept(base)
    size = sum(weight.shape[0] * weight.shape[1] for weight in weights) * 4
    assert weights
    assert told == [
        Notice(f"the weights stay unpacked while it answers, in {size / 1e6:,.1f} MB more")
    ]


def test_where_memory_has_no_room_they_are_unpacked_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = opened(4)
    keep_unpacked(base, lambda event: None)
    size = sum(weight.shape[0] * weight.shape[1] for weight in kept(base)) * 4
    for free, is_kept in ((2 * size - 2, False), (2 * size, True)):
        base = opened(4)
        monkeypatch.setattr(unpacked, "free_bytes", lambda device, free=free: free)
        keep_unpacked(base, lambda event: None)
        assert bool(kept(base)) == is_kept

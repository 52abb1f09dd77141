"""Samples in one row are as if alone, in every architecture of `configs/` that can be packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from tiny_models import NAMES, fill_lora, load_folder

from qlora_kit.data.batch import Batch, collate, collate_packed
from qlora_kit.lora.attach import LoraSpec, attach
from qlora_kit.model.head import head_of
from qlora_kit.model.segments import agrees_packed, why_not_packed
from qlora_kit.tasks.causal import loss_sum


def rows(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(len(lengths))
    made = []
    for row, length in enumerate(lengths):
        ids = torch.randint(3, 96, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]], "row": row})
    return made


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_samples_alone(
    folder_of: Callable[[str], Path], name: str
) -> None:
    samples = rows(21, 13, 5, 30, 1)
    adapter = attach(load_folder(folder_of(name)), LoraSpec(rank=3, targets=("all-linear",)))
    fill_lora(adapter, std=0.05)
    model = adapter.base.model.train()
    assert why_not_packed(model, 30) is None
    assert agrees_packed(model)

    def found(batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = sum(loss_sum(model, batch, head_of(model), chunk_tokens=7) for batch in batches)
        total.backward()
        return total.item(), [each.grad.clone() for each in adapter.parameters().values()]

    loss, grads = found([collate_packed(samples, 0, lambda tokens: tokens + 3)])
    own_loss, own_grads = found(
        [collate([sample], 0) for sample in samples if len(sample["input_ids"]) > 1]
    )
    assert loss == pytest.approx(own_loss, rel=1e-6)
    for grad, own in zip(grads, own_grads, strict=True):
        assert relative_error(grad, own) <= 1e-5

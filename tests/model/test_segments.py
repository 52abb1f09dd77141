"""Samples in one row are as if alone, in every architecture of `configs/` that can be packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from tiny_models import NAMES, fill_lora, load_folder

from qlora_kit.data.batch import Batch, collate, collate_packed
from qlora_kit.lora.attach import attach
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.head import head_of
from qlora_kit.model.segments import agrees_packed, why_not_packed
from qlora_kit.tasks.causal import CAUSAL, loss_sum
from qlora_kit.tasks.tokens import packing


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


def test_a_real_model_computes_real_samples_as_if_alone(smollm2: Path, assets: Path) -> None:
    """Losses of each sample, and the gradients of a step: SmolLM2 on rows of alpaca."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    records = json.loads((assets / "data" / "alpaca_en_demo.json").read_text())[:5]
    samples = []
    for number, record in enumerate(records):
        prompt, answer = (
            tokenizer(record[name], add_special_tokens=False)["input_ids"][:60]
            for name in ("instruction", "output")
        )
        labels = [-100] * len(prompt) + answer
        samples.append({"input_ids": prompt + answer, "labels": labels, "row": number})
    adapter = attach(load_folder(smollm2, 16), LoraSpec(rank=4, targets=("attention",)))
    fill_lora(adapter, std=0.02)
    objective = CAUSAL.objective(adapter.base, 0, 64, None)

    def found(objective: Any, batches: list[Batch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = adapter.base.model.eval()
        losses = [objective.row_sums(each, objective.measured(each)).loss for each in batches]
        model.train().zero_grad()
        sum(objective.loss_sum(batch) for batch in batches).backward()
        return torch.cat(losses), [each.grad.clone() for each in adapter.parameters().values()]

    together, grads = found(packing(objective), [collate_packed(samples, 0)])
    alone, own = found(objective, [collate([sample], 0) for sample in samples])
    assert torch.allclose(together, alone, rtol=1e-5, atol=0)
    for grad, other in zip(grads, own, strict=True):
        assert relative_error(grad, other) <= 1e-5

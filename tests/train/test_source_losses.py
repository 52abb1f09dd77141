"""The training loss of each source: the sums of its rows, and no other bit of the run changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import losses, make_adapter, make_rows, options, record, weights_of

import qlora_kit as qk
from qlora_kit.data.batch import NamedSources, TokenRows
from qlora_kit.events import Event, StepFinished
from qlora_kit.infer.evaluate import evaluate
from qlora_kit.layers.loss import cross_entropy_sum

Tiny = Callable[..., Path]
OF = ("a.jsonl", "b.jsonl", "none.jsonl")


def rows_of(count: int, *, weighted: bool = False) -> TokenRows:
    """Rows of which the first two thirds are of the first source; the last source has none."""
    rows = make_rows(count)
    if weighted:
        rows = [
            {**row, "loss_weights": [0.5 + row["row"] % 3] * len(row["input_ids"])} for row in rows
        ]
    return TokenRows(rows, sources=NamedSources(OF, (count * 2 // 3, count, count)))


def taken(adapter: qk.Adapter, rows: Any, **changes: Any) -> list[StepFinished]:
    events: list[Event] = []
    qk.train_adapter(adapter, rows, options(**changes), announce=record(events))
    return [event for event in events if isinstance(event, StepFinished)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_the_losses_of_sources_are_those_of_their_rows(
    save_tiny: Tiny, packing: bool, weighted: bool
) -> None:
    """A learning rate of almost nothing: an evaluation after the step sees the same weights."""
    adapter = make_adapter(save_tiny())
    rows = rows_of(12, weighted=weighted)
    changes = {"batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 1}
    (step,) = taken(adapter, rows, packing=packing, learning_rate=1e-12, **changes)
    assert [*step.sources] == ["a.jsonl", "b.jsonl"]
    for name, span in (("a.jsonl", range(8)), ("b.jsonl", range(8, 12))):
        found = evaluate(adapter.base, [rows[index] for index in span], batch_size=2)
        loss, weight = step.sources[name]
        assert loss / weight == pytest.approx(found.loss, rel=1e-5)
    total, weight = (sum(each) for each in zip(*step.sources.values(), strict=True))
    assert weight == (step.loss_weight or step.weight)
    assert total / weight == pytest.approx(step.loss, rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_telling_them_changes_no_bit(save_tiny: Tiny, packing: bool) -> None:
    found = []
    for rows in (rows_of(20), TokenRows(make_rows(20))):
        adapter = make_adapter(save_tiny(), dropout=0.2)
        steps = taken(
            adapter, rows, packing=packing, batch_size=2, gradient_accumulation_steps=2, max_steps=6
        )
        found.append((losses([*steps]), [step.grad_norm for step in steps], weights_of(adapter)))
    (told_losses, told_norms, told), (own_losses, own_norms, own) = found
    assert (told_losses, told_norms) == (own_losses, own_norms)
    assert all(torch.equal(told[name], each) for name, each in own.items())


def test_a_loss_of_ones_own_is_not_divided(save_tiny: Tiny) -> None:
    events: list[Event] = []
    qk.train_adapter(
        make_adapter(save_tiny()), rows_of(12), options(max_steps=1), announce=record(events),
        loss=lambda logits, targets: torch.nn.functional.cross_entropy(
            logits, targets, reduction="sum"
        ),
    )  # fmt: skip
    (step,) = (event for event in events if isinstance(event, StepFinished))
    assert step.sources == {}


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_each_token_is_what_it_adds_to_the_sum(save_tiny: Tiny, weighted: bool) -> None:
    from qlora_kit.model.head import head_of

    model = make_adapter(save_tiny()).base.model
    head = head_of(model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, model.config.hidden_size, generator=generator)
    targets = torch.randint(0, model.config.vocab_size, (11,), generator=generator)
    weights = torch.rand(11, generator=generator) if weighted else None
    told = torch.empty(11, dtype=torch.float64)
    total = cross_entropy_sum(hidden, targets, head, 4, weights, told)
    assert total == cross_entropy_sum(hidden, targets, head, 4, weights)
    for token in range(11):
        own = slice(token, token + 1)
        alone = cross_entropy_sum(
            hidden[own], targets[own], head, 4, None if weights is None else weights[own]
        )
        assert float(told[token]) == pytest.approx(float(alone), rel=1e-5)

"""A run on weighted rows: its loss and gradients are those of plain autograd, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from tiny_models import fill_lora
from torch import Tensor
from training import losses, make_adapter, make_rows, options, record, weights_of

import qlora_kit as qk
from qlora_kit.data.batch import Row, collate, collate_packed
from qlora_kit.data.encode import LOSS_WEIGHTS
from qlora_kit.errors import ConfigError
from qlora_kit.events import StepFinished
from qlora_kit.infer.evaluate import evaluate
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.tokens import packing
from qlora_kit.tasks.tokens import weighted as with_weights
from qlora_kit.train.loop import Saving
from qlora_kit.train.optimizer_step import OptimizerStep

Tiny = Callable[..., Path]


def weighted(rows: list[dict[str, Any]], seed: int = 3) -> list[dict[str, Any]]:
    """Give the tokens of two rows of three weights: fractions, whole numbers and ones."""
    generator = torch.Generator().manual_seed(seed)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        drawn = torch.randint(0, 3, (length,), generator=generator)
        values = torch.tensor([1.0, 0.3, 4.0])[drawn]
        row[LOSS_WEIGHTS] = None if number % 3 == 0 else values.tolist()
    return rows


def twin(adapter: qk.Adapter, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, int]:
    """Return loss and hits, summed by weight over rows one by one, the weights' sum, by torch."""
    loss, hits, total = torch.zeros(()).double(), torch.zeros(()).double(), 0.0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
        logits = adapter.base.model(input_ids=ids[None]).logits[0, :-1].double()
        weights = torch.tensor(row[LOSS_WEIGHTS] or [1.0] * len(ids)).double()[1:]
        weights = weights * (labels != -100)
        loss = loss + (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
        hits += ((logits.argmax(1) == labels) * weights).sum()
        total += float(weights.sum())
    return loss, hits, total  # type: ignore[return-value]


def gradients(adapter: qk.Adapter) -> Tensor:
    """Return the gradients of all parameters in one vector, and take them away."""
    parameters = adapter.parameters().values()
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize("packs", [False, True])
def test_loss_and_gradients_are_those_of_autograd(save_tiny: Tiny, packs: bool) -> None:
    adapter, rows = make_adapter(save_tiny(), bits=16), weighted(make_rows(7))
    fill_lora(adapter, std=0.05)
    expected, _, total = twin(adapter, rows)
    (expected / total).backward()
    wanted = gradients(adapter)
    objective = CAUSAL.objective(adapter.base, 0, 5, None)
    batch = (packing(objective) if packs else objective).batch(rows)
    assert batch.weight == pytest.approx(total, rel=1e-7)
    assert batch.units == sum(label != -100 for row in rows for label in row["labels"][1:])
    loss = objective.loss_sum(batch)
    (loss / batch.weight).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert relative_error(gradients(adapter), wanted) <= 1e-6


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_of_an_evaluation_is_the_weighted_mean(save_tiny: Tiny, batch_size: int) -> None:
    adapter, rows = make_adapter(save_tiny(), bits=16), weighted(make_rows(7))
    with torch.no_grad():
        loss, hits, total = twin(adapter, rows)
    found = evaluate(adapter.base, rows, batch_size=batch_size)
    assert found.loss == pytest.approx(float(loss) / total, rel=1e-6)
    assert found.metrics["token_accuracy"] == pytest.approx(float(hits) / total, rel=1e-9)
    assert found.weight == sum(label != -100 for row in rows for label in row["labels"][1:])


def trained(
    folder: Path, rows: list[dict[str, Any]], **changes: Any
) -> tuple[list[StepFinished], dict[str, Tensor]]:
    events: list[Any] = []
    adapter = make_adapter(folder)
    config = options(**{"batch_size": 2, "gradient_accumulation_steps": 4, **changes})
    qk.train_adapter(adapter, rows, config, announce=record(events))
    return [event for event in events if isinstance(event, StepFinished)], weights_of(adapter)


def test_a_run_does_not_depend_on_how_its_steps_are_cut(save_tiny: Tiny) -> None:
    folder, rows = save_tiny(), weighted(make_rows(20))
    plain, weights = trained(folder, rows)
    packed, others = trained(folder, rows, packing=True)
    assert losses([*packed]) == pytest.approx(losses([*plain]), rel=1e-5)
    for name, weight in weights.items():
        assert relative_error(others[name], weight) <= 1e-3, name
    for one, other in zip(plain, packed, strict=True):
        assert one.weight == other.weight
        assert one.loss_weight == pytest.approx(other.loss_weight, rel=1e-12)
    unweighted, _ = trained(folder, make_rows(20))
    assert [event.weight for event in unweighted] == [event.weight for event in plain]
    assert {event.loss_weight for event in unweighted} == {None}
    assert losses([*unweighted]) != pytest.approx(losses([*plain]), rel=1e-3)


def test_weights_that_are_all_alike_change_nothing(save_tiny: Tiny) -> None:
    folder, rows = save_tiny(), make_rows(12)
    plain, weights = trained(folder, rows)
    for row in rows:
        row[LOSS_WEIGHTS] = [1.0] * len(row["input_ids"])
    ones, same = trained(folder, rows)
    assert losses([*ones]) == losses([*plain])
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    for row in rows:
        row[LOSS_WEIGHTS] = [8.0] * len(row["input_ids"])
    eights, near = trained(folder, rows)
    assert losses([*eights]) == pytest.approx(losses([*plain]), rel=1e-6)
    for name, weight in weights.items():
        assert relative_error(near[name], weight) <= 1e-4, name


def test_memory_that_runs_out_does_not_change_the_step(
    save_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = save_tiny(), weighted(make_rows(8))
    expected, _ = trained(folder, rows, batch_size=4, max_steps=2)
    real = CAUSAL.objective.loss_sum  # type: ignore[attr-defined]

    def short(objective: Any, batch: Any) -> Any:
        if len(batch.lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(objective, batch)

    monkeypatch.setattr(CAUSAL.objective, "loss_sum", short)
    found, _ = trained(folder, rows, batch_size=4, max_steps=2)
    assert losses([*found]) == pytest.approx(losses([*expected]), rel=1e-5)


@pytest.mark.parametrize("packs", [False, True])
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    save_tiny: Tiny, tmp_path: Path, packs: bool
) -> None:
    folder, rows, found = save_tiny(), weighted(make_rows(12)), []
    for name, resume in (("whole", None), ("part", tmp_path / "whole" / "checkpoint-2")):
        adapter = make_adapter(folder, dropout=0.2)
        (tmp_path / name).mkdir()
        saving = Saving(tmp_path / name, qk.BaseRecord.of(adapter.base), resume)
        config = options(
            max_steps=4, save_steps=2, batch_size=2, gradient_accumulation_steps=2, packing=packs
        )
        qk.train_adapter(adapter, rows, config, saving=saving)
        found.append(weights_of(adapter))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_loss_of_ones_own_does_not_go_with_weights(save_tiny: Tiny) -> None:
    def own(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="sum")

    adapter = make_adapter(save_tiny())
    with pytest.raises(ConfigError, match=r"^loss: the rows have weights, and a loss of your own"):
        qk.train_adapter(adapter, weighted(make_rows(6)), options(), loss=own)
    assert qk.train_adapter(adapter, make_rows(6), options(max_steps=1), loss=own).last_loss > 0


@pytest.mark.parametrize("lay", [collate, collate_packed])
@pytest.mark.parametrize("width", [None, lambda tokens: tokens + 9])
def test_each_token_of_a_batch_has_its_own_weight(lay: Any, width: Any) -> None:
    rows: list[Row] = weighted(make_rows(5))  # type: ignore[assignment]
    batch = lay(rows, 0, width)
    expected = [
        1.0 if row[LOSS_WEIGHTS] is None else row[LOSS_WEIGHTS][at]
        for row in rows
        for at, label in enumerate(row["labels"])
        if at and label != -100
    ]
    torch.testing.assert_close(batch.weights, torch.tensor(expected))
    assert lay(rows[:1], 0, width).weights is None  # its tokens all have 1
    assert isinstance(lay(rows[:1], 0, width).weight, int)


def test_the_batches_that_a_plan_runs_have_weights_too(save_tiny: Tiny) -> None:
    objective = CAUSAL.objective(make_adapter(save_tiny()).base, 0, 5, None)
    for each in (objective, packing(objective)):
        assert each.stand_in(2, 9).weights is None  # type: ignore[attr-defined]
        stands_in: Any = with_weights(each).stand_in(2, 9)
        assert stands_in.weights.shape == (stands_in.units,) == (16,)


def test_a_step_divides_by_the_weights_of_all_its_micro_batches(save_tiny: Tiny) -> None:
    adapter, rows = make_adapter(save_tiny(), bits=16), weighted(make_rows(6))
    fill_lora(adapter, std=0.05)
    with torch.no_grad():
        loss, _, total = twin(adapter, rows)
    found: list[float] = []

    def look(step: OptimizerStep) -> None:
        with step.undone():
            found.append(step.take([(0, 1), (2, 3), (4, 5)], 1e-3).loss)

    qk.train_adapter(adapter, rows, options(max_steps=1), before_first_step=look)
    assert found == [pytest.approx(float(loss) / total, rel=1e-6)]

"""NaN and infinity in losses and gradients: skipped, logged, and never in a weight."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qlora_kit as qk
from qlora_kit.errors import LearningError, NumericsError
from qlora_kit.events import Event, StepFinished, StepSkipped, announce_to
from qlora_kit.report.log import Log
from qlora_kit.tasks.causal import CausalObjective
from qlora_kit.train.checkpoint import find_checkpoint
from qlora_kit.train.loop import Saving

from .children import spread
from .loops import are_equal, make_adapter, make_rows, options, weights_of
from .runs import Sample, log_rows
from .table import Row, row_of

_PROMISE = "NaN and infinity: skipped, logged with rows, never in a weight"
_VALUES = (math.nan, math.inf, -math.inf)
_MICRO_BATCHES = 2
_TOO_MANY = 3


@dataclass(frozen=True)
class Case:
    """Numbers that are not finite, in consecutive steps of a run of eight.

    Attributes:
        value: the number.
        place: the loss of a micro-batch, or its gradient.
        first_step: the first step with the number.
        in_a_row: number of steps with it.
        micro_batch: number of the micro-batch in the step.
        seed: part of the name of the case's folder.
    """

    value: float
    place: str
    first_step: int
    in_a_row: int
    micro_batch: int
    seed: int

    @property
    def steps(self) -> range:
        return range(self.first_step, self.first_step + self.in_a_row)


def numerics(sample: Sample, count: int, seed: int) -> Row:
    """Make `count` runs with numbers that are not finite, and runs that cannot learn."""
    cases = [_case(seed + n, n) for n in range(count)]
    tasks: list[Callable[[], list[str]]] = [partial(_injected, sample, case) for case in cases]
    tasks += [partial(_not_learning, sample, how) for how in _NOT_LEARNING]
    tasks += [partial(_loss_scaling, sample)]
    results = spread(lambda task: task(), tasks, sample.folder / "numerics")
    number = sum(case.in_a_row for case in cases)
    detail = f"{number} in {count} runs, up to three steps in a row; three that learn nothing"
    return row_of(_PROMISE, results, f"{detail}; overflows of float16")


def _case(seed: int, number: int) -> Case:
    chance = random.Random(seed)
    return Case(
        value=_VALUES[number % len(_VALUES)],
        place="loss" if number % 2 else "gradient",
        first_step=chance.randint(1, 6),
        in_a_row=number % _TOO_MANY + 1,
        micro_batch=chance.randrange(_MICRO_BATCHES),
        seed=seed,
    )


# ---------------------------------------------------------------- not finite


def _injected(sample: Sample, case: Case) -> list[str]:
    output = sample.folder / "numerics" / f"run-{case.seed}"
    output.mkdir()
    adapter = make_adapter(sample.model, dropout=0.1)
    hit_rows, events, weights = _hit(case), [], [weights_of(adapter)]

    def listen(event: Event) -> None:
        if isinstance(event, StepFinished | StepSkipped):
            events.append(event)
            weights.append(weights_of(adapter))

    saving = Saving(output, qk.BaseRecord.of(adapter.base))
    announce = announce_to((Log(output), listen))
    try:
        qk.train_adapter(adapter, make_rows(), options(), saving=saving, announce=announce)
        ended_well = True
    except NumericsError as error:
        ended_well = error.exit_code != 4
    finally:
        CausalObjective.loss_sum = _REAL_LOSS_SUM  # type: ignore[method-assign]
    wrong = [] if ended_well == (case.in_a_row < _TOO_MANY) else ["ended as it should not"]
    wrong += _wrong_log(case, output, hit_rows)
    skipped = [event.optimizer_step for event in events if isinstance(event, StepSkipped)]
    if skipped != list(case.steps):
        wrong.append(f"skipped {skipped}")
    for step in case.steps:
        if not are_equal(weights[step - 1], weights[step]):
            wrong.append(f"step {step} changed the weights")
    if not all(torch.isfinite(t).all() for found in weights for t in found.values()):
        wrong.append("a weight is not finite")
    wrong += _wrong_checkpoint(output, weights[-1])
    shutil.rmtree(output)
    return [f"{case}: {fault}" for fault in wrong]


_REAL_LOSS_SUM = CausalObjective.loss_sum


def _hit(case: Case) -> dict[int, list[int]]:
    """Make the loss or a gradient of some micro-batches not finite; return their rows by step."""
    rows: dict[int, list[int]] = {}
    calls = 0

    def loss_sum(self: CausalObjective, batch: Any) -> Tensor:
        nonlocal calls
        step, micro_batch = calls // _MICRO_BATCHES + 1, calls % _MICRO_BATCHES
        calls += 1
        summed = _REAL_LOSS_SUM(self, batch)
        if step not in case.steps:
            return summed
        # The norm does not tell which rows the gradient is from, so all rows of the step are named.
        if micro_batch == case.micro_batch or case.place == "gradient":
            rows.setdefault(step, []).extend(batch.rows)
        if micro_batch != case.micro_batch:
            return summed
        if case.place == "loss":
            return summed + case.value
        trained = [each for each in self.base.model.parameters() if each.requires_grad]
        _add_once(trained[-1], case.value)
        return summed

    CausalObjective.loss_sum = loss_sum  # type: ignore[method-assign]
    return rows


def _add_once(parameter: Tensor, value: float) -> None:
    """Add a number to the next gradient of a parameter, and to no later one."""
    values = [value]
    parameter.register_hook(lambda grad: grad + values.pop() if values else grad)


def _wrong_log(case: Case, output: Path, hit_rows: dict[int, list[int]]) -> list[str]:
    rows = [row for row in log_rows(output) if "rows" in row]
    wrong = []
    for step, row in zip(case.steps, rows, strict=False):
        if row["optimizer_step"] != step or row["rows"] != sorted(hit_rows[step]):
            wrong.append(f"logged rows {row['rows']} of step {step}; expected {hit_rows[step]}")
        number = row["loss"] if case.place == "loss" else row["grad_norm"]
        # The norm of an infinite gradient has no sign.
        allowed = {str(case.value)} if case.place == "loss" else {"nan", "inf"}
        if number not in allowed:
            wrong.append(f"logged {number}")
    if len(rows) != case.in_a_row:
        wrong.append(f"{len(rows)} rows logged")
    return wrong


def _wrong_checkpoint(output: Path, weights: dict[str, Tensor]) -> list[str]:
    """Return the faults of the last checkpoint: it must load, with the run's last weights."""
    from qlora_kit.lora.reading import read_adapter

    folder = find_checkpoint(output, "latest").folder
    if folder is None:
        return ["no checkpoint"]
    stored = read_adapter(folder).tensors
    matrices = [tensor for pair in stored.values() for tensor in pair]
    ours = sorted(float(tensor.double().sum()) for tensor in weights.values())
    if ours != sorted(float(tensor.double().sum()) for tensor in matrices):
        return ["the checkpoint holds other weights"]
    return []


# ---------------------------------------------------------------- learning nothing


def _zero_one_gradient(adapter: Any) -> None:
    layer = list(adapter.layers.values())[3]
    layer.lora_B.register_hook(torch.zeros_like)


def _detach_one_layer(adapter: Any) -> None:
    layer = list(adapter.layers.values())[3]
    layer.register_forward_hook(lambda module, inputs, output: output.detach())


def _freeze_one_matrix(adapter: Any) -> None:
    list(adapter.layers.values())[3].lora_B.requires_grad_(False)


_NOT_LEARNING = (_zero_one_gradient, _detach_one_layer, _freeze_one_matrix)


def _not_learning(sample: Sample, how: Callable[[Any], None]) -> list[str]:
    adapter = make_adapter(sample.model)
    how(adapter)
    try:
        qk.train_adapter(adapter, make_rows(), options(recompute=False))
    except LearningError:
        return []
    return [f"{how.__name__}: nobody said that it learns nothing"]


# ---------------------------------------------------------------- float16


def _loss_scaling(sample: Sample) -> list[str]:
    """Overflows halve the scale, count as no skipped step, and resume with the same bits."""
    folder = sample.folder / "numerics" / "float16"
    whole, losses = _scaled_run(sample, folder / "whole", None)
    wrong = []
    scales = [_scale_of(folder / "whole" / f"checkpoint-{step}") for step in range(1, 9)]
    if not any(later < earlier for earlier, later in pairwise(scales)):
        wrong.append(f"float16: the scale never fell: {scales}")
    if any("rows" in row for row in log_rows(folder / "whole")):
        wrong.append("float16: an overflow was logged as a skipped step")
    for step in (2, 5):
        again, rest = _scaled_run(
            sample, folder / f"at-{step}", folder / "whole" / f"checkpoint-{step}"
        )
        if not are_equal(whole, again) or rest != losses[step:]:
            wrong.append(f"float16: resumed at {step} it has other bits")
    return wrong


def _scaled_run(
    sample: Sample, output: Path, resume: Path | None
) -> tuple[dict[str, Tensor], list[float]]:
    output.mkdir(parents=True)
    adapter = make_adapter(sample.model, dropout=0.1, dtype=torch.float16)
    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepFinished):
            losses.append(event.loss)
            # The fourth step overflows, whether the run was resumed before it or not.
            if event.optimizer_step == 3:
                _add_once(next(iter(adapter.layers.values())).lora_B, math.inf)

    saving = Saving(output, qk.BaseRecord.of(adapter.base), resume)
    announce = announce_to((Log(output), listen))
    qk.train_adapter(adapter, make_rows(), options(), saving=saving, announce=announce)
    return weights_of(adapter), losses


def _scale_of(checkpoint: Path) -> float:
    from qlora_kit.train.checkpoint import read_state

    return float(read_state(checkpoint).scaler["scale"])

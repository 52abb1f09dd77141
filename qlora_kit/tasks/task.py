"""The questions that training and evaluation ask a task.

A `Task` is known before any weight is read. Bound to a loaded base it is an `Objective`, which
turns rows into batches, and a batch into a sum to minimise and sums to report. They are sums over
the units that the task weighs (supervised tokens, rows, …), never means: only the caller knows the
total weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from qlora_kit.data.asking import Asks, TextAsker
from qlora_kit.data.tokens import MakesRows
from qlora_kit.model.class_head import ClassHead
from qlora_kit.model.load import Base


class Batch(Protocol):
    """One micro-batch of some task."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Index of the source sample of each row."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        ...

    @property
    def lengths(self) -> tuple[Any, ...]:
        """Tokens of each row, without padding; where rows have sources, of source and target."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        ...

    @property
    def units(self) -> int:
        """Number of units that the loss is a sum over, such as supervised tokens."""
        ...

    @property
    def weight(self) -> float:
        """Sum of their weights, by which the loss is divided: without weights, their number."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on `device`."""
        ...


class RowSums(NamedTuple):
    """The sums of each row of a batch; every tensor is (B,), fp64, in host memory.

    Attributes:
        weight: the weights of a row's units, such as supervised tokens, summed: their number, where
            all count alike.
        loss: the loss of a row, summed by these weights.
        metrics: the metrics of a row, summed by these weights, by the names of `Task.metrics`.
        outputs: a tensor for each row, what `Objective.figures` works on; None if it needs nothing.
        units: number of a row's units; None if it is `weight`.
    """

    weight: Tensor
    loss: Tensor
    metrics: Mapping[str, Tensor]
    outputs: Sequence[Tensor] | None = None
    units: Tensor | None = None


class Objective(Protocol):
    """A task on a loaded base. It takes the batches that it makes, and no others."""

    @property
    def base(self) -> Base:
        """The loaded base, with or without an adapter."""
        ...

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Return token rows as one micro-batch, in host memory."""
        ...

    def stand_in(
        self, rows: int, tokens: int, weight: int | None = None, answer_tokens: int | None = None
    ) -> Batch:
        """Return a batch without data that needs the memory and time of a real one of its size.

        Args:
            rows: B.
            tokens: tokens of each row.
            weight: units of the batch; None: the most that a batch of this size can have.
            answer_tokens: tokens of each target, where `tokens` are those of a source; None: as
                many. Of no meaning where rows have no sources.
        """
        ...

    def loss_sum(self, batch: Any) -> Tensor:
        """Return the summed loss of a batch, a scalar, differentiable in the trained parameters."""
        ...

    def measured(self, batch: Any) -> Any:
        """Measure a batch without gradient; the result stays on the model's device."""
        ...

    def row_sums(self, batch: Any, measured: Any) -> RowSums:
        """Sum the result of `measured` by row.

        Args:
            batch: the batch that was measured.
            measured: the result of `measured` for it.
        """
        ...

    def figures(self, outputs: Sequence[Tensor], rows: Sequence[Mapping[str, Any]]) -> Figures:
        """Return what no sum over rows gives, such as a macro-F1, where outputs were kept."""
        ...


class TellsUnits(Objective, Protocol):
    """An objective that can tell the loss of each unit, at no more than the cost of their sum.

    It cannot with a custom loss, which is a sum by itself.
    """

    def rows_of(self, batch: Any) -> Tensor:
        """Return the number of the row, in its batch, of each unit, (N,) int64, in host memory."""
        ...

    def weights_of(self, batch: Any) -> Tensor:
        """Return the weight of each unit, (N,) fp64, in host memory."""
        ...

    def loss_by_unit(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the very sum of `loss_sum`, and what each unit adds to it, (N,), detached."""
        ...


@runtime_checkable
class MeasuresSteps(Protocol):
    """An objective that measures more of a training step than its loss.

    It may also need sums over all batches of a step before it computes the first of them.
    """

    @property
    def step_metrics(self) -> tuple[str, ...]:
        """The names of what is measured, as means over the weight."""
        ...

    def step_figures(self, batches: Sequence[Any]) -> tuple[float, ...]:
        """Return what has to be summed over all batches of a step, in all processes."""
        ...

    def within_step(self, batch: Any, figures: Sequence[float]) -> Any:
        """Return a batch that knows these sums."""
        ...

    def loss_and_metrics(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the summed loss, as `Objective.loss_sum` does, and the sums of `step_metrics`."""
        ...


def drawn_rows(batch: Any, indices: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers by which dropout draws the mask of each sequence of a batch.

    Args:
        batch: the batch.
        indices: the numbers of its rows.
    """
    of_each: int = getattr(batch, "sequences_a_row", 1)
    return tuple(of_each * row + number for number in range(of_each) for row in indices)


Figures = Mapping[str, Any]
"""Figures by name: numbers, and tables of them."""


@dataclass(frozen=True)
class Task:
    """The meaning of a sample.

    Attributes:
        name: the name of the task.
        loads: the class of transformers that a base is loaded as.
        peft_type: `task_type` of PEFT's adapter_config.json.
        makes: how a sample becomes token rows.
        weighs: the key of what its loss is a mean over, such as "supervised_tokens".
        unit: the unit of the loss, in words.
        metrics: the format of each metric beside the loss, by name. A metric is a mean over the
            weight, or a figure of all rows together.
        of_loss: computes the figures that follow from the loss: value and format, by name.
        generates: whether the models of the task write text.
        objective: binds the task to a loaded base. Takes the base, the id that fills short rows,
            the tokens whose logits exist at one time, and a custom loss or None.
        classes: meaning of the outputs of a classifier; None for other models.
        asks: how a prompt becomes the ids that generation begins with. Takes the tokenizer, and the
            most tokens of a source or None.
        has_sources: whether a row is a source and a target, each with a width of its own.
        tells_units: whether its objective is a `TellsUnits`.
        packs: whether its samples can lie end to end in one row, where the model allows it. Then
            its objective has a field `packs`.
        refers: whether its rows need to know what the model says of them before it is trained, see
            `tasks.preference`.
    """

    name: str
    loads: str
    peft_type: str
    makes: MakesRows
    weighs: str
    unit: str
    metrics: Mapping[str, str]
    of_loss: Callable[[float], Mapping[str, tuple[float, str]]]
    generates: bool
    objective: Callable[[Base, int, int, Any], Objective]
    classes: ClassHead | None = None
    asks: Callable[[Any, int | None], Asks] = TextAsker
    has_sources: bool = False
    packs: bool = False
    tells_units: bool = False
    refers: bool = False

"""What every task answers, and what training and evaluation ask it.

A `Task` is a choice, known before any weight is read. Bound to a loaded base it is an `Objective`:
rows become batches, batches become a sum to minimise and sums to report. All are sums over what
the task weighs (supervised tokens, rows, …), never means: who calls knows how much there is in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

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
    def longest(self) -> int:
        """Tokens of the longest row."""
        ...

    @property
    def weight(self) -> int:
        """What its loss is a sum over, counted."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the batch where the model computes."""
        ...


class RowSums(NamedTuple):
    """What was measured of each row of a batch: all (B,), fp64, in host memory.

    Attributes:
        weight: what the row's sums are over, counted.
        loss: summed.
        metrics: sums by the names of `Task.metrics`.
        outputs: what `Objective.figures` asks for of each row, (B, M), of any dtype; or None.
    """

    weight: Tensor
    loss: Tensor
    metrics: Mapping[str, Tensor]
    outputs: Tensor | None = None


class Objective(Protocol):
    """A task on a loaded base; it takes the batches that it makes, and no others."""

    @property
    def base(self) -> Base:
        """The loaded base, with or without an adapter."""
        ...

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Return token rows as one micro-batch, in host memory."""
        ...

    def stand_in(self, rows: int, tokens: int, weight: int | None = None) -> Batch:
        """Return a batch that takes what one of so many rows of so many tokens takes.

        Args:
            rows: B.
            tokens: of each row.
            weight: of the batch; as much as it can be if None.
        """
        ...

    def loss_sum(self, batch: Any) -> Tensor:
        """Return the summed loss of a batch, a scalar; differentiable in what is trained."""
        ...

    def measured(self, batch: Any) -> Any:
        """Measure a batch, without gradient, where the model computes."""
        ...

    def row_sums(self, batch: Any, measured: Any) -> RowSums:
        """Return what was measured of a batch, summed by row."""
        ...

    def figures(self, outputs: Tensor, rows: Sequence[Mapping[str, Any]]) -> Figures:
        """Return what no sum over rows gives, such as a macro-F1, where outputs were kept."""
        ...


Figures = Mapping[str, Any]
"""Figures by name: numbers, and tables of them."""


@dataclass(frozen=True)
class Task:
    """What a sample means.

    Attributes:
        name: of the task.
        loads: the class of transformers' that a base is loaded as.
        peft_type: `task_type` of PEFT's adapter_config.json.
        makes: how a sample becomes token rows.
        weighs: the key of what its loss is a mean over, such as "supervised_tokens".
        unit: of the loss.
        metrics: what is measured beside the loss, by name, how it is printed: means over the
            weight, and figures of all rows together.
        of_loss: figures that follow from the loss: by name, the value and how it is printed.
        generates: whether its models write text.
        objective: binds it to a loaded base; takes the token that fills short rows, the tokens
            whose logits exist at one time, and a custom loss or None.
        classes: what the outputs of a classifier mean; None for other models.
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

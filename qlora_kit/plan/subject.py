"""What a plan is about: the base, the trained part, the device that is planned for, the rows.

Takes what `train` takes; needs none of it to exist on this machine but the architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import TokenRows, largest_batch
from qlora_kit.data.encode import IGNORED
from qlora_kit.lora.attach import LoraSpec
from qlora_kit.model.hardware import Hardware, dtype_named
from qlora_kit.model.load import BaseSpec
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.task import Task


@dataclass(frozen=True)
class RowSizes:
    """What decides the memory of the rows of a run.

    Attributes:
        tokens: of the longest row.
        supervised: targets of the largest batch of one row, of two, and so on; all tokens but
            the first of each row if None.
        evaluation_tokens: of the longest row in evaluation, if that is another.
    """

    tokens: int
    supervised: tuple[int, ...] | None = None
    evaluation_tokens: int | None = None

    def supervised_of(self, rows: int) -> int | None:
        """Return the targets of the largest batch of so many rows."""
        if self.supervised is None:
            return None
        return self.supervised[min(rows, len(self.supervised)) - 1]

    @classmethod
    def of(cls, rows: TokenRows, most: int, evaluation_tokens: int | None) -> RowSizes:
        """Describe tokenised rows by the largest batches of them.

        Args:
            rows: of training.
            most: rows that a batch may have.
            evaluation_tokens: of the longest row in evaluation, if there is one.
        """
        lengths = rows.lengths()
        # The largest batch holds every smaller one: each of its rows is read once.
        largest = largest_batch(lengths, most)
        supervised = tuple(accumulate(_targets(rows[index]["labels"]) for index in largest))
        return cls(max(lengths), supervised, evaluation_tokens)


def _targets(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


@dataclass(frozen=True)
class Subject:
    """A run that is planned, all but its settings.

    Attributes:
        spec: the base; of its folder only the config.json is read.
        lora: the trained part.
        hardware: `meta` stands in for a GPU and is told apart from the host.
        rows: what a batch is made of.
        task: what they mean.
    """

    spec: BaseSpec
    lora: LoraSpec
    hardware: Hardware
    rows: RowSizes
    task: Task = CAUSAL


def planned_hardware(config: TrainConfig) -> Hardware:
    """Return what stands in for the device: `meta` for a GPU, which need not be there."""
    if config.device == "cpu":
        dtype = torch.float32 if config.dtype == "auto" else dtype_named(config.dtype)
        return Hardware(torch.device("cpu"), dtype, "planned")
    dtype = torch.bfloat16 if config.dtype == "auto" else dtype_named(config.dtype)
    return Hardware(torch.device("meta"), dtype, "planned")


def standing_in_for(hardware: Hardware) -> Hardware:
    """Return what stands in for a device that is there."""
    if hardware.device.type == "cpu":
        return hardware
    return replace(hardware, device=torch.device("meta"))

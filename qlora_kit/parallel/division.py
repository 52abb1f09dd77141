"""The rows of an optimiser step, divided over the processes of a run.

Every process knows all rows of a step and divides them by itself, so it knows as well how much the
others have. Takes indices of rows and their lengths; returns indices. Asks no other process, and
imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_kit.config import TrainConfig

if TYPE_CHECKING:
    from qlora_kit.data.batch import Indices


def divided(
    window: Sequence[Indices], tokens_of: Callable[[int], int], count: int
) -> list[Indices]:
    """Return the rows of each process, the longest first.

    Rows are dealt out by length, back and forth. So the n-th micro-batches of all processes have
    rows of about the same length, and no process waits long for another; and where rows are left
    over, they are the shortest. A process has no row where there are fewer rows than processes.

    Args:
        window: the micro-batches of a step.
        tokens_of: returns the tokens of a row.
        count: number of processes.
    """
    rows = sorted((row for indices in window for row in indices), key=tokens_of, reverse=True)
    forth = list(range(count))
    shares: list[list[int]] = [[] for _ in forth]
    for turn, start in enumerate(range(0, len(rows), count)):
        order = forth if turn % 2 == 0 else forth[::-1]
        for process, row in zip(order, rows[start : start + count], strict=False):
            shares[process].append(row)
    return [tuple(share) for share in shares]


def share_of(config: TrainConfig, count: int) -> TrainConfig:
    """Return the options of a run of one process that takes as much memory as each of several.

    Args:
        config: the options of a run, whose effective batch is divided.
        count: number of processes.
    """
    if count == 1:
        return config
    rows = math.ceil(config.batch_size * config.gradient_accumulation_steps / count)
    at_once = min(config.batch_size, rows)
    return config.model_copy(
        update={"batch_size": at_once, "gradient_accumulation_steps": math.ceil(rows / at_once)}
    )

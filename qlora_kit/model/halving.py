"""Work that is done again with half the rows at a time where memory runs out.

Takes work on rows and the device it is done on; returns what the work returned. Never decides what
becomes of a step that was begun: that is the caller's, see `train.optimizer_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from qlora_kit.errors import OutOfMemory
from qlora_kit.model.memory import is_out_of_memory, release_memory
from qlora_kit.signals import safe_point

Result = TypeVar("Result")


def if_it_fits(work: Callable[[], Result], device: torch.device) -> Result | None:
    """Return what `work` returns, or None where memory ran out; it is given back then."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Here the error is gone, and with it the tensors that its frames held.
    release_memory(device)
    return None


def halved(rows: int, line: str) -> int:
    """Return half of so many rows, one at least.

    Raises:
        OutOfMemory: with `line`, where there was one row only.
    """
    if rows == 1:
        raise OutOfMemory(line)
    return math.ceil(rows / 2)


def batches_that_fit(
    rows: Sequence[int],
    most: int,
    work: Callable[[Sequence[int]], Result],
    device: torch.device,
    *,
    line_of: Callable[[int], str],
    on_halved: Callable[[int], None] = lambda most: None,
) -> Iterator[tuple[Sequence[int], Result]]:
    """Yield each batch of rows and what `work` makes of it; batches shrink where memory ends.

    Args:
        rows: their indices, in the order they are worked on.
        most: rows of a batch to begin with.
        work: takes the indices of a batch.
        device: that the work is done on.
        line_of: says of a row that it does not fit even alone.
        on_halved: told how many rows a batch has from here.

    Raises:
        OutOfMemory: even one row does not fit.
        Stopped: a signal came.
    """
    done = 0
    while done < len(rows):
        safe_point()
        batch = rows[done : done + most]
        found = if_it_fits(lambda batch=batch: work(batch), device)  # type: ignore[misc]
        if found is None:
            most = halved(len(batch), line_of(batch[0]))
            on_halved(most)
            continue
        done += len(batch)
        yield batch, found

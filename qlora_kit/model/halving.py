"""Work on rows that is repeated with half the rows at a time when memory runs out.

Takes the work, the rows and the device; returns the results of the work. Never undoes a step that
ran out of memory half way: the caller does, see `train.optimizer_step`.
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
    """Return the result of `work`, or None if memory ran out; that memory is given back."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Here the error is gone, and so are the tensors that its frames held.
    release_memory(device)
    return None


def halved(rows: int, line: str) -> int:
    """Return half of a number of rows, rounded up.

    Raises:
        OutOfMemory: there was one row only; `line` is the message.
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
    """Yield each batch of rows with the result of `work`; batches shrink when memory runs out.

    Args:
        rows: indices of the rows, in the order of the work.
        most: rows of a batch to begin with.
        work: the work on one batch; takes the indices of its rows.
        device: the device that the work is done on.
        line_of: returns the error message for a row that does not fit even alone.
        on_halved: receives the new number of rows of a batch.

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

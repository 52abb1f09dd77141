"""One real step on the longest rows before the first: what a run takes, before it takes it.

Takes what will take the steps; leaves its weights, optimiser and random states bit for bit as
they were, and returns what was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qlora_kit.data.batch import largest_batch
from qlora_kit.errors import OutOfMemory, TornStep
from qlora_kit.model.memory import out_of_memory_while
from qlora_kit.plan.allocator_record import AllocatorRecord
from qlora_kit.plan.ledger import Change, Ledger
from qlora_kit.plan.watch import PURPOSES, claim_model, claim_trained, watched
from qlora_kit.train.optimizer_step import OptimizerStep

# Moments that a picture shows; each is the largest of its share of the step.
_MOMENTS = 800


@dataclass(frozen=True)
class Rehearsal:
    """What a step on the longest rows took.

    Attributes:
        rows: that went through the model at one time.
        rows_asked: that were to go; fewer did where memory ran out.
        tokens: of the longest of them.
        peak_bytes: as the allocator of the device recorded it.
        how: which record that is.
        timeline: bytes by purpose at moments of the step, in the order of `PURPOSES`; what an
            operation takes for itself meanwhile is not in it.
    """

    rows: int
    rows_asked: int
    tokens: int
    peak_bytes: int
    how: str
    timeline: tuple[tuple[int, ...], ...]


def rehearse(step: OptimizerStep, micro_batches: int) -> Rehearsal:
    """Take one optimiser step on the longest rows, measure it and undo it.

    Where memory runs out the micro-batch is halved, as it would be in training.

    Args:
        step: what will take the steps.
        micro_batches: of a step; from the second on, the gradients of the first are there.

    Raises:
        OutOfMemory: even one row does not fit, or what is kept to undo the step.
    """
    largest = largest_batch(step.rows.lengths(), step.micro_batch_rows)
    window = [largest] * min(2, micro_batches)
    ledger = Ledger(step.device.type)
    claim_model(ledger, step.model)
    with _shortage_in_one_line(), step.undone():
        claim_trained(ledger, step.optimizer)
        with (
            _allocator_record(step.device, ledger.live_bytes) as record,
            watched(ledger, step.optimizer),
            ledger.recorded() as changes,
            ledger,
        ):
            step.take(window, rate=0.0)
    rows = min(step.micro_batch_rows, len(largest))
    return Rehearsal(
        rows=rows,
        rows_asked=len(largest),
        tokens=len(step.rows[largest[0]]["input_ids"]),
        peak_bytes=record.peak_bytes,
        how=f"{'CUDA' if step.device.type == 'cuda' else 'CPU'} allocator",
        timeline=tuple(_timeline(changes)),
    )


@contextmanager
def _shortage_in_one_line() -> Iterator[None]:
    doing = "rehearsing the largest step, which was undone"
    remedy = "pass --no-rehearse, or a smaller --rank or --batch-size"
    try:
        with out_of_memory_while(doing, remedy):
            yield
    except TornStep as error:
        raise OutOfMemory(f"out of memory while {doing}; expected it to fit; {remedy}") from error


class _CudaRecord:
    """What a GPU's allocator keeps itself, since the process began."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes = 0

    def __enter__(self) -> _CudaRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device)


def _allocator_record(device: torch.device, held_bytes: int) -> _CudaRecord | AllocatorRecord:
    return _CudaRecord(device) if device.type == "cuda" else AllocatorRecord(held_bytes)


def _timeline(changes: Sequence[Change]) -> Iterator[tuple[int, ...]]:
    """Yield bytes by purpose, at the largest moment of each of some equal shares of a step."""
    share = max(1, len(changes) // _MOMENTS)
    live: Counter[str] = Counter()
    total = largest = 0
    moment: tuple[int, ...] = ()
    for index, change in enumerate(changes):
        live[change.purpose] += change.bytes
        total += change.bytes
        if total >= largest:
            largest, moment = total, tuple(live[purpose] for purpose in PURPOSES)
        if (index + 1) % share == 0:
            yield moment
            largest = 0

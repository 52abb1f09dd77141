"""One real step on the longest rows, before the first step of a run: it measures the memory.

Takes the `OptimizerStep` of the run; leaves weights, optimiser and random states bit for bit as
they were, and returns the measured memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qlora_kit.data.batch import largest_batch, widest_batch
from qlora_kit.errors import OutOfMemory, TornStep
from qlora_kit.model.memory import out_of_memory_while
from qlora_kit.parallel.sharded import gather_once
from qlora_kit.plan.allocator_record import AllocatorRecord
from qlora_kit.plan.ledger import Change, Ledger
from qlora_kit.plan.watch import PURPOSES, claim_model, claim_trained, watched
from qlora_kit.train.optimizer_step import OptimizerStep

# Number of moments that a picture shows; each is the largest moment of its share of the step.
_MOMENTS = 800


@dataclass(frozen=True)
class Rehearsal:
    """The memory that a step on the longest rows took.

    Attributes:
        rows: rows that went through the model at one time.
        rows_asked: rows that were asked for; `rows` is fewer where memory ran out.
        tokens: tokens of the longest row.
        peak_bytes: the peak that the allocator of the device recorded.
        how: the name of the allocator that kept the record.
        timeline: bytes by purpose at moments of the step, in the order of `PURPOSES`; without the
            memory that an operation takes for itself while it runs.
    """

    rows: int
    rows_asked: int
    tokens: int
    peak_bytes: int
    how: str
    timeline: tuple[tuple[int, ...], ...]


def rehearse(step: OptimizerStep, micro_batches: int, *, has_sources: bool = False) -> Rehearsal:
    """Take one optimiser step on the longest rows, measure it and undo it.

    Where memory runs out the micro-batch is halved, as it would be in training. Several processes
    rehearse together, each on the longest rows.

    Args:
        step: takes the steps of the run.
        micro_batches: micro-batches of a step. Two are enough to rehearse: from the second on,
            the gradients of the first take memory too.
        has_sources: whether rows are sources and targets, each with a width of its own.

    Raises:
        OutOfMemory: even one row does not fit, or the copies that are kept to undo the step do
            not.
    """
    if has_sources:
        largest = widest_batch(step.rows.source_lengths(), step.micro_batch_rows)
    else:
        largest = largest_batch(step.rows.lengths(), step.micro_batch_rows)
    window = [largest] * min(2, micro_batches)
    gather_once(step.model)
    ledger = Ledger(step.device.type)
    claim_model(ledger, step.model)
    with _shortage_in_one_line(), step.undone():
        claim_trained(ledger, step.optimizer)
        for tensor in (each for pair in step.adapter.start.values() for each in pair):
            ledger.claim(tensor, "LoRA")
        with (
            _allocator_record(step.device, ledger.live_bytes) as record,
            watched(ledger, step.optimizer),
            ledger.recorded() as changes,
            ledger,
        ):
            step.take(window, rate=0.0, is_divided=False)
    rows = min(step.micro_batch_rows, len(largest))
    return Rehearsal(
        rows=rows,
        rows_asked=len(largest),
        tokens=max(step.rows.tokens_of(index) for index in largest),
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
    """The record that a GPU's allocator keeps itself, from the start of the process."""

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
    """Divide a step into equal shares; yield bytes by purpose at the largest moment of each."""
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

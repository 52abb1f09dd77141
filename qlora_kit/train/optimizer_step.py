"""One optimiser step over a window of rows, and the ways in which it can fail.

If memory runs out, the micro-batch is halved, and the step is replayed from the random states that
it began with. The rows of the window, and so the effective batch, stay the same. All memory of a
step is allocated before a weight changes. If the loss or the gradient is not finite, no weight
changes, and the rows are named. If a signal comes between two micro-batches, the step is undone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.data.batch import Indices, TokenRows
from qlora_kit.data.packing import packed
from qlora_kit.errors import TornStep
from qlora_kit.layers.draws import Draws, drawn_from
from qlora_kit.lora.attach import Adapter
from qlora_kit.model.halving import halved, if_it_fits
from qlora_kit.model.memory import is_out_of_memory
from qlora_kit.parallel.one import OneProcess, Processes
from qlora_kit.signals import safe_point
from qlora_kit.tasks.task import Batch, Objective
from qlora_kit.train.optimizer import make_state, optimizer_copy, restore_copy
from qlora_kit.train.random_states import random_states, restore_random_states

Window = Sequence[Indices]
"""The micro-batches of one optimiser step, each as indices of rows."""

_TIMED_PASSES = 3


@dataclass(frozen=True)
class Taken:
    """The outcome of an optimiser step.

    Attributes:
        loss: mean over the window's weight, such as nats per supervised token.
        grad_norm: norm of the gradient before clipping.
        weight: sum of the weights of the units in the window, which the loss is divided by.
        units: number of these units, such as supervised tokens; `weight`, where all count alike.
        tokens: tokens in the window, without padding.
        suspect_rows: empty, unless the step was skipped. Then the rows of the micro-batches whose
            loss is not finite; or all rows, if only the gradient is not finite.
        overflowed: whether the loss scaler skipped the step to find its scale.
    """

    loss: float
    grad_norm: float
    weight: float
    units: int
    tokens: int
    suspect_rows: Indices = ()
    overflowed: bool = False


class _Gradients(NamedTuple):
    """The facts about a window whose gradients are computed.

    Attributes:
        losses: summed loss of each micro-batch.
        batches: the micro-batches.
        weight: sum of the weights of the units that the loss is a mean over, in all processes.
        norm: norm of the gradient before clipping.
    """

    losses: list[float]
    batches: list[Batch]
    weight: float
    norm: float


@dataclass
class OptimizerStep:
    """Takes optimiser steps; `micro_batch_rows` falls when memory runs out.

    Attributes:
        adapter: trained in place.
        objective: computes the loss to minimise.
        rows: all training rows; of a stream those of the window that is to be taken.
        optimizer: the optimiser of the adapter's parameters.
        scaler: the loss scaler; disabled unless the model computes in float16.
        micro_batch_rows: the most rows that go through the model at a time.
        max_grad_norm: norm that the gradient is clipped to; 0 is no clipping.
        seed: the seed of the dropout masks.
        packs: whether the samples of a step are laid end to end in few full micro-batches. Then
            `micro_batch_rows` rows of the longest sample are the most that one of them holds.
        processes: the processes that take the step together, each with rows of its own.
        on_halved: receives the new `micro_batch_rows` after memory ran out.
    """

    adapter: Adapter
    objective: Objective
    rows: TokenRows
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    micro_batch_rows: int
    max_grad_norm: float
    seed: int = 0
    packs: bool = False
    processes: Processes = field(default_factory=OneProcess)
    on_halved: Callable[[int], None] = lambda rows: None

    def __post_init__(self) -> None:
        self.model = self.adapter.base.model
        self.device = self.adapter.base.hardware.device
        self.parameters = list(self.adapter.parameters().values())
        # The width of the widest row: masks are drawn at this width for every batch.
        self.longest = max(self.rows.lengths())
        self.most_tokens = self.adapter.base.batch_width(self.longest)

    def take(
        self,
        window: Window,
        rate: float,
        step: int = 0,
        check: Callable[[int], None] = lambda longest: None,
    ) -> Taken:
        """Take one step, or skip it where its loss or gradient is not finite.

        Args:
            window: rows of the step.
            rate: learning rate.
            step: number of the step, from which dropout draws its masks.
            check: called with the tokens of the longest row, after finite gradients are computed
                and before the weights change.

        Raises:
            OutOfMemory: even one row does not fit. The weights are those before the step.
            TornStep: memory ran out while the weights changed. The weights are useless.
            Stopped: a signal came. The weights and random states are those before the step.
        """
        found = self._gradients(window, step)
        losses, batches, norm = found.losses, found.batches, found.norm
        overflowed = False
        suspect = _suspect_rows(losses, norm, batches, is_scaled=self.scaler.is_enabled())
        if not self.processes.any(bool(suspect)):
            overflowed = not math.isfinite(norm)
            if not overflowed:
                check(max(batch.longest for batch in batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._change_weights()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(
            loss=math.fsum(losses) / found.weight,
            grad_norm=norm,
            weight=found.weight,
            units=sum(batch.units for batch in batches),
            tokens=sum(batch.tokens for batch in batches),
            suspect_rows=suspect,
            overflowed=overflowed,
        )

    def _gradients(self, window: Window, step: int) -> _Gradients:
        """Sum the window's gradients and clip them; halve the micro-batch if memory runs out."""
        states = random_states(self.device)

        def attempt() -> _Gradients:
            try:
                make_state(self.optimizer)
                return self._backward(window, step)
            except BaseException:
                self._forget(states)
                raise

        while True:
            found = if_it_fits(attempt, self.device)
            # If memory ran out in one process, all processes begin again.
            if not self.processes.any(found is None):
                assert found is not None
                return found
            self._forget(states)
            self._halve(window)

    def _forget(self, states: dict[str, Tensor]) -> None:
        """Drop the gradients, and put the random states back to the beginning of the step."""
        self.optimizer.zero_grad(set_to_none=True)
        restore_random_states(states, self.device)

    def _backward(self, window: Window, step: int) -> _Gradients:
        micro_batches = self._micro_batches(window)
        batches = [self._collate(indices) for indices in micro_batches]
        weight = self.processes.total(sum(batch.weight for batch in batches))
        sums = []
        for indices, batch in zip(micro_batches, batches, strict=True):
            safe_point(self.processes.any)
            lengths = batch.lengths if self.packs else None
            with drawn_from(Draws(self.seed, step, indices, self.most_tokens, lengths)):
                summed = self.objective.loss_sum(batch)
                differentiate(self.scaler.scale(summed / weight))
            sums.append(summed.detach().double())
        # One transfer from the device for all micro-batches.
        losses: list[float] = torch.stack(sums).tolist()
        return _Gradients(losses, batches, weight, self._clip())

    def _clip(self) -> float:
        """Divide the gradients by the loss scale and clip them; return their norm before that."""
        self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or math.inf
        try:
            return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        except BaseException:
            # Without this, the scaler would refuse to unscale the gradients of the replayed step.
            self.scaler.update(self.scaler.get_scale())
            raise

    def _change_weights(self) -> None:
        """Let the optimiser change the weights.

        On a GPU, the fused optimisers need no memory for it (`tests/train/test_reliability.py`). On
        a CPU, the optimiser makes temporary tensors for one parameter after the other.
        """
        try:
            self.scaler.step(self.optimizer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TornStep(
                "out of memory while the weights were updated, so that they are neither those "
                "before nor those after the step, and are not saved; expected it to fit; pass a "
                "smaller --rank or --batch-size, or close other programs"
            ) from error

    def _collate(self, indices: Indices) -> Batch:
        return self.objective.batch([self.rows[index] for index in indices])

    def _micro_batches(self, window: Window) -> list[Indices]:
        if self.packs:
            lengths = {row: self.rows.tokens_of(row) for indices in window for row in indices}
            return packed(window, lengths, self.micro_batch_rows * self.longest)
        return list(cut(window, self.micro_batch_rows))

    def _halve(self, window: Window) -> None:
        micro_batches = self._micro_batches(window)
        most = max(len(indices) for indices in micro_batches)
        if self.packs:
            tokens = max(sum(map(self.rows.tokens_of, indices)) for indices in micro_batches)
            most = math.ceil(tokens / self.longest)
        longest = max(len(self.rows[i]["input_ids"]) for indices in window for i in indices)
        self.micro_batch_rows = halved(
            most,
            f"out of memory on one row at a time, the longest of {longest} tokens; expected it to "
            "fit; pass a smaller --max-length, --rank or --loss-chunk-tokens, or fewer --bits",
        )
        self.on_halved(self.micro_batch_rows)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Put weights, optimiser, loss scale and random states back after the block, bit for bit.

        The copies are in host memory, so they take none of the device's.
        """
        make_state(self.optimizer)
        states = random_states(self.device)
        weights = [parameter.detach().cpu().clone() for parameter in self.parameters]
        moments = optimizer_copy(self.optimizer)
        scale = self.scaler.state_dict()
        try:
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, kept in zip(self.parameters, weights, strict=True):
                    parameter.copy_(kept)
            restore_copy(self.optimizer, moments)
            self.scaler.load_state_dict(scale)
            restore_random_states(states, self.device)

    def cost_of_determinism(self, window: Window) -> float:
        """Measure how much longer a micro-batch takes with deterministic algorithms.

        Random states and settings are put back afterwards, and no weight changes.

        Returns:
            The time with these algorithms, divided by the time without.
        """
        states = random_states(self.device)
        batch = self._collate(self._micro_batches(window)[0])
        was_on = torch.are_deterministic_algorithms_enabled()
        seconds = {}
        try:
            for is_on in (False, True):
                torch.use_deterministic_algorithms(is_on)
                seconds[is_on] = min(self._seconds(batch) for _ in range(_TIMED_PASSES))
        finally:
            torch.use_deterministic_algorithms(was_on)
            self.optimizer.zero_grad(set_to_none=True)
            restore_random_states(states, self.device)
        return seconds[True] / seconds[False]

    def _seconds(self, batch: Batch) -> float:
        start = time.perf_counter()
        differentiate(self.objective.loss_sum(batch))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def differentiate(loss: Tensor) -> None:
    """Add the gradients of a loss to those of the parameters, as a step does."""
    # Backward runs on this thread: autograd's own thread would have a second cuBLAS workspace, of
    # 32 MiB.
    with torch.autograd.set_multithreading_enabled(False):
        torch.autograd.backward(loss)


def cut(window: Window, most_rows: int) -> Iterator[Indices]:
    """Yield the micro-batches of a window, cut into parts of at most `most_rows` rows."""
    for indices in window:
        for start in range(0, len(indices), most_rows):
            yield indices[start : start + most_rows]


def _suspect_rows(
    losses: Sequence[float], norm: float, batches: Sequence[Batch], *, is_scaled: bool
) -> Indices:
    """Return the rows that make the step unsound; empty if it is sound."""
    suspect = [b for loss, b in zip(losses, batches, strict=True) if not math.isfinite(loss)]
    # With loss scaling, infinite gradients are normal: the scaler skips the step to find its scale.
    if not suspect and not math.isfinite(norm) and not is_scaled:
        suspect = list(batches)
    return tuple(sorted({row for batch in suspect for row in batch.rows}))

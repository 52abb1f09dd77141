"""One optimiser step over a window of rows, and the ways in which it can fail.

If memory runs out, the micro-batch is halved, and the step is replayed from the random states that
it began with. The rows of the window, and so the effective batch, stay the same. All memory of a
step is allocated before a weight changes. If the loss or the gradient is not finite, no weight
changes, and the rows are named. If a signal comes between two micro-batches, the step is undone.

Several processes divide the rows of a step, and compute them in rounds: in each, every process has
one micro-batch or none. Before each round all of them tell each other whether memory ran out or a
signal came, so they leave a step in the same way, at the same place.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from qlora_kit.data.batch import Indices, TokenRows
from qlora_kit.data.packing import packed
from qlora_kit.errors import TornStep, WorkerLost
from qlora_kit.layers.draws import Draws, drawn_from
from qlora_kit.lora.attach import Adapter
from qlora_kit.model.halving import halved, if_it_fits
from qlora_kit.model.memory import is_out_of_memory
from qlora_kit.parallel.division import divided
from qlora_kit.parallel.one import OneProcess, Processes
from qlora_kit.signals import Stopped, received
from qlora_kit.tasks.task import Batch, MeasuresSteps, Objective, TellsUnits, drawn_rows
from qlora_kit.train.groups import RATE_RATIO
from qlora_kit.train.optimizer import make_state, optimizer_copy, restore_copy
from qlora_kit.train.random_states import (
    random_states,
    restore_random_states,
    seed_everything,
)

Result = TypeVar("Result")

Window = Sequence[Indices]
"""The micro-batches of one optimiser step, each as indices of rows."""

_TIMED_PASSES = 3


class SourceLoss(NamedTuple):
    """The summed loss of the units of a source in a step, and the sum of their weights."""

    loss: float
    weight: float


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
        by_source: the loss of each source, summed, where there are several and it is known.
        metrics: what the objective measures of a step beside the loss, by name, as the loss is.
    """

    loss: float
    grad_norm: float
    weight: float
    units: int
    tokens: int
    suspect_rows: Indices = ()
    overflowed: bool = False
    by_source: tuple[SourceLoss, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class _Gradients(NamedTuple):
    """The facts about a window whose gradients are computed.

    Attributes:
        losses: summed loss of each micro-batch of this process.
        batches: its micro-batches.
        loss: summed loss of all processes.
        size: size of the step in all processes.
        norm: norm of the gradient before clipping.
        longest: tokens of the longest row.
        by_source: see `Taken`.
        metrics: what else is measured of a step, summed over all processes.
    """

    losses: list[float]
    batches: list[Batch]
    loss: float
    size: _Size
    norm: float
    longest: int
    by_source: tuple[SourceLoss, ...]
    metrics: list[float]


class _Size(NamedTuple):
    """What the batches of a step have together, see `Taken`."""

    weight: float
    units: float
    tokens: float

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> _Size:
        return cls(
            sum(batch.weight for batch in batches),
            sum(batch.units for batch in batches),
            sum(batch.tokens for batch in batches),
        )


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
        tells_units: whether the objective is a `TellsUnits`: then the losses of several sources are
            told apart.
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
    tells_units: bool = False
    on_halved: Callable[[int], None] = lambda rows: None

    def __post_init__(self) -> None:
        self.model = self.adapter.base.model
        self.device = self.adapter.base.hardware.device
        self.parameters = list(self.adapter.parameters().values())
        # The width of the widest row: masks are drawn at this width for every batch.
        self.longest = max(self.rows.lengths())
        self.most_tokens = self.adapter.base.batch_width(self.longest)
        self.tokens_computed = 0
        self._sources = len(self.rows.source_names) if self.tells_units else 0

    def take(
        self,
        window: Window,
        rate: float,
        step: int = 0,
        check: Callable[[int], None] = lambda longest: None,
        *,
        is_divided: bool = True,
    ) -> Taken:
        """Take one step, or skip it where its loss or gradient is not finite.

        Args:
            window: rows of the step.
            rate: learning rate.
            step: number of the step, from which dropout draws its masks.
            check: called with the tokens of the longest row, after finite gradients are computed
                and before the weights change.
            is_divided: whether several processes divide the rows. Otherwise each takes all of them,
                as if they had as many times the rows.

        Raises:
            OutOfMemory: even one row does not fit. The weights are those before the step.
            TornStep: memory ran out while the weights changed. The weights are useless.
            Stopped: a signal came. The weights and random states are those before the step.
            WorkerLost: another process is gone. The weights are those before the step.
        """
        found = self._gradients(window, step, is_divided=is_divided)
        overflowed = False
        suspect = self._suspect_rows(found)
        if not suspect:
            overflowed = not math.isfinite(found.norm)
            if not overflowed:
                check(found.longest)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get(RATE_RATIO, 1.0)
            self._change_weights()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens_computed += sum(batch.tokens for batch in found.batches)
        return Taken(
            loss=found.loss / found.size.weight,
            grad_norm=found.norm,
            weight=found.size.weight,
            units=int(found.size.units),
            tokens=int(found.size.tokens),
            suspect_rows=suspect,
            overflowed=overflowed,
            by_source=found.by_source,
            metrics={
                name: value / found.size.weight
                for name, value in zip(self._step_metrics, found.metrics, strict=True)
            },
        )

    @property
    def _step_metrics(self) -> tuple[str, ...]:
        objective = self.objective
        return objective.step_metrics if isinstance(objective, MeasuresSteps) else ()

    def _gradients(self, window: Window, step: int, *, is_divided: bool) -> _Gradients:
        """Sum the window's gradients and clip them; halve the micro-batch if memory runs out."""
        if self.processes.count > 1:
            # What draws from the random states, such as an encoder's own dropout, must neither be
            # alike in all processes, nor depend on what was computed before.
            seed_everything(_seed_of(self.seed, step, self.processes.rank))
        states = random_states(self.device)
        while True:
            try:
                found = self._attempt(self._divided(window, is_divided=is_divided), step)
            except BaseException:
                self._forget(states)
                raise
            if found is not None:
                return found
            self._forget(states)
            self._halve(self._divided(window, is_divided=is_divided))

    def _forget(self, states: dict[str, Tensor]) -> None:
        """Drop the gradients, and put the random states back to the beginning of the step."""
        self.optimizer.zero_grad(set_to_none=True)
        restore_random_states(states, self.device)

    def _attempt(self, shares: Sequence[Window], step: int) -> _Gradients | None:
        """Compute the gradients of a step; None if memory ran out in any process.

        Args:
            shares: the micro-batches of each process.
            step: number of the step.
        """
        own = shares[self.processes.rank]
        begun = self._fitting(lambda: self._begun(own))
        batches = begun or []
        short, *sizes = self.processes.totals(begun is None, *_Size.of(batches))
        if short:
            return None
        size = _Size(*sizes)
        batches = self._within_step(batches)
        sums: list[Tensor] = []
        for number in range(max(map(len, shares))):
            if self._is_short(len(sums) < min(number, len(own))):
                return None
            passed = self._fitting(partial(self._pass, shares, number, batches, size.weight, step))
            if passed is not None:
                sums += passed
        longest = max((batch.longest for batch in batches), default=0)
        short, most = self.processes.most(len(sums) < len(own), longest)
        if short:
            return None
        self.processes.sum_gradients(self.parameters)
        # One transfer from the device for all micro-batches.
        told = self._fitting(lambda: torch.stack(sums).tolist() if sums else [])
        losses = [loss for loss, *_ in told or ()]
        norm = None if told is None else self._fitting(self._clip)
        short, loss, *more = self.processes.totals(
            norm is None,
            math.fsum(losses),
            *self._sums_of_sources(told or (), own, batches),
            *self._sums_of_metrics(told or ()),
        )
        if norm is None:
            return None
        if short:
            self._allow_to_unscale_again()
            return None
        of_sources, metrics = more[: 2 * self._sources], more[2 * self._sources :]
        pairs = zip(of_sources[::2], of_sources[1::2], strict=True)
        by_source = tuple(starmap(SourceLoss, pairs))
        return _Gradients(losses, batches, loss, size, norm, int(most), by_source, metrics)

    def _sums_of_sources(
        self, told: Sequence[Sequence[float]], own: Window, batches: Sequence[Batch]
    ) -> Iterator[float]:
        """Yield loss and weight of each source in this process, one after the other.

        Args:
            told: of each micro-batch, its loss and that of each source; none if memory ran out.
            own: the micro-batches.
            batches: the same, collated.
        """
        weights = torch.zeros(self._sources, dtype=torch.float64, device="cpu")
        for indices, batch in zip(own, batches, strict=True) if self._sources else ():
            of = self._source_of_units(indices, batch)
            weights += _summed(self._telling.weights_of(batch), of, self._sources)
        for source in range(self._sources):
            yield math.fsum(each[source + 1] for each in told)
            yield float(weights[source])

    @property
    def _telling(self) -> TellsUnits:
        return cast(TellsUnits, self.objective)

    def _source_of_units(self, indices: Indices, batch: Batch) -> Tensor:
        """Return the number of the source of each unit of a micro-batch, (N,), in host memory."""
        of_rows = torch.tensor([self.rows.source_of(index) for index in indices], device="cpu")
        return of_rows[self._telling.rows_of(batch)]

    def _sums_of_metrics(self, told: Sequence[Sequence[float]]) -> list[float]:
        """Return the sum of each thing that is measured beside the loss in this process.

        Args:
            told: of each micro-batch, its loss and these; none if memory ran out.
        """
        count = len(self._step_metrics)
        return [math.fsum(each[1 + number] for each in told) for number in range(count)]

    def _within_step(self, batches: list[Batch]) -> list[Batch]:
        """Let the batches of this process know the sums of the whole step that they need."""
        objective = self.objective
        if not isinstance(objective, MeasuresSteps):
            return batches
        figures = objective.step_figures(batches)
        sums = self.processes.totals(*figures) if figures else ()
        return [objective.within_step(batch, sums) for batch in batches]

    def _begun(self, own: Window) -> list[Batch]:
        make_state(self.optimizer)
        self.processes.hold_gradients(self.parameters)
        return [self._collate(indices) for indices in own]

    def _fitting(self, work: Callable[[], Result]) -> Result | None:
        """Return the result of work; None if memory ran out, where that can be made good.

        Raises:
            WorkerLost: processes that compute together cannot go on without this one.
        """
        with self.processes.computing():
            found = if_it_fits(work, self.device)
        if found is None and self.processes.computes_together:
            self.processes.abandon()
            raise WorkerLost(
                "out of memory in one process, while the others wait for its part of the base; "
                "expected each to fit; pass a smaller --batch-size, --max-length or --rank"
            )
        return found

    def _is_short(self, is_short: bool) -> bool:
        """Meet before a round; return whether memory ran out in any process.

        Raises:
            Stopped: a signal came to any process.
        """
        number, short = self.processes.most(received(), is_short)
        if number:
            raise Stopped(int(number))
        return bool(short)

    def _pass(
        self,
        shares: Sequence[Window],
        number: int,
        batches: Sequence[Batch],
        weight: float,
        step: int,
    ) -> list[Tensor]:
        """Run a micro-batch of this process forward and backward.

        Args:
            shares: the micro-batches of each process.
            number: number of the round.
            batches: the micro-batches of this process.
            weight: what the loss is divided by.
            step: number of the step.

        Returns:
            The summed loss, and behind it that of each source, or what else is measured; fp64 on
            the device, in one tensor. Nothing where this process has no micro-batch.
        """
        own = shares[self.processes.rank]
        if number < len(own):
            return [self._differentiated(own[number], batches[number], weight, step)]
        if self.processes.computes_together:
            # The others need this process, so it computes a row of theirs, for nothing.
            other = next(each[number] for each in shares if number < len(each))
            self._differentiated(other[-1:], self._collate(other[-1:]), math.inf, step)
        return []

    def _differentiated(self, indices: Indices, batch: Batch, weight: float, step: int) -> Tensor:
        lengths = batch.lengths if self.packs else None
        # Before the forward: behind it a copy to the device would wait for its end.
        of = self._source_of_units(indices, batch) if self._sources else None
        of = None if of is None else of.to(self.device, non_blocking=True)
        rows = drawn_rows(batch, indices)
        with drawn_from(Draws(self.seed, step, rows, self.most_tokens, lengths)):
            summed, more = self._computed(batch, of)
            differentiate(self.scaler.scale(summed / weight))
        return torch.cat((summed.detach().double().reshape(1), *more))

    def _computed(
        self, batch: Batch, source_of_units: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the summed loss of a micro-batch, and what else is told of it, in fp64."""
        if source_of_units is not None:
            summed, losses = self._telling.loss_by_unit(batch)
            return summed, [_summed(losses.double(), source_of_units, self._sources)]
        if isinstance(self.objective, MeasuresSteps):
            summed, metrics = self.objective.loss_and_metrics(batch)
            return summed, [metrics]
        return self.objective.loss_sum(batch), []

    def _clip(self) -> float:
        """Divide the gradients by the loss scale and clip them; return their norm before that."""
        self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or math.inf
        try:
            return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        except BaseException:
            self._allow_to_unscale_again()
            raise

    def _allow_to_unscale_again(self) -> None:
        """Let the scaler unscale the gradients of the replayed step, which it would refuse."""
        self.scaler.update(self.scaler.get_scale())

    def _change_weights(self) -> None:
        """Let the optimiser change the weights.

        On a GPU, the fused optimisers need no memory for it (`tests/train/test_reliability.py`). On
        a CPU, the optimiser makes temporary tensors for one parameter after the other.
        """
        try:
            self.scaler.step(self.optimizer)
            # Some optimisers write past torch's count of changes, by which layers know that what
            # they made of their weights is old.
            torch.autograd.graph.increment_version(self.parameters)
            self.adapter.renew()
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

    def _divided(self, window: Window, *, is_divided: bool) -> list[list[Indices]]:
        """Return the micro-batches of each process."""
        count = self.processes.count
        if count == 1 or not is_divided:
            return [self._micro_batches(window)] * count
        shares = divided(window, self.rows.tokens_of, count)
        return [self._micro_batches([share]) if share else [] for share in shares]

    def _halve(self, shares: Sequence[Window]) -> None:
        micro_batches = [indices for own in shares for indices in own]
        most = max(len(indices) for indices in micro_batches)
        if self.packs:
            tokens = max(sum(map(self.rows.tokens_of, indices)) for indices in micro_batches)
            most = math.ceil(tokens / self.longest)
        longest = max(self.rows.tokens_of(i) for indices in micro_batches for i in indices)
        self.micro_batch_rows = halved(
            most,
            f"out of memory on one row at a time, the longest of {longest} tokens; expected it to "
            "fit; pass a smaller --max-length, --rank or --loss-chunk-tokens, or fewer --bits",
        )
        self.on_halved(self.micro_batch_rows)

    def _suspect_rows(self, found: _Gradients) -> Indices:
        """Return the rows, of all processes, that make the step unsound; empty if it is sound."""
        # With loss scaling, infinite gradients are normal: the scaler skips the step to find its
        # scale.
        is_sound = math.isfinite(found.norm) or self.scaler.is_enabled()
        if math.isfinite(found.loss) and is_sound:
            return ()
        suspect = self._rows_of_all(_not_finite(found))
        return suspect if suspect or is_sound else self._rows_of_all(found.batches)

    def _rows_of_all(self, batches: Sequence[Batch]) -> Indices:
        """Return the rows of the batches of all processes."""
        rows = {row for batch in batches for row in batch.rows}
        return tuple(sorted(set().union(*self.processes.each(lambda: rows))))

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Put weights, optimiser, loss scale and random states back after the block, bit for bit.

        The copies are in host memory, so they take none of the device's.
        """
        make_state(self.optimizer)
        states = random_states(self.device)
        weights = [parameter.detach().cpu().clone() for parameter in self.parameters]
        moments = optimizer_copy(self.optimizer)
        scale, computed = self.scaler.state_dict(), self.tokens_computed
        try:
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, kept in zip(self.parameters, weights, strict=True):
                    parameter.copy_(kept)
            self.adapter.renew()
            restore_copy(self.optimizer, moments)
            self.scaler.load_state_dict(scale)
            self.tokens_computed = computed
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


def _summed(values: Tensor, of: Tensor, sources: int) -> Tensor:
    """Return the sum of the values of each source, (sources,), in the same order each time.

    Args:
        values: (N,).
        of: (N,), the number of the source of each.
        sources: number of the sources.
    """
    is_of = of == torch.arange(sources, device=of.device).unsqueeze(1)
    return torch.where(is_of, values, 0.0).sum(1)


def _not_finite(found: _Gradients) -> list[Batch]:
    pairs = zip(found.losses, found.batches, strict=True)
    return [batch for loss, batch in pairs if not math.isfinite(loss)]


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Return the seed of the random states of a process in a step, below 2³²."""
    return random.Random(f"states {seed} {step} {rank}").getrandbits(32)

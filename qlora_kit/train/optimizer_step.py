"""One optimiser step over a window of rows, and what becomes of one that cannot be taken.

Out of memory: the micro-batch is halved and the step replayed from the random states it began
with; the rows of the window, and so the effective batch, stay what they were. All that a step
takes is there before a weight changes. Not finite: no weight changes and the rows are named.
Stopped between two micro-batches: the step is undone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.data.batch import Batch, Indices, TokenRows, collate
from qlora_kit.errors import OutOfMemory, TornStep
from qlora_kit.layers.loss import ChunkLoss
from qlora_kit.lora.attach import Adapter
from qlora_kit.model.head import head_of
from qlora_kit.model.memory import is_out_of_memory, release_memory
from qlora_kit.signals import safe_point
from qlora_kit.step.forward import loss_sum
from qlora_kit.train.optimizer import make_state, optimizer_copy, restore_copy
from qlora_kit.train.random_states import random_states, restore_random_states

Window = Sequence[Indices]
"""The micro-batches of one optimiser step, each as indices of rows."""

_TIMED_PASSES = 3


@dataclass(frozen=True)
class Taken:
    """What an optimiser step came to.

    Attributes:
        loss: mean over the window's supervised tokens, nats per token.
        grad_norm: before clipping.
        supervised_tokens: in the window.
        tokens: in the window, padding not counted.
        suspect_rows: where the step was skipped, the rows of the micro-batches whose loss is
            not finite, or of all where only the gradient is not; else empty.
        overflowed: whether the loss scaler skipped the step to find its scale.
    """

    loss: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    suspect_rows: Indices = ()
    overflowed: bool = False


@dataclass
class OptimizerStep:
    """Takes optimiser steps; `micro_batch_rows` falls when memory runs out.

    Attributes:
        adapter: trained in place.
        rows: all training rows.
        optimizer: over the adapter's parameters.
        scaler: of the loss; disabled where nothing is computed in float16.
        micro_batch_rows: most rows that go through the model at a time.
        loss_chunk_tokens: tokens whose logits exist at one time.
        max_grad_norm: clipped to; 0 is no clipping.
        pad_token_id: fills short rows of a batch; never seen by the loss.
        loss: custom loss of a chunk, or None for cross-entropy.
        on_halved: told the new `micro_batch_rows` when memory ran out.
    """

    adapter: Adapter
    rows: TokenRows
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    micro_batch_rows: int
    loss_chunk_tokens: int
    max_grad_norm: float
    pad_token_id: int = 0
    loss: ChunkLoss | None = None
    on_halved: Callable[[int], None] = lambda rows: None

    def __post_init__(self) -> None:
        self.model = self.adapter.base.model
        self.head = head_of(self.model)
        self.device = self.adapter.base.hardware.device
        self.parameters = list(self.adapter.parameters().values())

    def take(
        self, window: Window, rate: float, check: Callable[[int], None] = lambda longest: None
    ) -> Taken:
        """Take one step, or skip it where its loss or gradient is not finite.

        Args:
            window: rows of the step.
            rate: learning rate.
            check: called before the weights change, when the gradients are there and finite,
                with the tokens of the longest row.

        Raises:
            OutOfMemory: even one row does not fit. The weights are those before the step.
            TornStep: memory ran out while the weights changed; they are good for nothing.
            Stopped: a signal came. The weights and random states are those before the step.
        """
        losses, batches, norm = self._gradients(window)
        supervised = sum(batch.supervised_tokens for batch in batches)
        overflowed = False
        suspect = _suspect_rows(losses, norm, batches, is_scaled=self.scaler.is_enabled())
        if not suspect:
            overflowed = not math.isfinite(norm)
            if not overflowed:
                check(max(batch.longest for batch in batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._change_weights()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(
            loss=math.fsum(losses) / supervised,
            grad_norm=norm,
            supervised_tokens=supervised,
            tokens=sum(batch.tokens for batch in batches),
            suspect_rows=suspect,
            overflowed=overflowed,
        )

    def _gradients(self, window: Window) -> tuple[list[float], list[Batch], float]:
        """Sum the window's gradients and clip them.

        Returns:
            The loss sum of each micro-batch, these, and the gradient's norm before clipping.
        """
        states = random_states(self.device)
        while True:
            try:
                make_state(self.optimizer)
                losses, batches = self._backward(window)
                return losses, batches, self._clip()
            except BaseException as error:
                self.optimizer.zero_grad(set_to_none=True)
                restore_random_states(states, self.device)
                if not is_out_of_memory(error):
                    raise
            # Here the error and the tensors its frames held are gone.
            release_memory(self.device)
            self._halve(window)

    def _backward(self, window: Window) -> tuple[list[float], list[Batch]]:
        batches = [self._collate(indices) for indices in cut(window, self.micro_batch_rows)]
        supervised = sum(batch.supervised_tokens for batch in batches)
        sums = []
        for batch in batches:
            safe_point()
            summed = self._loss_sum(batch)
            _differentiate(self.scaler.scale(summed / supervised))
            sums.append(summed.detach().double())
        # One transfer from the device for all micro-batches.
        losses: list[float] = torch.stack(sums).tolist()
        return losses, batches

    def _clip(self) -> float:
        """Clip the gradients, freed of the loss scale; return their norm before."""
        self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or math.inf
        try:
            return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        except BaseException:
            # Or the scaler would refuse to unscale the gradients of the replayed step.
            self.scaler.update(self.scaler.get_scale())
            raise

    def _change_weights(self) -> None:
        """Let the optimiser change the weights.

        The fused optimisers of a GPU take no memory for it (`tests/test_reliability.py`). That of
        a CPU makes temporaries of one parameter after the other.
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
        rows = [self.rows[index] for index in indices]
        return collate(rows, self.pad_token_id, self.adapter.base.batch_width)

    def _loss_sum(self, batch: Batch) -> Tensor:
        return loss_sum(
            self.model,
            batch.to(self.device),
            self.head,
            loss=self.loss,
            chunk_tokens=self.loss_chunk_tokens,
        )

    def _halve(self, window: Window) -> None:
        micro_batches = list(cut(window, self.micro_batch_rows))
        most = max(len(indices) for indices in micro_batches)
        if most == 1:
            longest = max(len(self.rows[i]["input_ids"]) for (i,) in micro_batches)
            raise OutOfMemory(
                f"out of memory on one row at a time, the longest of {longest} tokens; expected "
                "it to fit; pass a smaller --max-length, --rank or --loss-chunk-tokens, or fewer "
                "--bits"
            )
        self.micro_batch_rows = math.ceil(most / 2)
        self.on_halved(self.micro_batch_rows)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Put weights, optimiser, loss scale and random states back after the block, bit for bit.

        The copies are in host memory: the device holds no more than without them.
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

        Returns:
            Its time with them over its time without; nothing else is changed.
        """
        states = random_states(self.device)
        batch = self._collate(next(cut(window, self.micro_batch_rows)))
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
        _differentiate(self._loss_sum(batch))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def _differentiate(loss: Tensor) -> None:
    # On this thread: one of autograd's own would have a second cuBLAS workspace, of 32 MiB.
    with torch.autograd.set_multithreading_enabled(False):
        torch.autograd.backward(loss)


def cut(window: Window, most_rows: int) -> Iterator[Indices]:
    """Yield the micro-batches of a window, those with more than `most_rows` rows in parts."""
    for indices in window:
        for start in range(0, len(indices), most_rows):
            yield indices[start : start + most_rows]


def _suspect_rows(
    losses: Sequence[float], norm: float, batches: Sequence[Batch], *, is_scaled: bool
) -> Indices:
    """Return the rows that a step is skipped for; none if it is sound."""
    suspect = [b for loss, b in zip(losses, batches, strict=True) if not math.isfinite(loss)]
    # With loss scaling an infinite gradient is how the scale is found: the scaler skips it.
    if not suspect and not math.isfinite(norm) and not is_scaled:
        suspect = list(batches)
    return tuple(sorted({row for batch in suspect for row in batch.rows}))

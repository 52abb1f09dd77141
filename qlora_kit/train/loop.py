"""The training loop: windows of micro-batches, one optimiser step each.

Takes an adapter and token rows; trains the adapter in place and returns what happened. The
loss of a window is summed over its supervised tokens and divided once by their number, so
the gradient does not depend on how the window is cut into micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import Batch, collate, epoch_batches, plan_windows
from qlora_kit.errors import EnvironmentFault, NumericsError
from qlora_kit.events import (
    Announce,
    CheckpointSaved,
    Evaluated,
    RunFinished,
    RunStarted,
    StepFinished,
    silent,
)
from qlora_kit.lora.adapter import BaseRecord
from qlora_kit.lora.attach import Adapter
from qlora_kit.model.hardware import memory_in_use_bytes, peak_memory_bytes
from qlora_kit.model.head import head_of
from qlora_kit.step.forward import loss_sum
from qlora_kit.step.loss import ChunkLoss
from qlora_kit.step.recompute import set_recompute
from qlora_kit.train.checkpoint import (
    Progress,
    Resumable,
    delete_old,
    restore_checkpoint,
    save_checkpoint,
)
from qlora_kit.train.optimizer import build_optimizer, learning_rate_at, set_learning_rate

# The loss scale starts at 2¹⁶ and is halved at each skipped step; a few are how it settles.
_MOST_SKIPPED_STEPS = 20

TokenRows = Sequence[dict[str, Any]]
"""Rows with `input_ids`, `labels` and `row`, see `data.tokens`."""


@dataclass(frozen=True)
class Saving:
    """Where and as what a run saves itself.

    Attributes:
        output: run folder.
        record: what the adapter files say of the base.
        resume: checkpoint to continue from.
    """

    output: Path
    record: BaseRecord
    resume: Path | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        progress: where it ended.
        reason: why it ended, in words.
        last_loss: of the last optimiser step, nats per supervised token.
        seconds: of this process.
        peak_memory_bytes: allocated on the GPU, or resident on a CPU.
    """

    progress: Progress
    reason: str
    last_loss: float
    seconds: float
    peak_memory_bytes: int


def train_adapter(
    adapter: Adapter,
    rows: TokenRows,
    config: TrainConfig,
    *,
    pad_token_id: int = 0,
    evaluate: Callable[[], float] | None = None,
    loss: ChunkLoss | None = None,
    saving: Saving | None = None,
    identity: Resumable | None = None,
    announce: Announce = silent,
) -> TrainResult:
    """Train an attached adapter.

    Args:
        adapter: trained in place.
        rows: tokenised training rows.
        config: everything else that was asked for.
        pad_token_id: fills short rows of a batch; never seen by the loss.
        evaluate: returns the validation loss; called while training with the adapter in place.
        loss: custom loss of a chunk of logits and targets, returning a sum; cross-entropy if
            None.
        saving: where checkpoints go; without it nothing is written.
        identity: what must be equal to resume.
        announce: receives the events of the run.

    Raises:
        NumericsError: a loss or gradient that is not finite; the weights are those before it.
        ConfigError: the checkpoint to resume from was made under other conditions.
    """
    run = _Run(
        adapter=adapter,
        rows=rows,
        config=config,
        pad_token_id=pad_token_id,
        evaluate=evaluate,
        loss=loss,
        saving=saving,
        identity=identity or Resumable(),
        announce=announce,
    )
    return run.run()


@dataclass
class _Run:
    """One call of `train_adapter`: its arguments, and what the steps share."""

    adapter: Adapter
    rows: TokenRows
    config: TrainConfig
    pad_token_id: int
    evaluate: Callable[[], float] | None
    loss: ChunkLoss | None
    saving: Saving | None
    identity: Resumable
    announce: Announce

    def __post_init__(self) -> None:
        self.model = self.adapter.base.model
        self.head = head_of(self.model)
        self.device = self.adapter.base.hardware.device
        self.parameters = list(self.adapter.parameters().values())
        self.accelerator = _accelerator(self.adapter)
        self.optimizer = self.accelerator.prepare_optimizer(
            build_optimizer(self.parameters, self.config)
        )
        batches = math.ceil(len(self.rows) / self.config.batch_size)
        self.steps_per_epoch = math.ceil(batches / self.config.gradient_accumulation_steps)
        self.total_steps = self.config.max_steps or math.ceil(
            self.config.epochs * self.steps_per_epoch
        )
        self.progress = Progress()
        self.last_loss = math.nan
        self.saved_step = -1
        self.skipped_in_a_row = 0

    def run(self) -> TrainResult:
        start = time.perf_counter()
        self._begin()
        reason = self._steps()
        self.progress.finished = True
        self.model.eval()
        self._save()
        seconds = time.perf_counter() - start
        self.announce(RunFinished(self.progress.optimizer_step, reason, seconds))
        memory = peak_memory_bytes(self.device)
        return TrainResult(self.progress, reason, self.last_loss, seconds, memory)

    def _begin(self) -> None:
        torch.manual_seed(self.config.seed)
        if self.saving is not None and self.saving.resume is not None:
            self.progress = restore_checkpoint(
                self.saving.resume, self.adapter, self.optimizer.optimizer,
                self.accelerator.scaler, self.identity,
            )  # fmt: skip
            self.progress.finished = False
            self.saved_step = self.progress.optimizer_step
        set_recompute(self.model, self.config.recompute)
        self.model.train()
        first = self.progress.optimizer_step + 1
        self.announce(RunStarted(first, self.total_steps, self.total_steps / self.steps_per_epoch))

    def _steps(self) -> str:
        """Take optimiser steps until the run ends; return why it ended."""
        for windows in self._epochs():
            for window in windows:
                if self.progress.optimizer_step >= self.total_steps:
                    return "all steps done"
                self._step(window)
                self.progress.window += 1
                stopped_early = self._evaluate_if_due()
                self._save_if_due()
                if stopped_early:
                    return "validation loss stopped falling"
            self.progress.epoch, self.progress.window = self.progress.epoch + 1, 0
        raise AssertionError("epochs do not end")

    def _epochs(self) -> Iterator[list[tuple[tuple[int, ...], ...]]]:
        """Yield the windows of each epoch that are still to be done, without end."""
        while True:
            batches = epoch_batches(
                self.rows, self.config.batch_size, self.config.seed, self.progress.epoch
            )
            windows = plan_windows(batches, self.config.gradient_accumulation_steps)
            yield windows[self.progress.window :]

    # ------------------------------------------------------------ one step

    def _step(self, window: Sequence[tuple[int, ...]]) -> None:
        start = time.perf_counter()
        batches = [collate([self.rows[i] for i in rows], self.pad_token_id) for rows in window]
        supervised = sum(batch.supervised_tokens for batch in batches)
        step = self.progress.optimizer_step + 1
        rate = learning_rate_at(step, self.total_steps, self.config)
        set_learning_rate(self.optimizer, rate)
        loss = self._backward(batches, supervised)
        norm = self._clip()
        self._check_finite(step, loss, norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._check_scaling(step)
        self.progress.optimizer_step, self.last_loss = step, loss
        self.announce(
            StepFinished(
                optimizer_step=step,
                epoch=self.progress.epoch + (self.progress.window + 1) / self.steps_per_epoch,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                supervised_tokens=supervised,
                tokens=sum(batch.tokens for batch in batches),
                step_seconds=time.perf_counter() - start,
                memory_bytes=memory_in_use_bytes(self.device),
            )
        )

    def _backward(self, batches: Sequence[Batch], supervised: int) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            summed = loss_sum(
                self.model,
                batch.to(self.device),
                self.head,
                loss=self.loss,
                chunk_tokens=self.config.loss_chunk_tokens,
            )
            self.accelerator.backward(summed / supervised)
            total += summed.detach().double()
        return float(total) / supervised

    def _clip(self) -> float:
        """Return the gradient norm before clipping to `max_grad_norm`."""
        limit = self.config.max_grad_norm or math.inf
        return float(self.accelerator.clip_grad_norm_(self.parameters, limit))

    def _check_finite(self, step: int, loss: float, norm: float, batches: Sequence[Batch]) -> None:
        # With loss scaling an infinite gradient is how the scale is found: the scaler skips it.
        has_scaler = self.accelerator.scaler is not None
        if math.isfinite(loss) and (has_scaler or math.isfinite(norm)):
            return
        rows = sorted({row for batch in batches for row in batch.rows})
        raise NumericsError(
            f"step {step}: loss {loss}, gradient norm {norm}, on rows {rows[:16]}; expected finite "
            "numbers; lower --learning-rate, or look at these rows"
        )

    def _check_scaling(self, step: int) -> None:
        """Stop where float16 gradients overflow however small the loss scale becomes."""
        skipped = self.accelerator.scaler is not None and self.optimizer.step_was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row > _MOST_SKIPPED_STEPS:
            raise NumericsError(
                f"step {step}: {self.skipped_in_a_row} steps in a row were skipped because the "
                "gradients overflow float16; expected a finite gradient; use --dtype bfloat16 or "
                "float32"
            )

    # ------------------------------------------------------------ between steps

    def _evaluate_if_due(self) -> bool:
        """Evaluate where it is due; return whether the run should stop early."""
        step, every = self.progress.optimizer_step, self.config.eval_steps
        at_epoch_end = self.progress.window == self.steps_per_epoch
        due = step % every == 0 if every else at_epoch_end
        if self.evaluate is None or not (due or step == self.total_steps):
            return False
        start = time.perf_counter()
        self.model.eval()
        loss = self.evaluate()
        self.model.train()
        if not math.isfinite(loss):
            raise NumericsError(
                f"step {step}: the validation loss is {loss}; expected a finite number; lower "
                "--learning-rate, or look at the validation rows"
            )
        best = self.progress.best_loss
        is_best = best is None or loss < best
        if is_best:
            self.progress.best_loss, self.progress.best_step = loss, step
            self.progress.evaluations_without_gain = 0
        else:
            self.progress.evaluations_without_gain += 1
        epoch = self.progress.epoch + self.progress.window / self.steps_per_epoch
        self.announce(Evaluated(step, epoch, loss, is_best, time.perf_counter() - start))
        if is_best and step < self.total_steps:
            self._save()
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _save_if_due(self) -> None:
        step, every = self.progress.optimizer_step, self.config.save_steps
        at_epoch_end = self.progress.window == self.steps_per_epoch
        due = step % every == 0 if every else at_epoch_end
        # The last step is saved once, as the end of the run.
        if due and step < self.total_steps:
            self._save()

    def _save(self) -> None:
        already = self.saved_step == self.progress.optimizer_step and not self.progress.finished
        if self.saving is None or already:
            return
        folder = save_checkpoint(
            self.saving.output,
            self.adapter,
            self.saving.record,
            self.optimizer.optimizer,
            self.accelerator.scaler,
            self.progress,
            self.identity,
        )
        self.saved_step = self.progress.optimizer_step
        delete_old(self.saving.output, self.config.save_total_limit)
        self.announce(CheckpointSaved(self.progress.optimizer_step, str(folder)))


def _accelerator(adapter: Adapter) -> Accelerator:
    """Return accelerate's handle of one process on the adapter's device.

    Raises:
        EnvironmentFault: several processes were launched; each would train on its own.
    """
    hardware = adapter.base.hardware
    # The state is a singleton; a second run in one process may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=hardware.device.type == "cpu",
        mixed_precision="fp16" if hardware.dtype == torch.float16 else "no",
    )
    if accelerator.num_processes > 1:
        raise EnvironmentFault(
            f"{accelerator.num_processes} processes were launched; expected one (data parallel "
            "training is not built yet); start it without torchrun or accelerate launch"
        )
    return accelerator

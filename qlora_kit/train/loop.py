"""The training loop: epochs of windows, one optimiser step each; evaluations and checkpoints.

Takes an adapter and token rows; trains the adapter in place and returns a `TrainResult`. The loss
of a window is summed over its supervised tokens and divided once by their number, or by the sum of
their weights, so the gradient does not depend on how the window is cut into micro-batches. However
the loop ends (a signal, no memory, numbers that are not finite), the trained weights are saved
first. The one exception are weights of which a part was changed when memory ran out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_kit import signals
from qlora_kit.config import TrainConfig
from qlora_kit.data.batch import Indices, Row, TokenRows
from qlora_kit.errors import (
    ConfigError,
    NumericsError,
    OutOfMemory,
    QloraKitError,
    TornStep,
    WorkerLost,
)
from qlora_kit.events import (
    Announce,
    CheckpointSaved,
    Evaluated,
    Event,
    MicroBatchHalved,
    Notice,
    RunFinished,
    RunStarted,
    StepFinished,
    StepSkipped,
    silent,
)
from qlora_kit.layers.loss import ChunkLoss
from qlora_kit.lora.attach import Adapter
from qlora_kit.lora.files import BaseRecord
from qlora_kit.model.memory import memory_in_use_bytes, peak_memory_bytes, restart_peak
from qlora_kit.parallel.division import share_of
from qlora_kit.parallel.one import Processes, processes_of_this_run
from qlora_kit.step.reducers import without_effect
from qlora_kit.step.settle import settle
from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.classify import RowLoss
from qlora_kit.tasks.task import Objective, Task
from qlora_kit.tasks.tokens import packing
from qlora_kit.train.best import LOSS, falls, is_better
from qlora_kit.train.checkpoint import (
    Progress,
    Trainee,
    adopt,
    delete_old,
    restore_checkpoint,
    save_checkpoint,
)
from qlora_kit.train.groups import parameter_groups
from qlora_kit.train.learning import STEPS_TO_MOVE, check_gradients, check_movement
from qlora_kit.train.optimizer import build_optimizer, learning_rate_at
from qlora_kit.train.optimizer_step import OptimizerStep, Taken
from qlora_kit.train.packing import choose_packing, try_packing
from qlora_kit.train.random_states import seed_everything
from qlora_kit.train.windows import plan_steps, windows_of

# A run can go on after one bad row; several skipped steps in a row show that it has gone wrong.
_MOST_SKIPPED_IN_A_ROW = 3
# The loss scale starts at 2¹⁶ and is halved at each overflow, so a few overflows are normal.
_MOST_OVERFLOWS_IN_A_ROW = 20
# The first position can attend to itself only, so queries and keys get no gradient from it.
_TOKENS_TO_ATTEND = 3


Measure = Callable[[], float | Mapping[str, float]]
"""Returns the validation loss, alone or as "loss" among other metrics."""

AroundStep = Callable[[int], AbstractContextManager[Any]]
"""Takes the number of an optimiser step, and returns a block that it runs in."""


@dataclass(frozen=True)
class Saving:
    """The place of a run's checkpoints, and the records in them.

    Attributes:
        output: run folder.
        record: the record of the base for the adapter's files.
        resume: checkpoint to continue from; the caller has checked that it fits.
        identity: the values that must be equal for the run to be resumed, by name.
    """

    output: Path
    record: BaseRecord
    resume: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        progress: its progress at the end.
        reason: the reason that it ended, in words.
        last_loss: loss of the last optimiser step, a mean over what the task weighs, such as nats
            per supervised token.
        seconds: duration in this process.
        peak_memory_bytes: peak since the run began: allocated on the GPU, or anonymous on a CPU.
        process_tokens: tokens that each process has computed in this call, by rank.
        last_metrics: what else was measured of the last optimiser step, by name.
    """

    progress: Progress
    reason: str
    last_loss: float
    seconds: float
    peak_memory_bytes: int
    process_tokens: tuple[int, ...] = ()
    last_metrics: Mapping[str, float] = field(default_factory=dict)


def _loss_and_metrics(found: float | Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Take a validation loss, alone or with metrics beside it, apart."""
    if not isinstance(found, Mapping):
        return float(found), {}
    return found["loss"], {name: value for name, value in found.items() if name != "loss"}


def train_adapter(
    adapter: Adapter,
    rows: TokenRows | Sequence[Row],
    config: TrainConfig,
    *,
    task: Task = CAUSAL,
    pad_token_id: int = 0,
    evaluate: Measure | None = None,
    loss: ChunkLoss | RowLoss | None = None,
    stop_when: Callable[[Event], bool] | None = None,
    saving: Saving | None = None,
    before_first_step: Callable[[OptimizerStep], None] | None = None,
    around_step: AroundStep = nullcontext,
    announce: Announce = silent,
) -> TrainResult:
    """Train an attached adapter, in this process or in all that a launcher started.

    Several processes take the very steps of one: they divide the rows of each step, and each calls
    this function with the same arguments.

    Args:
        adapter: trained in place.
        rows: tokenised training rows: those of `load_data`, or a list of your own.
        config: all other options of the run.
        task: the meaning of a row.
        pad_token_id: id that fills short rows of a batch; the loss never sees it.
        evaluate: returns the validation loss, or a mapping with "loss" and metrics of your own, see
            `config.best_metric`; called while training, with the adapter in place.
        loss: custom loss, returning a sum: of a chunk of logits and targets, or, where the task
            classifies, of the logits of rows and their targets. The task's own if None. Rows whose
            tokens have weights are refused with it: it would not see them.
        stop_when: hears every finished step and evaluation; the run ends after one for which it
            returns True.
        saving: the place of the checkpoints; without it nothing is written.
        before_first_step: called with the object that takes the steps; must leave its state as it
            was.
        around_step: returns, for the number of an optimiser step, the block that it runs in.
        announce: receives the events of the run.

    Raises:
        ConfigError: the rows have weights and the loss is your own; or they cannot be packed.
        NumericsError: three steps in a row, or the validation loss, are not finite; the
            weights are those of the last sound step.
        LearningError: a part of the adapter gets no gradient, or does not move.
        OutOfMemory: not even one row at a time fits.
        TornStep: memory ran out while the weights changed; only the last checkpoint remains.
        Stopped: a signal came.
        WorkerLost: another process is gone, or does not answer.
    """
    processes = processes_of_this_run()
    run = _Training(
        adapter,
        TokenRows.of(rows),
        config,
        task,
        pad_token_id,
        evaluate,
        loss,
        stop_when,
        saving,
        before_first_step,
        around_step,
        announce if processes.is_writer else silent,
        processes,
    )
    with signals.deferred():
        return run.run()


@dataclass
class _Training:
    """One call of `train_adapter`: its arguments, and the state that the steps share."""

    adapter: Adapter
    rows: TokenRows
    config: TrainConfig
    task: Task
    pad_token_id: int
    evaluate: Measure | None
    loss: ChunkLoss | RowLoss | None
    stop_when: Callable[[Event], bool] | None
    saving: Saving | None
    before_first_step: Callable[[OptimizerStep], None] | None
    around_step: AroundStep
    announce: Announce
    processes: Processes

    def __post_init__(self) -> None:
        self.model = self.adapter.base.model
        packing = choose_packing(self.config, self.task, self.model, self.rows).tried(self.model)
        self.config = self.processes.from_writer(lambda: packing).settled(self.config)
        config, hardware = self.config, self.adapter.base.hardware
        self.device = hardware.device
        self.trainee = Trainee(
            self.adapter,
            build_optimizer(parameter_groups(self.adapter, config), config),
            torch.amp.GradScaler(self.device.type, enabled=hardware.dtype == torch.float16),
        )
        self.rows_at_once = share_of(config, self.processes.count).batch_size
        self.step = OptimizerStep(
            adapter=self.adapter,
            objective=self._objective(),
            rows=self.rows,
            optimizer=self.trainee.optimizer,
            scaler=self.trainee.scaler,
            micro_batch_rows=self.rows_at_once,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            packs=bool(config.packing),
            processes=self.processes,
            tells_units=self.task.tells_units and self.loss is None,
            on_halved=self._record_halving,
        )
        self.windows = windows_of(self.rows, config)
        self.plan = plan_steps(self.windows.in_epoch, config)
        self.progress = Progress()
        self.saved: Progress | None = None
        self.last_loss = math.nan
        self.last_metrics: Mapping[str, float] = {}
        self.is_asked_to_stop = False

    def _objective(self) -> Objective:
        """Return the objective of the run, which packs its batches where the run does."""
        config = self.config
        if self.loss is not None and self.rows.is_weighted:
            raise ConfigError(
                "loss: the rows have weights, and a loss of your own sums over tokens without "
                'them; expected rows that count alike; leave "loss_weights" out, or the loss'
            )
        objective = self.task.objective(
            self.adapter.base, self.pad_token_id, config.loss_chunk_tokens, self.loss
        )
        return packing(objective) if config.packing else objective

    def run(self) -> TrainResult:
        start = time.perf_counter()
        restart_peak()
        self._begin()
        try:
            reason = self._steps()
        except TornStep:
            raise
        except (signals.Stopped, NumericsError, OutOfMemory):
            self._save_last()
            raise
        except WorkerLost:
            # The step was not taken, so the weights are sound. Nobody is met any more.
            self._write()
            raise
        self.progress.finished = True
        self.model.eval()
        self._save()
        self._delete_old()
        seconds = time.perf_counter() - start
        self.announce(RunFinished(self.progress.optimizer_step, reason, seconds))
        memory = peak_memory_bytes(self.device)
        computed = tuple(self.processes.each(lambda: self.step.tokens_computed))
        self.processes.part()
        return TrainResult(
            self.progress, reason, self.last_loss, seconds, memory, computed, self.last_metrics
        )

    def _begin(self) -> None:
        seed_everything(self.config.seed)
        self._settle()
        if self.config.packing:
            try_packing(self.model)
        self.model.train()
        if self.saving is not None and self.saving.resume is not None:
            self.progress = restore_checkpoint(self.saving.resume, self.trainee)
            if self.processes.is_writer:
                adopt(self.saving.output, self.saving.resume, self.progress)
            self.saved = copy(self.progress)
            self.progress.finished = False
            self.step.micro_batch_rows = self.progress.micro_batch_rows or self.rows_at_once
        self._say_cost_of_determinism()
        # From here on the processes do not wait long for each other.
        self.processes.each(lambda: None)
        if self.before_first_step is not None:
            self.before_first_step(self.step)
        self.announce(
            RunStarted(
                first_step=self.progress.optimizer_step + 1,
                total_steps=self.plan.total,
                epochs=self.plan.total / self.plan.per_epoch if self.plan.per_epoch else None,
                evaluated_step=self.progress.evaluated_step,
            )
        )

    def _settle(self) -> None:
        settled = settle(self.model, self.config, self.adapter.base.hardware)
        for text in without_effect(self.config, settled.reducers, settled.applied):
            self.announce(Notice(text))

    def _say_cost_of_determinism(self) -> None:
        if not self.config.deterministic:
            return
        if self.device.type == "cpu":
            self.announce(Notice("--deterministic: a CPU run has the same bits each time anyway"))
            return
        some_rows = tuple(range(min(self.rows_at_once, len(self.rows))))
        cost = self.step.cost_of_determinism([some_rows])
        self.announce(Notice(f"--deterministic: a micro-batch takes {cost:.2f} times as long"))

    def _steps(self) -> str:
        """Take optimiser steps until the run ends; return why it ended."""
        # A run that was stopped between a step and its evaluation still has to evaluate.
        is_behind = self.progress.evaluated_step < self.progress.optimizer_step
        if is_behind and (reason := self._after_step()):
            return reason
        for window in self._windows():
            signals.safe_point(self._of_all)
            self._take(window)
            if reason := self._after_step():
                return reason
        return "all steps done"

    def _of_all(self, number: int) -> int:
        return int(self.processes.most(number)[0])

    def _windows(self) -> Iterator[tuple[Indices, ...]]:
        """Yield, epoch after epoch, the windows that are still to be done."""
        while self.progress.optimizer_step < self.plan.total:
            windows = self.windows.of_epoch(self.progress)
            while (window := self._next(windows)) is not None:
                yield window
                if self.progress.optimizer_step >= self.plan.total:
                    return
            self.windows.begin_epoch(self.progress)

    def _next(self, windows: Iterator[tuple[Indices, ...]]) -> tuple[Indices, ...] | None:
        """Return the next window of an epoch, or None; save if a stream cannot be read on."""
        try:
            return next(windows, None)
        except QloraKitError:
            self._save_last()
            raise

    def _epoch(self) -> float:
        """Return the epochs done; of a stream that was not counted only whole ones are known."""
        return self.progress.epoch + self.progress.window / (self.plan.per_epoch or math.inf)

    # ------------------------------------------------------------ one step

    def _take(self, window: tuple[Indices, ...]) -> None:
        step = self.progress.optimizer_step + 1
        rate = learning_rate_at(step, self.plan.total, self.config)
        with self.around_step(step):
            start = time.perf_counter()
            taken = self.step.take(window, rate, step, self._check_first_gradients)
            seconds = time.perf_counter() - start
        self.progress.optimizer_step, self.last_loss = step, taken.loss
        self.last_metrics = taken.metrics
        self.progress.window += 1
        self.progress.place = self.windows.place
        epoch = self._epoch()
        if taken.suspect_rows:
            self._skip(taken, step, epoch)
            return
        self.progress.skipped_in_a_row = 0
        self._count_overflow(taken, step)
        self._check_movement(step)
        self._tell(
            StepFinished(
                optimizer_step=step,
                epoch=epoch,
                loss=taken.loss,
                learning_rate=rate,
                grad_norm=taken.grad_norm,
                weight=taken.units,
                loss_weight=None if taken.weight == taken.units else taken.weight,
                weighs=self.task.weighs,
                tokens=taken.tokens,
                step_seconds=seconds,
                memory_bytes=memory_in_use_bytes(self.device),
                sources={
                    name: (each.loss, each.weight)
                    for name, each in zip(self.rows.source_names, taken.by_source, strict=False)
                    if each.weight
                },
                metrics=taken.metrics,
            )
        )

    def _skip(self, taken: Taken, step: int, epoch: float) -> None:
        """Count and announce a skipped step; end the run if too many come in a row."""
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        self.announce(StepSkipped(step, epoch, taken.loss, taken.grad_norm, taken.suspect_rows))
        if self.progress.skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            raise NumericsError(
                f"step {step}: loss {taken.loss}, gradient norm {taken.grad_norm}, on rows "
                f"{list(taken.suspect_rows[:16])}; {self.progress.skipped_in_a_row} steps in a "
                "row were skipped; expected finite numbers; lower --learning-rate, or look at "
                "these rows"
            )

    def _count_overflow(self, taken: Taken, step: int) -> None:
        """End the run if float16 gradients overflow however small the loss scale becomes."""
        self.progress.overflows_in_a_row += 1
        if not taken.overflowed:
            self.progress.overflows_in_a_row = 0
        elif self.progress.overflows_in_a_row > _MOST_OVERFLOWS_IN_A_ROW:
            raise NumericsError(
                f"step {step}: {self.progress.overflows_in_a_row} steps in a row were skipped "
                "because the gradients overflow float16; expected a finite gradient; use --dtype "
                "bfloat16 or float32"
            )

    def _check_first_gradients(self, longest_row: int) -> None:
        """Check the gradients of the first step that is neither skipped nor too short."""
        if not self.progress.learns and longest_row >= _TOKENS_TO_ATTEND:
            check_gradients(self.adapter)
            self.progress.learns = True

    def _check_movement(self, step: int) -> None:
        is_due = step == min(STEPS_TO_MOVE, self.plan.total)
        not_taken = self.progress.skipped_steps + self.progress.overflows_in_a_row
        if is_due and self.progress.learns and not not_taken:
            check_movement(self.adapter, step)

    def _record_halving(self, rows_now: int) -> None:
        self.progress.micro_batch_rows = rows_now
        step = self.progress.optimizer_step + 1
        self.announce(MicroBatchHalved(step, self.rows_at_once, rows_now))

    def _tell(self, event: Event) -> None:
        """Announce an event, and ask the stop rule about it."""
        self.announce(event)
        if self.stop_when is not None and self.processes.most(self.stop_when(event))[0]:
            self.is_asked_to_stop = True

    # ------------------------------------------------------------ between steps

    def _after_step(self) -> str:
        """Evaluate and save if it is due; return the reason to stop early, or nothing."""
        stop_early = ""
        if self._is_due(self.config.eval_steps) and self._evaluate():
            name = self.config.best_metric
            stop_early = f"validation {name} stopped {'falling' if falls(name) else 'rising'}"
        if self.is_asked_to_stop:
            stop_early = "the stop rule was met"
        self.progress.evaluated_step = self.progress.optimizer_step
        is_best = self.progress.best_step == self.progress.optimizer_step
        # The last step is saved once, by the end of the run.
        is_last = stop_early or self.progress.optimizer_step >= self.plan.total
        if not is_last and (is_best or self._is_due(self.config.save_steps)):
            self._save()
            self._delete_old()
        return stop_early

    def _is_due(self, every: int | None) -> bool:
        """Whether work that is done each `every` steps, or each epoch if None, is due now.

        All work is due after the last step.
        """
        if self.progress.optimizer_step == self.plan.total:
            return True
        if every:
            return self.progress.optimizer_step % every == 0
        return self.windows.ends_epoch(self.progress)

    def _evaluate(self) -> bool:
        """Measure the validation rows; return whether the run should stop early."""
        if self.evaluate is None:
            return False
        start = time.perf_counter()
        self.model.eval()
        found = self.evaluate()
        loss, metrics = self.processes.from_writer(lambda: _loss_and_metrics(found))
        self.model.train()
        step = self.progress.optimizer_step
        if not math.isfinite(loss):
            raise NumericsError(
                f"step {step}: the validation loss is {loss}; expected a finite number; lower "
                "--learning-rate, or look at the validation rows"
            )
        is_best = self._is_best(loss, metrics)
        if is_best:
            self.progress.best_loss, self.progress.best_step = loss, step
            self.progress.best_metric = metrics.get(self.config.best_metric)
            self.progress.evaluations_without_gain = 0
        else:
            self.progress.evaluations_without_gain += 1
        seconds = time.perf_counter() - start
        self._tell(Evaluated(step, self._epoch(), loss, is_best, seconds, metrics))
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _is_best(self, loss: float, metrics: Mapping[str, float]) -> bool:
        """Compare an evaluation with the best one by `--best-metric`.

        Raises:
            ConfigError: it was not measured.
        """
        name = self.config.best_metric
        if name == LOSS:
            return self.progress.best_loss is None or loss < self.progress.best_loss
        return is_better(name, metrics, self.progress.best_metric)

    def _save(self) -> None:
        """Save a checkpoint, unless there was no progress since the last one."""
        self.processes.in_writer(self._write)

    def _save_last(self) -> None:
        """Save as far as the run came; the other processes do not end, and so end it, before."""
        self._write()
        self.processes.after_writer("saving")

    def _write(self) -> None:
        if self.saving is None or not self.processes.is_writer:
            return
        if not self.progress.optimizer_step or self.progress == self.saved:
            return
        folder = save_checkpoint(
            self.saving.output,
            self.trainee,
            self.saving.record,
            self.progress,
            self.saving.identity,
            self.plan.total,
        )
        self.saved = copy(self.progress)
        self.announce(CheckpointSaved(self.progress.optimizer_step, str(folder)))

    def _delete_old(self) -> None:
        if self.saving is not None and self.processes.is_writer:
            delete_old(self.saving.output, self.config.save_total_limit)

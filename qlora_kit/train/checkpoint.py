"""Checkpoints: all that a run needs to continue with the same bits.

A checkpoint is a folder `checkpoint-N` with the adapter in PEFT's format, the optimiser's tensors,
the random states and `state.json`. `storage.staged_folder` writes it as a whole. The text files
`last` and `best` beside it name checkpoints. Never decides whether a run may continue from a
checkpoint: `train.resume` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from qlora_kit.config import TrainConfig
from qlora_kit.data.mixed_stream import MixedPlace
from qlora_kit.data.stream import StreamPlace
from qlora_kit.errors import DataError, InputError, StorageError, raised_as
from qlora_kit.lora.attach import Adapter
from qlora_kit.lora.files import BaseRecord
from qlora_kit.lora.reading import read_adapter
from qlora_kit.lora.writing import save_adapter
from qlora_kit.model.memory import out_of_memory_while
from qlora_kit.storage import (
    check_space,
    delete_folder,
    load_tensors,
    manifest_hash,
    read_json,
    save_tensors,
    staged_folder,
    verify_folder,
    write_json,
    write_text,
)
from qlora_kit.train.folder import BEST, LAST, STATE, checkpoints, step_of
from qlora_kit.train.optimizer import optimizer_tensors, restore_optimizer
from qlora_kit.train.random_states import random_states, restore_random_states

_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"
# Of variants whose adapter file is not what they train, such as a scale that is folded into B.
_TRAINED = "trained.safetensors"


@dataclass
class Progress:
    """The state of a run's counters; everything else follows from the configuration.

    Attributes:
        optimizer_step: number of steps done, skipped steps included.
        epoch: index of the current epoch.
        window: optimiser steps done in the current epoch.
        evaluated_step: the last step whose evaluation, where one was due, is done.
        best_loss: validation loss of the best evaluation so far; None before the first one.
        best_metric: value of `--best-metric` in that evaluation; None where it is the loss.
        best_step: the step after which it was measured.
        evaluations_without_gain: number of evaluations since the best one.
        skipped_steps: number of steps whose loss or gradient was not finite.
        skipped_in_a_row: number of steps skipped since the last sound step.
        overflows_in_a_row: number of steps that the loss scaler skipped since it last took one.
        learns: whether every B has been seen to get a gradient.
        micro_batch_rows: rows of a micro-batch since memory ran out; None: it never did.
        place: of a stream: the place in its current pass; None elsewhere.
        finished: whether the run reached its end.
    """

    optimizer_step: int = 0
    epoch: int = 0
    window: int = 0
    evaluated_step: int = 0
    best_loss: float | None = None
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    overflows_in_a_row: int = 0
    learns: bool = False
    micro_batch_rows: int | None = None
    place: MixedPlace | StreamPlace | None = None
    finished: bool = False


@dataclass(frozen=True)
class StepPlan:
    """The number of optimiser steps of an epoch, None if not known, and of the whole run."""

    per_epoch: int | None
    total: int


@dataclass(frozen=True)
class StoredState:
    """The content of `state.json`.

    Attributes:
        progress: the progress of the run when it was saved.
        identity: the values that decide the run's bits, by name; see `train.resume`.
        total_steps: number of optimiser steps that the run was to have.
        optimizer_values: the optimiser's values that are no tensors, by parameter.
        scaler: state of the loss scaler; empty without one.
        parent: hash of the manifest of the checkpoint before it; None for the first.
        versions: versions of the libraries that computed it.
    """

    progress: Progress
    identity: Mapping[str, Any]
    total_steps: int
    optimizer_values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trainee:
    """The objects of a running run that a checkpoint stores, and that it restores."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def device(self) -> torch.device:
        """The device that the adapter is trained on."""
        return self.adapter.base.hardware.device


# ---------------------------------------------------------------- writing


def check_room(output: Path, trainable: int, plan: StepPlan, options: TrainConfig) -> None:
    """Check that the disk has room for the checkpoints to come.

    Args:
        output: run folder.
        trainable: number of trained parameters.
        plan: steps of the run.
        options: how often the run saves, how many checkpoints it keeps, and which optimiser it has.

    Raises:
        StorageError: the disk is too full.
    """
    saves = math.ceil(plan.total / (options.save_steps or plan.per_epoch or plan.total))
    if options.save_total_limit is not None:
        # The best checkpoint is kept besides, and the newest is written before the oldest goes.
        saves = min(saves, options.save_total_limit + 2)
    missing = max(1, saves - len(checkpoints(output)))
    # A parameter takes 4 bytes for its fp32 weight, and 4 bytes or 1 for each of two moments.
    bytes_each = trainable * (4 + (2 if options.optimizer.endswith("8bit") else 8))
    # Beside A and B lie those that the run started from.
    bytes_each += trainable * 4 if options.init in ("pissa", "olora", "lora-ga") else 0
    check_space(output, missing * bytes_each + trainable * 4, f"{missing} checkpoint(s)")


def save_checkpoint(
    output: Path,
    trainee: Trainee,
    record: BaseRecord,
    progress: Progress,
    identity: Mapping[str, Any],
    total_steps: int,
) -> Path:
    """Write `checkpoint-N`, read it back, then let `last` name it, and `best` if it is the best.

    Args:
        output: run folder.
        trainee: the adapter, the optimiser and the loss scaler.
        record: the record of the base for the adapter's files.
        progress: the progress of the run.
        identity: the values that decide the run's bits, by name.
        total_steps: number of optimiser steps that the run is to have.

    Returns:
        The folder of the checkpoint.

    Raises:
        StorageError: it could not be written; the previous checkpoint is untouched.
        OutOfMemory: the host has no memory for it; the previous checkpoint is untouched.
    """
    folder = output / f"checkpoint-{progress.optimizer_step}"
    with (
        out_of_memory_while("saving", "close other programs; the last checkpoint is untouched"),
        staged_folder(folder, replace=True) as staging,
    ):
        tensors, values = optimizer_tensors(trainee.optimizer, trainee.adapter.parameters())
        state = StoredState(
            progress=progress,
            identity=identity,
            total_steps=total_steps,
            optimizer_values=values,
            scaler=trainee.scaler.state_dict(),
            parent=_last_hash(output),
            versions=record.versions,
        )
        save_adapter(trainee.adapter, staging, record)
        if not trainee.adapter.spec.variant.is_its_file:
            save_tensors(staging / _TRAINED, trainee.adapter.trained_tensors())
        save_tensors(staging / _OPTIMIZER, tensors)
        save_tensors(staging / _RANDOM, random_states(trainee.device))
        write_json(staging / STATE, asdict(state))
    verify_folder(folder)
    write_text(output / LAST, folder.name + "\n")
    _point_at_best(output, progress)
    return folder


def adopt(output: Path, folder: Path, progress: Progress) -> None:
    """Let `last` and `best` name the checkpoint that a killed process saved and did not name.

    A run that resumes from its last step has nothing left to save, so it would never name the
    checkpoint. Then `delete_old` would treat it as one of the later checkpoints that remain when a
    run goes back to an earlier one.

    Args:
        output: run folder.
        folder: the checkpoint that the run resumes from.
        progress: the progress in that checkpoint.
    """
    if folder.resolve().parent != output.resolve():
        return
    last = _named_by(output / LAST)
    if last is None or step_of(output / last) < step_of(folder):
        write_text(output / LAST, folder.name + "\n")
    _point_at_best(output, progress)


def _point_at_best(output: Path, progress: Progress) -> None:
    # Checked at every save: a process may have been killed before it could name the best one.
    best = f"checkpoint-{progress.best_step}"
    if (output / best).is_dir() and _named_by(output / BEST) != best:
        write_text(output / BEST, best + "\n")


def _last_hash(output: Path) -> str | None:
    last = _named_by(output / LAST)
    try:
        return manifest_hash(output / last) if last else None
    except StorageError:
        return None


def delete_old(output: Path, keep: int | None) -> None:
    """Delete all checkpoints but the newest `keep`, the last written one, and the best one.

    Checkpoints with later steps than the last written one remain from before the run went back to
    an earlier checkpoint, so they count as the oldest.

    Args:
        output: run folder.
        keep: number of checkpoints to keep; None keeps all.
    """
    if keep is None:
        return
    last, best = _named_by(output / LAST), _named_by(output / BEST)
    reached = step_of(output / last) if last else 0
    by_age = sorted(checkpoints(output), key=lambda f: (step_of(f) <= reached, step_of(f)))
    for folder in by_age[:-keep]:
        if folder.name not in (last, best):
            delete_folder(folder)


def _named_by(pointer: Path) -> str | None:
    """Return the name of the checkpoint in the file `last` or `best`, if the run has that one."""
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    return name if name in {folder.name for folder in checkpoints(pointer.parent)} else None


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        folder: the checkpoint; None if the run has none.
        damaged: a line for each newer checkpoint that was passed over because it is damaged.
    """

    folder: Path | None
    damaged: tuple[str, ...] = ()


def find_checkpoint(output: Path, wanted: str) -> Found:
    """Find the checkpoint to resume from.

    Args:
        output: run folder.
        wanted: "latest", or the path of a checkpoint.

    Raises:
        InputError: the named checkpoint does not exist.
        StorageError: the named checkpoint is damaged, or all checkpoints of the run are.
    """
    if wanted != "latest":
        folder = Path(wanted)
        if not folder.is_dir():
            raise InputError(f"--resume {wanted}: no such checkpoint; name a checkpoint-N folder")
        read_state(folder)
        return Found(folder)
    damaged: list[str] = []
    for folder in _newest_first(output):
        try:
            read_state(folder)
            return Found(folder, tuple(damaged))
        except StorageError as error:
            damaged += error.faults
    if damaged:
        raise StorageError(*damaged)
    return Found(None)


def _newest_first(output: Path) -> list[Path]:
    """Return the checkpoints in the order in which to try them.

    A checkpoint saved right after `last`, by a process that was killed before it could name it,
    comes first. Then come `last` and the checkpoints before it; and then the later ones, which
    remain from before the run went back to an earlier checkpoint.
    """
    every = checkpoints(output)
    last = _named_by(output / LAST)
    if last is None:
        return every[::-1]
    reached, hash_ = step_of(output / last), _last_hash(output)
    heirs = [f for f in every if step_of(f) > reached and hash_ and _parent(f) == hash_]
    before = [f for f in every if step_of(f) <= reached]
    others = [f for f in every if step_of(f) > reached and f not in heirs]
    return heirs[::-1] + before[::-1] + others[::-1]


def _parent(folder: Path) -> str | None:
    try:
        return read_state(folder).parent
    except StorageError:
        return None


def read_state(folder: Path) -> StoredState:
    """Verify a checkpoint, and read its `state.json`.

    Raises:
        StorageError: a file was changed since it was written, or the folder was renamed.
    """
    verify_folder(folder)
    line = f"{folder / STATE}: not the state of a run; expected one"
    with raised_as(StorageError, line, of=(DataError, ValidationError)):
        state = TypeAdapter(StoredState).validate_python(read_json(folder / STATE))
    if folder.name != f"checkpoint-{state.progress.optimizer_step}":
        raise StorageError(
            f"{folder}: holds step {state.progress.optimizer_step}; expected the step its name "
            "says; give it its name back"
        )
    return state


def restore_checkpoint(folder: Path, trainee: Trainee) -> Progress:
    """Put a run back into the state of a checkpoint, and return its progress.

    Raises:
        StorageError: see `read_state`.
    """
    state = read_state(folder)
    if trainee.adapter.spec.variant.is_its_file:
        stored = read_adapter(folder)
        trainee.adapter.fill(stored.tensors, stored.whole, stored.magnitudes)
    else:
        trainee.adapter.restore(load_tensors(folder / _TRAINED))
    restore_optimizer(
        trainee.optimizer,
        trainee.adapter.parameters(),
        load_tensors(folder / _OPTIMIZER),
        state.optimizer_values,
    )
    if trainee.scaler.is_enabled() and state.scaler:
        trainee.scaler.load_state_dict(dict(state.scaler))
    restore_random_states(load_tensors(folder / _RANDOM), trainee.device)
    return state.progress

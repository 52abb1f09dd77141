"""Checkpoints: all a run needs to continue with the same bits.

A checkpoint is a folder `checkpoint-N` with the adapter in PEFT's format, the optimiser's
tensors, the random states and `state.json`, written whole by `storage.staged_folder`. The
text files `last` and `best` beside it name checkpoints.
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
from qlora_kit.errors import DataError, InputError, StorageError, raised_as
from qlora_kit.lora.adapter import read_adapter, save_adapter
from qlora_kit.lora.attach import Adapter
from qlora_kit.lora.files import BaseRecord
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
from qlora_kit.train.folder import BEST, LAST, checkpoints, step_of
from qlora_kit.train.optimizer import optimizer_tensors, restore_optimizer
from qlora_kit.train.random_states import random_states, restore_random_states

_STATE = "state.json"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"


@dataclass
class Progress:
    """Where a run stands; everything else follows from the configuration.

    Attributes:
        optimizer_step: steps done, skipped ones included.
        epoch: index of the current epoch.
        window: optimiser steps done in the current epoch.
        evaluated_step: the last step after which the validation rows were measured.
        best_loss: lowest validation loss so far, or None before the first evaluation.
        best_step: the step it was measured at.
        evaluations_without_gain: since the best one.
        skipped_steps: steps whose loss or gradient was not finite.
        skipped_in_a_row: of these, the latest without a sound step between.
        overflows_in_a_row: latest steps that the loss scaler skipped to find its scale.
        learns: whether every B has been seen to get a gradient.
        micro_batch_rows: what running out of memory has left of the micro-batch, or None.
        finished: whether the run reached its end.
    """

    optimizer_step: int = 0
    epoch: int = 0
    window: int = 0
    evaluated_step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    overflows_in_a_row: int = 0
    learns: bool = False
    micro_batch_rows: int | None = None
    finished: bool = False


@dataclass(frozen=True)
class StepPlan:
    """How many optimiser steps an epoch has, and the whole run."""

    per_epoch: int
    total: int


@dataclass(frozen=True)
class StoredState:
    """The content of `state.json`.

    Attributes:
        progress: where the run stood.
        identity: what decides its bits, value by name, see `train.resume`.
        total_steps: optimiser steps it was meant to have.
        optimizer_values: the optimiser's numbers that are no tensors, by parameter.
        scaler: state of the loss scaler; empty without one.
        parent: hash of the manifest of the checkpoint saved before, or None.
        versions: of the libraries that computed it.
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
    """What a checkpoint holds of a living run, and fills again."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return self.adapter.base.hardware.device


# ---------------------------------------------------------------- writing


def check_room(output: Path, trainable: int, plan: StepPlan, options: TrainConfig) -> None:
    """Check that the disk has room for the checkpoints to come.

    Args:
        output: run folder.
        trainable: number of trained parameters.
        plan: steps of the run.
        options: how often it saves, how many it keeps, what the optimiser's state is.

    Raises:
        StorageError: it has not.
    """
    saves = math.ceil(plan.total / (options.save_steps or plan.per_epoch))
    if options.save_total_limit is not None:
        # The best one is kept besides, and the newest is written before the oldest goes.
        saves = min(saves, options.save_total_limit + 2)
    missing = max(1, saves - len(checkpoints(output)))
    # Weights in fp32, and two moments of four bytes or one.
    bytes_each = trainable * (4 + (2 if options.optimizer.endswith("8bit") else 8))
    check_space(output, missing * bytes_each + trainable * 4, f"{missing} checkpoint(s)")


def save_checkpoint(
    output: Path,
    trainee: Trainee,
    record: BaseRecord,
    progress: Progress,
    identity: Mapping[str, Any],
    total_steps: int,
) -> Path:
    """Write `checkpoint-N`, read it back, then point `last` (and `best`, where it is) at it.

    Raises:
        StorageError: it could not be written; the previous checkpoint is untouched.
        OutOfMemory: the host has no memory for it; likewise.
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
        save_tensors(staging / _OPTIMIZER, tensors)
        save_tensors(staging / _RANDOM, random_states(trainee.device))
        write_json(staging / _STATE, asdict(state))
    verify_folder(folder)
    write_text(output / LAST, folder.name + "\n")
    _point_at_best(output, progress)
    return folder


def adopt(output: Path, folder: Path, progress: Progress) -> None:
    """Let `last` and `best` name what a killed process had saved and not yet named.

    A run that resumes from its last step has nothing left to save, so it would not name it
    either, and `delete_old` would take it for one that going back left behind.
    """
    if folder.resolve().parent != output.resolve():
        return
    last = _named_by(output / LAST)
    if last is None or step_of(output / last) < step_of(folder):
        write_text(output / LAST, folder.name + "\n")
    _point_at_best(output, progress)


def _point_at_best(output: Path, progress: Progress) -> None:
    # Not only when it is new: a process may have been killed before it could say so.
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
    """Delete all but the newest `keep` checkpoints, the last written and the best one.

    Later steps than the last written one's were left behind by going back to an earlier
    checkpoint, so they count as the oldest.
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
    """Return the checkpoint that `last` or `best` names, if it names one of this run."""
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    return name if name in {folder.name for folder in checkpoints(pointer.parent)} else None


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from, and those passed over because they are damaged."""

    folder: Path | None
    damaged: tuple[str, ...] = ()


def find_checkpoint(output: Path, wanted: str) -> Found:
    """Find the checkpoint to resume from.

    Args:
        output: run folder.
        wanted: "latest" or the path of a checkpoint.

    Raises:
        InputError: a named checkpoint does not exist.
        StorageError: a named checkpoint is damaged, or all of the run's are.
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

    First one that was saved just after `last`, by a process that was killed before it could
    say so; then `last` and what came before it; then what going back left behind.
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
    """Verify a checkpoint and read its `state.json`.

    Raises:
        StorageError: the checkpoint is not as it was written.
    """
    verify_folder(folder)
    line = f"{folder / _STATE}: not the state of a run; expected one"
    with raised_as(StorageError, line, of=(DataError, ValidationError)):
        state = TypeAdapter(StoredState).validate_python(read_json(folder / _STATE))
    if folder.name != f"checkpoint-{state.progress.optimizer_step}":
        raise StorageError(
            f"{folder}: holds step {state.progress.optimizer_step}; expected the step its name "
            "says; give it its name back"
        )
    return state


def restore_checkpoint(folder: Path, trainee: Trainee) -> Progress:
    """Put a run back to where a checkpoint was written, and return where that is.

    Raises:
        StorageError: the checkpoint is not as it was written.
    """
    state = read_state(folder)
    stored = read_adapter(folder)
    trainee.adapter.fill(stored.tensors, stored.saved)
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

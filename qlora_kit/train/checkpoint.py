"""Checkpoints: all a run needs to continue with the same bits.

A checkpoint is a folder `checkpoint-N` with the adapter in PEFT's format, the optimiser's
tensors, the random states and `state.json`, written whole by `storage.staged_folder`. The
text files `last` and `best` beside it name checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.errors import ConfigError, InputError, StorageError
from qlora_kit.lora.adapter import BaseRecord, read_adapter, save_adapter
from qlora_kit.lora.attach import Adapter
from qlora_kit.storage import (
    load_tensors,
    read_json,
    save_tensors,
    staged_folder,
    verify_folder,
    write_json,
    write_text,
)
from qlora_kit.train.folder import BEST, LAST, checkpoints, step_of
from qlora_kit.train.optimizer import optimizer_tensors, restore_optimizer

_STATE = "state.json"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"


@dataclass
class Progress:
    """Where a run stands; everything else follows from the configuration.

    Attributes:
        optimizer_step: steps done.
        epoch: index of the current epoch.
        window: optimiser steps done in the current epoch.
        best_loss: lowest validation loss so far, or None before the first evaluation.
        best_step: the step it was measured at.
        evaluations_without_gain: since the best one.
        finished: whether the run reached its end.
    """

    optimizer_step: int = 0
    epoch: int = 0
    window: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Resumable:
    """What must be equal for a run to continue with the same bits: value by name."""

    values: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Return one line for each value that differs from the stored one."""
        return [
            f"--resume: {name} was {stored.get(name)!r} and is now {value!r}; continue with the "
            "stored value, or start a new run"
            for name, value in self.values.items()
            if stored.get(name) != value
        ]


# ---------------------------------------------------------------- writing


def save_checkpoint(
    output: Path,
    adapter: Adapter,
    record: BaseRecord,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    progress: Progress,
    identity: Resumable,
) -> Path:
    """Write `checkpoint-N`, then point `last` (and `best`, where it is) at it.

    Raises:
        StorageError: it could not be written; the previous checkpoint is untouched.
    """
    folder = output / f"checkpoint-{progress.optimizer_step}"
    tensors, values = optimizer_tensors(optimizer, adapter.parameters())
    state = {
        "progress": asdict(progress),
        "identity": dict(identity.values),
        "optimizer_values": values,
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    with staged_folder(folder, replace=True) as staging:
        save_adapter(adapter, staging, record)
        save_tensors(staging / _OPTIMIZER, tensors)
        save_tensors(staging / _RANDOM, _random_states())
        write_json(staging / _STATE, state)
    write_text(output / LAST, folder.name + "\n")
    if progress.best_step == progress.optimizer_step:
        write_text(output / BEST, folder.name + "\n")
    return folder


def delete_old(output: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints, the last written and the best one."""
    if keep is None:
        return
    spared = {_named_by(output / LAST), _named_by(output / BEST)}
    for folder in checkpoints(output)[:-keep]:
        if folder.name not in spared:
            shutil.rmtree(folder)


def _named_by(pointer: Path) -> str | None:
    return pointer.read_text().strip() if pointer.is_file() else None


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


# ---------------------------------------------------------------- reading


def find_checkpoint(output: Path, wanted: str) -> Path | None:
    """Return the checkpoint to resume from, or None where a run has none yet.

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
        verify_folder(folder)
        return folder
    damaged: list[str] = []
    last = _named_by(output / LAST)
    # The last written first: a run that went back to an older checkpoint goes on from there.
    for folder in sorted(checkpoints(output), key=lambda f: (f.name != last, -step_of(f))):
        try:
            verify_folder(folder)
            return folder
        except StorageError as error:
            damaged += error.faults
    if damaged:
        raise StorageError(*damaged)
    return None


def read_progress(folder: Path) -> Progress:
    """Read how far a checkpoint's run had come."""
    return Progress(**read_json(folder / _STATE)["progress"])


def check_resumable(folder: Path, identity: Resumable) -> None:
    """Check that a run may continue from a checkpoint.

    Raises:
        ConfigError: it would not continue with the same bits; each difference is listed.
    """
    if differences := identity.differences(read_json(folder / _STATE)["identity"]):
        raise ConfigError(*differences)


def restore_checkpoint(
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    identity: Resumable,
) -> Progress:
    """Put a run back to where a checkpoint was written.

    Raises:
        ConfigError: see `check_resumable`.
    """
    check_resumable(folder, identity)
    state = read_json(folder / _STATE)
    adapter.fill(read_adapter(folder).tensors)
    tensors = load_tensors(folder / _OPTIMIZER)
    restore_optimizer(optimizer, adapter.parameters(), tensors, state["optimizer_values"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    random = load_tensors(folder / _RANDOM)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return Progress(**state["progress"])

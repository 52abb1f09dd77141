"""The folder of a run: which one, whose, and its checkpoints by name.

Knows names only, reads no tensor and imports no torch, so that a wrong `--output` is found
at once.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.config import Layer, read_config_file
from qlora_kit.errors import OutputError
from qlora_kit.storage import (
    LOCK,
    check_confined,
    check_writable,
    clean_up,
    is_sealed,
    only_writer,
    storage_errors,
)

LAST, BEST = "last", "best"
CONFIG = "training_config.yaml"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RUNS = Path("runs")
# What is said for one start of a run, and not for the next.
_OF_ONE_START = ("output", "overwrite", "resume", "allow_change")


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run folder, the oldest first."""
    found = [path for path in output.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step of a checkpoint from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def run_of(resume: str | None) -> Path | None:
    """Return the run folder that a named checkpoint belongs to, if it belongs to one."""
    folder = Path(resume).parent if resume not in (None, "latest") else None
    return folder if folder is not None and (folder / CONFIG).is_file() else None


def stored_layer(output: Path | None, resume: str | None) -> Layer | None:
    """Return the options of the run that is to be continued, so that none need be repeated.

    Args:
        output: its folder, if it is named.
        resume: "latest", a checkpoint, or None.

    Returns:
        The content of its `training_config.yaml`, or None where there is no such run.

    Raises:
        ConfigError: it is not readable.
    """
    folder = output or run_of(resume)
    if resume is None or folder is None or not (folder / CONFIG).is_file():
        return None
    check_confined(folder, OutputError)
    stored = read_config_file(folder / CONFIG)
    kept = {name: value for name, value in stored.values.items() if name not in _OF_ONE_START}
    return Layer(stored.origin, kept)


def is_run(folder: Path) -> bool:
    """Return whether a folder is one that a run writes to.

    A configuration alone is none: a user's own may have that name, beside all runs.
    """
    return all((folder / name).is_file() for name in (CONFIG, "tokenizer_config.json"))


def check_outside_runs(folder: Path, flag: str) -> None:
    """Check that nothing is put into a run, which `--overwrite` would delete with it.

    Args:
        folder: where something is to be written.
        flag: the option that names it.

    Raises:
        OutputError: it lies inside a run.
    """
    for parent in folder.resolve().parents:
        if is_run(parent):
            raise OutputError(
                f"{folder}: is inside the run {parent}, which --overwrite deletes with all that is "
                f"in it; expected a folder outside of it; name another {flag}"
            )


@contextlib.contextmanager
def claimed_run(
    output: Path | None, model: str, *, resume: str | None, overwrite: bool
) -> Iterator[Path]:
    """Yield the folder of a run, `runs/<model>-<n>` where none is named, held for us alone.

    What a killed process left half written in it is undone first. A folder that nothing was
    written to is removed again.

    Args:
        output: the folder that was asked for.
        model: names the folder where none was.
        resume: "latest", a checkpoint, or None.
        overwrite: an earlier run in the folder may be replaced, see `clear_run`.

    Raises:
        OutputError: it holds something and neither resuming nor overwriting was asked for,
            both were, it is inside another run, or overwriting would delete what is not a run.
        EnvironmentFault: another process writes there.
        StorageError: it cannot be made or written.
    """
    if resume and overwrite:
        raise OutputError("--resume and --overwrite contradict each other; pass one of them")
    output = output or run_of(resume)
    if output is None and resume:
        raise OutputError("--resume: which run? name its folder with --output")
    check_outside_runs(output or _RUNS, "--output")
    check_writable(output or _RUNS)
    with contextlib.ExitStack() as undo:
        folder = output or _next_run(model, undo)
        _make(folder, undo)
        # Or a stranger's run would be continued in files outside of it.
        check_confined(folder, OutputError)
        with only_writer(folder):
            clean_up(folder)
            if not resume:
                _check_free(folder, overwrite)
            yield folder


def _next_run(model: str, undo: contextlib.ExitStack) -> Path:
    """Make the next numbered folder; two runs that start together get two numbers."""
    _make(_RUNS, undo)
    number = 1
    with storage_errors(_RUNS):
        while True:
            folder = _RUNS / f"{model}-{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                undo.callback(_remove_empty, folder)
                return folder


def _make(folder: Path, undo: contextlib.ExitStack) -> None:
    """Make a folder and those it is in; `undo` removes the new ones that stay empty."""
    if folder.exists():
        return
    _make(folder.parent, undo)
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    undo.callback(_remove_empty, folder)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _check_free(folder: Path, overwrite: bool) -> None:
    if not _content(folder):
        return
    if not overwrite:
        raise OutputError(
            f"{folder}: not empty; continue that run with --resume, replace it with --overwrite, "
            "or name another --output"
        )
    if not (folder / CONFIG).is_file():
        raise OutputError(f"{folder}: --overwrite deletes a run, but this holds no {CONFIG}")
    for other in _folders_inside(folder):
        if is_sealed(other) or is_run(other):
            raise OutputError(
                f"{folder}: --overwrite deletes a run, but this holds {other}, which is none of "
                "its checkpoints; move that elsewhere, or name another --output"
            )


def _folders_inside(folder: Path) -> Iterator[Path]:
    """Yield the folders in a run, at any depth, but its checkpoints."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and not _CHECKPOINT.fullmatch(path.name):
            yield path
            yield from _folders_inside(path)


def _content(folder: Path) -> list[Path]:
    """Return what a run has written: all but the lock, and what marks it as a run last."""
    content = [path for path in folder.iterdir() if path.name != LOCK]
    return sorted(content, key=lambda path: (path.name == CONFIG, path.name))


def clear_run(folder: Path) -> None:
    """Delete an earlier run that `claimed_run` allowed to be replaced.

    Raises:
        StorageError: something of it cannot be deleted.
    """
    with storage_errors(folder):
        for path in _content(folder):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

"""The folder of a run: finds it, claims it for one process, and lists its checkpoints.

Knows the names of files only. Reads no tensor and imports no torch, so that a wrong `--output` is
found at once.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.config import Layer, read_config_file
from qlora_kit.errors import OutputError
from qlora_kit.launched import place
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
STATE = "state.json"
"""of a checkpoint"""
SWEEP = "sweep.yaml"
"""the options of a sweep, in the folder that has its runs"""
# What a run saves of its model's input: a tokenizer, or an image processor.
_BESIDE = ("tokenizer_config.json", "preprocessor_config.json")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RUNS = Path("runs")
# Options that hold for one start of a run, and not for the next.
_OF_ONE_START = ("output", "overwrite", "resume", "allow_change", "profile")


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run folder, the oldest first."""
    found = [path for path in output.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of)


def goes_on(output: Path, resume: str | None) -> bool:
    """Return whether a run that is started in a folder goes on from a checkpoint in it."""
    return resume is not None and bool(checkpoints(output))


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step of a checkpoint from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def run_of(resume: str | None) -> Path | None:
    """Return the folder of the run that a named checkpoint belongs to; None if there is none."""
    folder = Path(resume).parent if resume not in (None, "latest") else None
    return folder if folder is not None and (folder / CONFIG).is_file() else None


def stored_layer(output: Path | None, resume: str | None) -> Layer | None:
    """Return the options of the run to resume, so that the user need not repeat them.

    Args:
        output: the folder of the run, if the user named it.
        resume: "latest", a checkpoint, or None.

    Returns:
        The content of the run's `training_config.yaml`; None if there is no run to resume.

    Raises:
        ConfigError: the file cannot be read.
    """
    folder = output or run_of(resume)
    if resume is None or folder is None or not (folder / CONFIG).is_file():
        return None
    check_confined(folder, OutputError)
    stored = read_config_file(folder / CONFIG)
    kept = {name: value for name, value in stored.values.items() if name not in _OF_ONE_START}
    launched = place().count
    if launched > 1 and kept.get("devices") != str(launched):
        kept.pop("devices", None)  # the launcher says how many there are now
    return Layer(stored.origin, kept)


def is_run(folder: Path) -> bool:
    """Return whether a folder is the folder of a run.

    A configuration alone does not make it one: a user's own file may have that name.
    """
    is_named = any((folder / name).is_file() for name in _BESIDE)
    return is_named and (folder / CONFIG).is_file()


def check_outside_runs(folder: Path, flag: str) -> None:
    """Check that a folder is not inside a run, where `--overwrite` would delete it with the run.

    Args:
        folder: the folder to be written to.
        flag: the option that names the folder.

    Raises:
        OutputError: the folder lies inside a run.
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
    """Yield the folder of a run, which no other process can claim meanwhile.

    Without `output` it is `runs/<model>-<n>`. Files that a killed process left half written are
    cleaned up first. A new folder that stays empty is removed afterwards.

    Args:
        output: the folder that the user named.
        model: name of the model, for the name of the folder.
        resume: "latest", a checkpoint, or None.
        overwrite: whether an earlier run in the folder may be replaced, see `clear_run`.

    Raises:
        OutputError: the folder is not empty, and the user asked neither to resume nor to
            overwrite; or asked for both; or the folder is inside another run, or is that of a
            sweep; or overwriting would delete more than a run.
        EnvironmentFault: another process writes to the folder.
        StorageError: the folder cannot be made or written.
    """
    if resume and overwrite:
        raise OutputError("--resume and --overwrite contradict each other; pass one of them")
    output = output or run_of(resume)
    if output is None and resume:
        raise OutputError("--resume: which run? name its folder with --output")
    check_outside_runs(output or _RUNS, "--output")
    check_writable(output or _RUNS)
    with contextlib.ExitStack() as undo:
        folder = output or next_folder(_RUNS, model, undo)
        make_folder(folder, undo)
        # Otherwise a stranger's run could have links by which it writes to files outside of it.
        check_confined(folder, OutputError)
        with only_writer(folder):
            clean_up(folder)
            if (folder / SWEEP).is_file():
                raise OutputError(
                    f"{folder}: holds a sweep; expected a run; go on with that by qlora-kit sweep "
                    "--resume, or name another --output"
                )
            if not resume:
                _check_free(folder, overwrite)
            yield folder


def next_folder(parent: Path, model: str, undo: contextlib.ExitStack) -> Path:
    """Make the next numbered folder; two runs that start together get two numbers."""
    make_folder(parent, undo)
    number = 1
    with storage_errors(parent):
        while True:
            folder = parent / f"{model}-{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                undo.callback(_remove_empty, folder)
                return folder


def make_folder(folder: Path, undo: contextlib.ExitStack) -> None:
    """Make a folder and its parents; `undo` removes the new folders that stay empty."""
    if folder.exists():
        return
    make_folder(folder.parent, undo)
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    undo.callback(_remove_empty, folder)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _check_free(folder: Path, overwrite: bool) -> None:
    if not content_of(folder, CONFIG):
        return
    if not overwrite:
        raise OutputError(
            f"{folder}: not empty; continue that run with --resume, replace it with --overwrite, "
            "or name another --output"
        )
    if not (folder / CONFIG).is_file():
        raise OutputError(f"{folder}: --overwrite deletes a run, but this holds no {CONFIG}")
    for other in folders_inside(folder):
        if is_sealed(other) or is_run(other):
            raise OutputError(
                f"{folder}: --overwrite deletes a run, but this holds {other}, which is none of "
                "its checkpoints; move that elsewhere, or name another --output"
            )


def folders_inside(folder: Path) -> Iterator[Path]:
    """Yield the folders in a run at any depth, except its checkpoints."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and not _CHECKPOINT.fullmatch(path.name):
            yield path
            yield from folders_inside(path)


def content_of(folder: Path, marker: str) -> list[Path]:
    """Return the files and folders of a folder without the lock.

    Args:
        folder: the folder.
        marker: name of the file that says what the folder is; it comes last.
    """
    content = [path for path in folder.iterdir() if path.name != LOCK]
    return sorted(content, key=lambda path: (path.name == marker, path.name))


def clear_run(folder: Path) -> None:
    """Delete an earlier run that `claimed_run` allowed to be replaced, see `clear`."""
    clear(folder, CONFIG)


def clear(folder: Path, marker: str) -> None:
    """Delete the content of a folder but for its lock; the marker goes last.

    So a folder of which a kill has left a part is still known for what it is.

    Raises:
        StorageError: a file or folder of it cannot be deleted.
    """
    with storage_errors(folder):
        for path in content_of(folder, marker):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

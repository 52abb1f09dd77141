"""The folder of a sweep: its options, the state of its trials, and the claim of one process on it.

    sweep.yaml              what is searched; `--resume` needs no more than the folder
    sweep.json              the trials and what became of them
    sweep.html              the page
    trial-01-rank=8_…/      a run, like any other

Reads no tensor and imports no torch, so that a wrong `--output` is found at once.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from qlora_kit.config import Layer, SweepConfig, read_config_file
from qlora_kit.errors import DataError, OutputError, StorageError, raised_as
from qlora_kit.redact import redacted_values
from qlora_kit.storage import (
    check_confined,
    check_writable,
    clean_up,
    is_sealed,
    only_writer,
    read_json,
    write_json,
    write_text,
)
from qlora_kit.train.folder import (
    CONFIG,
    SWEEP,
    check_outside_runs,
    clear,
    content_of,
    folders_inside,
    is_run,
    make_folder,
    next_folder,
)

RECORDS, PAGE = "sweep.json", "sweep.html"
_SWEEPS = Path("sweeps")
_TRIAL = re.compile(r"trial-\d+-.+")
_OF_ONE_START = ("output", "overwrite", "resume")

State = Literal["waiting", "running", "finished", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """What became of a trial.

    Attributes:
        name: the folder of its run.
        values: the values of the options that the sweep varies.
        state: waiting; running, also where it was stopped or killed; finished; failed.
        fault: why it failed, in one line.
        exit_code: the exit code of that error.
        figures: what it measured, by name; see `recipe.ranking`.
    """

    name: str
    values: Mapping[str, Any]
    state: State = "waiting"
    fault: str | None = None
    exit_code: int | None = None
    figures: Mapping[str, Any] | None = None


# ---------------------------------------------------------------- the options


def stored_sweep(output: Path | None, resume: str | None) -> Layer | None:
    """Return the options of the sweep to resume, so that the user need not repeat them.

    Raises:
        ConfigError: the file cannot be read.
    """
    if resume is None or output is None or not (output / SWEEP).is_file():
        return None
    check_confined(output, OutputError)
    return read_config_file(output / SWEEP)


def write_options(folder: Path, config: SweepConfig) -> None:
    """Write the options that a sweep was given, for `stored_sweep`."""
    given = config.model_dump(mode="json", exclude_unset=True, exclude=set(_OF_ONE_START))
    write_text(folder / SWEEP, yaml.safe_dump(redacted_values(given), sort_keys=False))


# ---------------------------------------------------------------- the trials


def read_records(folder: Path) -> dict[str, TrialRecord]:
    """Return the records of the trials by name; none before the first is written.

    Raises:
        StorageError: the file is not as it was written.
    """
    path = folder / RECORDS
    if not path.is_file():
        return {}
    line = f"{path}: not as it was written; expected the trials of the sweep; delete it, and what "
    line += "became of them is read from their folders"
    with raised_as(StorageError, line, of=(DataError, ValidationError, TypeError, KeyError)):
        found = TypeAdapter(list[TrialRecord]).validate_python(read_json(path)["trials"])
    return {record.name: record for record in found}


def write_records(folder: Path, told: Mapping[str, Any], records: list[TrialRecord]) -> None:
    """Write the records of the trials, and what is told of the whole sweep."""
    trials = [asdict(record) for record in records]
    write_json(folder / RECORDS, redacted_values({**told, "trials": trials}))


# ---------------------------------------------------------------- the claim


@contextlib.contextmanager
def claimed_sweep(
    output: Path | None, model: str, *, resume: str | None, overwrite: bool
) -> Iterator[Path]:
    """Yield the folder of a sweep, which no other process can claim meanwhile.

    Without `output` it is `sweeps/<model>-<n>`. A new folder that stays empty is removed
    afterwards.

    Args:
        output: the folder that the user named.
        model: name of the model, for the name of the folder.
        resume: "latest", or None.
        overwrite: whether an earlier sweep in the folder may be replaced, see `clear_sweep`.

    Raises:
        OutputError: the folder is not empty, and the user asked neither to resume nor to
            overwrite; or asked for both; or it holds a run or is inside one; or overwriting would
            delete more than a sweep.
        EnvironmentFault: another process writes to the folder.
        StorageError: the folder cannot be made or written.
    """
    if resume and overwrite:
        raise OutputError("--resume and --overwrite contradict each other; pass one of them")
    if output is None and resume:
        raise OutputError("--resume: which sweep? name its folder with --output")
    check_outside_runs(output or _SWEEPS, "--output")
    check_writable(output or _SWEEPS)
    with contextlib.ExitStack() as undo:
        folder = output or next_folder(_SWEEPS, model, undo)
        make_folder(folder, undo)
        check_confined(folder, OutputError)
        with only_writer(folder):
            clean_up(folder)
            _check_content(folder, resume=bool(resume), overwrite=overwrite)
            yield folder


def _check_content(folder: Path, *, resume: bool, overwrite: bool) -> None:
    content = content_of(folder, SWEEP)
    if not content:
        return
    if not (resume or overwrite):
        raise OutputError(
            f"{folder}: not empty; continue that sweep with --resume, replace it with --overwrite, "
            "or name another --output"
        )
    if not (folder / SWEEP).is_file():
        is_of_run = (folder / CONFIG).is_file()
        found = "holds a run" if is_of_run else f"is not empty and holds no {SWEEP}"
        raise OutputError(f"{folder}: {found}; expected a sweep; name another --output")
    if overwrite:
        _check_only_sweep(folder, content)


def _check_only_sweep(folder: Path, content: list[Path]) -> None:
    """Check that a folder holds nothing but a sweep, whose trials hold nothing but their runs."""
    for path in content:
        is_trial = path.is_dir() and not path.is_symlink() and _TRIAL.fullmatch(path.name)
        if not is_trial and path.name not in (SWEEP, RECORDS, PAGE):
            raise _holds_more(folder, path)
        for other in folders_inside(path) if is_trial else ():
            if is_sealed(other) or is_run(other):
                raise _holds_more(folder, other)


def _holds_more(folder: Path, other: Path) -> OutputError:
    return OutputError(
        f"{folder}: --overwrite deletes a sweep, but this holds {other}, which is none of its "
        "trials; move that elsewhere, or name another --output"
    )


def clear_sweep(folder: Path) -> None:
    """Delete an earlier sweep that `claimed_sweep` allowed to be replaced, see `folder.clear`."""
    clear(folder, SWEEP)

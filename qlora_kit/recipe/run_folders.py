"""Finds the runs below a folder, and reads what their files say of them.

Takes a folder; returns `ListedRun` records, and a line for each folder that is passed over. The
folders may be a stranger's, or damaged: what is read of a file is bounded, links are not followed,
and no text is trusted. Imports no torch, and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.config import TrainConfig, read_config_file
from qlora_kit.errors import OutputError, QloraKitError
from qlora_kit.lora.files import WEIGHTS
from qlora_kit.redact import one_line
from qlora_kit.report import log
from qlora_kit.report.curve import Curve, Point, is_figure
from qlora_kit.report.facts import base_name, setting_text
from qlora_kit.report.memory import ACCOUNT
from qlora_kit.report.page import RUN_PAGE
from qlora_kit.report.run_list import Best, ListedRun, State
from qlora_kit.storage import (
    check_confined,
    is_locked,
    parse_json,
    read_json,
    read_last_lines,
    storage_errors,
)
from qlora_kit.train.best import LOSS, falls
from qlora_kit.train.folder import CONFIG, STATE, checkpoints, is_run

# Folders of sweeps and of projects may stand between the folder that is named and its runs.
_MOST_LEVELS = 3
_MOST_RUNS = 2000
# YAML is read slowly, so a page of options is all that it may be.
_MOST_YAML_BYTES = 2**18
_MOST_FILE_BYTES = 16 * 2**20
_LATEST = 32_503_680_000.0
"""the year 3000, in seconds since 1970"""
# A log of a million steps has 300 MB; its end is enough, and of that some rows, evenly spread.
_MOST_LOG_BYTES = 32 * 2**20
_MOST_ROWS = 1000
_MOST_CHARACTERS = 200
# Options that may be paths of this machine, of which the last part is the name.
_PATHS = ("model", "data", "validation", "chat_template")


@dataclass(frozen=True)
class Found:
    """The runs below a folder, and a line for each folder that is passed over."""

    runs: tuple[ListedRun, ...]
    passed_over: tuple[str, ...]


def find_runs(folder: Path) -> Found:
    """Read the runs below a folder, or the folder itself if it is one.

    Raises:
        StorageError: the folder cannot be listed.
    """
    runs: list[ListedRun] = []
    passed: list[str] = []
    with storage_errors(folder):
        is_alone = is_run(folder)
    for path in [folder] if is_alone else _run_folders(folder, passed, _MOST_LEVELS):
        if len(runs) == _MOST_RUNS:
            passed.append(f"{folder}: more than {_MOST_RUNS:,} runs; the rest is not read")
            break
        name = str(path.relative_to(folder)) if path != folder else folder.absolute().name
        try:
            runs.append(_read_settled(path, one_line(name)))
        except QloraKitError as error:
            passed.append(str(error.faults[0]))
    return Found(tuple(runs), tuple(map(one_line, passed)))


def _run_folders(folder: Path, passed: list[str], levels: int) -> Iterator[Path]:
    """Yield the folders of runs, by name; add a line to `passed` for each that holds none."""
    with storage_errors(folder), os.scandir(folder) as found:
        entries = sorted((entry for entry in found if entry.name[0] != "."), key=lambda e: e.name)
    for entry in entries:
        path = folder / entry.name
        if _as_text(entry.name) != entry.name:
            passed.append(f"{folder}: {_as_text(entry.name)}: its name is no text; rename it")
            continue
        if entry.is_symlink():
            if os.path.isdir(path):
                passed.append(f"{path}: a link, which is not followed; name its target to list it")
            continue
        if not entry.is_dir(follow_symlinks=False):
            continue
        try:
            yield from _runs_at(path, passed, levels)
        except QloraKitError as error:
            passed.append(str(error.faults[0]))


def _as_text(text: str) -> str:
    """Return a text that can be written: bytes that are none, and halves of characters, escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _runs_at(path: Path, passed: list[str], levels: int) -> list[Path]:
    with storage_errors(path):
        if is_run(path):
            return [path]
    within: list[str] = []
    runs = [*_run_folders(path, within, levels - 1)] if levels > 1 else []
    # Of a folder without a run one line is enough, however many folders are in it.
    passed += within if runs else [f"{path}: no run, and none in it"]
    return runs


# ---------------------------------------------------------------- one run


def _read_settled(folder: Path, name: str) -> ListedRun:
    """Read a run; twice, if it is one that goes on and deletes a checkpoint meanwhile."""
    try:
        return _read(folder, name)
    except QloraKitError:
        if not is_locked(folder):
            raise
    return _read(folder, name)


def _read(folder: Path, name: str) -> ListedRun:
    """Read a run.

    Raises:
        QloraKitError: a file of it is damaged, or no plain file inside of it.
    """
    check_confined(folder, OutputError)
    settings = _settings(folder / CONFIG)
    metric = settings.get("best_metric", LOSS)
    rows = _log(folder / log.NAME)
    progress, total = _last_checkpoint(folder)
    predicted, measured = _memory(folder / ACCOUNT)
    steps = [row["optimizer_step"] for row in rows.all() if is_figure(row.get("optimizer_step"))]
    return ListedRun(
        name=name,
        folder=folder,
        state=_state(folder, progress),
        settings=settings,
        written=_written(folder),
        step=round(max(steps)) if steps else None,
        total_steps=total or _whole(settings.get("max_steps")),
        best=_best(rows, metric),
        last_loss=next((row["loss"] for row in reversed(rows.steps) if _has(row, "loss")), None),
        tokens_per_second=_speed(rows.steps),
        predicted_bytes=predicted,
        measured_bytes=measured,
        has_page=(folder / RUN_PAGE).is_file(),
        losses=_curve(rows.steps, "loss"),
        evaluations=_curve(rows.evaluations, _key(metric)),
    )


def _settings(path: Path) -> dict[str, str]:
    _check_size(path, _MOST_YAML_BYTES)
    values = read_config_file(path).values
    known = [name for name in TrainConfig.model_fields if name in values]
    texts = {name: _short(setting_text(values[name])) for name in known}
    return texts | {name: base_name(texts[name]) for name in _PATHS if name in texts}


def _short(text: str) -> str:
    short = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
    return one_line(_as_text(short))


def _state(folder: Path, progress: Mapping[str, Any]) -> State:
    locked = is_locked(folder)
    if locked:
        return "running"
    if progress.get("finished") is True and (folder / WEIGHTS).is_file():
        return "finished"
    return "stopped" if locked is None else "killed"


def _last_checkpoint(folder: Path) -> tuple[Mapping[str, Any], int | None]:
    """Return the progress in the newest checkpoint, and the steps that the run was to have."""
    found = checkpoints(folder)
    path = found[-1] / STATE if found else folder / STATE
    state = _record(path)
    return _record_in(state, "progress"), _whole(state.get("total_steps"))


def _memory(path: Path) -> tuple[int | None, int | None]:
    """Return the predicted and the measured peak of the same memory.

    On a GPU that is the run's; on a CPU, where a process holds more than tensors, the rehearsed
    step's.
    """
    account = _record(path)
    predicted = _whole(_record_in(account, "predicted").get("predicted_peak_bytes"))
    allocated = _whole(_record_in(account, "run").get("peak_allocated_bytes"))
    rehearsal = _record_in(account, "rehearsal")
    measured = _whole(rehearsal.get("measured_peak_bytes"))
    if allocated is not None or measured is None:
        return predicted, allocated
    return _whole(rehearsal.get("predicted_peak_bytes")), measured


def _written(folder: Path) -> float:
    path = folder / log.NAME
    with storage_errors(path):
        written = (path if path.is_file() else folder / CONFIG).stat().st_mtime
    return min(max(written, 0.0), _LATEST)


# ---------------------------------------------------------------- the log


@dataclass(frozen=True)
class _LogRows:
    """Rows of a log: some of its steps and evaluations, and the best evaluation if there is one."""

    steps: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    best: Mapping[str, Any] | None = None

    def all(self) -> list[Mapping[str, Any]]:
        return [*self.steps, *self.evaluations]


def _log(path: Path) -> _LogRows:
    if not path.is_file():
        return _LogRows()
    lines = read_last_lines(path, _MOST_LOG_BYTES)
    steps = [line for line in lines if b'"learning_rate"' in line]
    evaluations = [line for line in lines if b'"eval_loss"' in line]
    best = [line for line in evaluations if b'"is_best": true' in line]
    return _LogRows(
        [_row(line, path) for line in _spread(steps)],
        [_row(line, path) for line in _spread(evaluations)],
        _row(best[-1], path) if best else None,
    )


def _spread(lines: Sequence[bytes]) -> Sequence[bytes]:
    """Return at most `_MOST_ROWS` of the lines, evenly spread; the last one always."""
    stride = -(-len(lines) // _MOST_ROWS)
    return lines[::-1][::stride][::-1] if stride > 1 else lines


def _row(line: bytes, path: Path) -> Mapping[str, Any]:
    row = parse_json(line.decode(errors="replace"), str(path))
    return row if isinstance(row, dict) else {}


def _best(rows: _LogRows, metric: str) -> Best | None:
    if rows.best is None or not _has(rows.best, _key(metric)):
        return None
    return Best(metric, rows.best[_key(metric)], falls(metric))


def _key(metric: str) -> str:
    return f"eval_{metric}"


def _speed(steps: Sequence[Mapping[str, Any]]) -> float | None:
    timed = [row for row in steps if _has(row, "tokens") and _has(row, "step_seconds")]
    seconds = sum(row["step_seconds"] for row in timed)
    speed = sum(row["tokens"] for row in timed) / seconds if seconds > 0 else None
    return speed if is_figure(speed) else None


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    curve = Curve()
    for row in rows:
        curve.add(row.get("optimizer_step"), row.get(key))
    return curve.points


# ---------------------------------------------------------------- values of a stranger


def _record(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file; an empty one where there is no file, or no object in it."""
    if not path.is_file():
        return {}
    _check_size(path, _MOST_FILE_BYTES)
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _record_in(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _check_size(path: Path, most_bytes: int) -> None:
    with storage_errors(path):
        size = path.stat().st_size
    if size > most_bytes:
        raise OutputError(
            f"{path}: {size / 1e6:,.1f} MB; expected the file of a run, of at most "
            f"{most_bytes / 1e6:,.1f} MB; move the folder elsewhere"
        )


def _whole(value: Any) -> int | None:
    """Return a number of bytes or steps; None for what is none."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        value = int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 < value < 10**18 else None


def _has(row: Mapping[str, Any], key: str) -> bool:
    return is_figure(row.get(key))

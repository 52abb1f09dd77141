"""docs/runs.md against the code: the files of a run, the fields of its log, its metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import EVALUATED, PROJECT, RUN_FILES, SKIPPED, STEP

from qlora_kit.config import TrainConfig
from qlora_kit.events import (
    CheckpointSaved,
    Event,
    MicroBatchHalved,
    RunFinished,
    RunStarted,
)
from qlora_kit.report.log import NAME, Log
from qlora_kit.report.trackers import metrics_of

PAGE = (PROJECT / "docs" / "runs.md").read_text(encoding="utf-8")

HALVED = MicroBatchHalved(2, 8, 4)
LOGGED = {
    "Steps": STEP, "Evaluations": EVALUATED, "Skipped steps": SKIPPED,
    "Halved micro-batches": HALVED,
}  # fmt: skip
TYPES = {
    "integer": int, "number": (float, str), "boolean": bool, "list of integers": list,
}  # fmt: skip


def table_under(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading of the page."""
    text = re.split(rf"^#+ {re.escape(heading)}\n", PAGE, flags=re.MULTILINE)[1]
    lines = re.split(r"^#", text, flags=re.MULTILINE)[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def row_of(event: Event, folder: Path) -> dict[str, object]:
    Log(folder)(event)
    return json.loads((folder / NAME).read_text().splitlines()[-1])


@pytest.mark.parametrize("heading", LOGGED)
def test_the_log_has_the_fields_that_are_documented(heading: str, tmp_path: Path) -> None:
    row = row_of(LOGGED[heading], tmp_path)
    documented = {cells[0].strip("`"): cells[1] for cells in table_under(heading)}
    assert list(row) == list(documented)
    for name, value in row.items():
        assert isinstance(value, TYPES[documented[name]]), name


@pytest.mark.parametrize(("heading", "field"), [
    ("Steps", "learning_rate"), ("Evaluations", "eval_loss"), ("Skipped steps", "rows"),
    ("Halved micro-batches", "rows_now"),
])  # fmt: skip
def test_one_field_tells_what_kind_a_row_is_of(heading: str, field: str, tmp_path: Path) -> None:
    having = [name for name, event in LOGGED.items() if field in row_of(event, tmp_path)]
    assert having == [heading]


def test_what_is_not_finite_has_its_name_in_the_log(tmp_path: Path) -> None:
    row = row_of(SKIPPED, tmp_path)
    assert (row["loss"], row["grad_norm"]) == ("nan", "inf")


def test_other_events_leave_no_row(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log(STEP)
    for event in (RunStarted(2, 4, 1.0, 1), CheckpointSaved(1, "x"), RunFinished(1, "done", 1.0)):
        log(event)
    assert len((tmp_path / NAME).read_text().splitlines()) == 1


def test_every_file_of_a_run_is_documented() -> None:
    named = re.findall(r"`([^`]+)`", " ".join(cells[0] for cells in table_under("The folder")))
    documented = {"checkpoint-N/" if name.startswith("checkpoint") else name for name in named}
    found = {"checkpoint-N/" if name.startswith("checkpoint") else name for name in RUN_FILES}
    assert found <= documented
    # Files that only some runs leave.
    assert documented - found <= {"profile/", "tensorboard/", "wandb/", "wandb.json"}


def test_every_metric_is_documented() -> None:
    named = re.findall(r"`([^`]+)`", " ".join(cells[0] for cells in table_under("Trackers")))
    config = TrainConfig()
    sent = [name for event in (STEP, SKIPPED, EVALUATED) for name in metrics_of(event, config)[1]]
    assert sorted(sent) == sorted(named)

"""The training loss of each source in log, terminal and trackers: since the line before."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support import STEP

from qlora_kit.config import TrainConfig
from qlora_kit.events import StepFinished
from qlora_kit.report.log import NAME, Log, read_log
from qlora_kit.report.source_losses import SourceLosses, described, rows_of_sources
from qlora_kit.report.terminal import Terminal
from qlora_kit.report.trackers import metrics_of

SUMS = ({"a": (6.0, 3.0), "b": (1.0, 4.0)}, {"a": (2.0, 1.0)}, {"a": (9.0, 1.0), "b": (5.0, 8.0)})
"""summed losses and weights of three steps, the second without a row of b"""


def steps() -> list[StepFinished]:
    return [replace(STEP, optimizer_step=n, sources=each) for n, each in enumerate(SUMS, 1)]


def test_a_row_of_the_log_has_the_means_since_the_row_before(tmp_path: Path) -> None:
    log = Log(tmp_path, every=3)
    for step in steps():
        log(step)
    log(replace(STEP, optimizer_step=6))
    rows = read_log(tmp_path / NAME)
    assert [row.get("source_losses") for row in rows] == [
        {"a": 2.0, "b": 0.25},
        {"a": 11.0 / 2, "b": 0.625},
        None,
    ]
    assert all("sources" not in row for row in rows)
    assert rows_of_sources(rows) == [("a", "2.0000", "5.5000"), ("b", "0.2500", "0.6250")]


def test_the_terminal_has_them_at_the_end_of_a_line() -> None:
    text = io.StringIO()
    terminal = Terminal(Console(file=text, width=200))
    for step in steps():
        terminal(step)
    lines = [line for line in text.getvalue().splitlines() if line.startswith("step")]
    assert lines[0].endswith("GB  a 2.0000  b 0.2500")
    assert lines[1].endswith("GB  a 2.0000")
    assert described({str(n): 1.0 for n in range(6)}).endswith("  3 1.0000  and 2 more")


@pytest.mark.parametrize("every", [1, 3])
def test_trackers_have_them_where_the_log_has(every: int) -> None:
    config, sources = TrainConfig(logging_steps=every), SourceLosses()
    told = []
    for step in steps():
        sources.add(step)
        found = metrics_of(step, config, sources)
        if found is not None:
            told.append((found[0], found[1]["train/loss_a"]))
    assert told == ([(1, 2.0), (2, 2.0), (3, 9.0)] if every == 1 else [(1, 2.0), (3, 5.5)])

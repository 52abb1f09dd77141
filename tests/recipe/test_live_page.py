"""`report.html` while a run goes on: real runs in children, watched, killed, stopped, resumed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.children import Child, start
from faults.moments import at_event, on_events
from faults.runs import TOTAL_STEPS, Sample, command, differences, resumed
from sampled import shared_sample

from qlora_kit.events import Event, RunStarted, StepFinished

REFRESH = '<meta http-equiv="refresh"'


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A run of 30 steps, done once without a fault and with the page as it comes."""
    return shared_sample(tmp_path_factory)


def started(sample: Sample, output: Path, prepare: Callable[[], None], *more: str) -> Child:
    """Start the run in a child that writes its page after each step."""

    def do() -> None:
        from qlora_kit.report import live_page

        live_page.EVERY_SECONDS, live_page._REST = 0.0, 0
        prepare()
        command(sample.arguments(output, *more))

    return start(do, output.with_suffix(".streams"))


def page_of(output: Path) -> str:
    return (output / "report.html").read_text(encoding="utf-8")


def step_on(page: str) -> int:
    """Return the step that a page says is done; 0 before the first."""
    found = re.search(rf"<td>step</td><td>(\d+) of {TOTAL_STEPS} ", page)
    return int(found[1]) if found else 0


def lines_on(page: str) -> list[int]:
    """Return the number of points of each line of the first chart."""
    svg = page.partition("<svg")[2].partition("</svg>")[0]
    return [1 + path.count("L") for path in re.findall(r'd="(M[^"]*)"', svg)]


def test_the_page_is_there_from_the_first_step_and_follows_the_run(
    sample: Sample, tmp_path: Path
) -> None:
    output, seen = tmp_path / "run", dict[int, str]()

    def slow_down() -> None:
        on_events(lambda event: time.sleep(0.05) if isinstance(event, StepFinished) else None)

    child = started(sample, output, slow_down)
    while not child.ends_within(0.01):
        if (output / "report.html").is_file():
            page = page_of(output)
            seen.setdefault(step_on(page) if REFRESH in page else -1, page)
    ended = child.wait()
    assert ended.code == 0, ended.errors
    going_on = [step for step in seen if step >= 0]
    assert 0 <= min(going_on) <= 2
    assert len(going_on) > TOTAL_STEPS / 2, "it changes during the run"
    for step in going_on:
        assert seen[step].rstrip().endswith("</html>"), "a reader sees a whole page at any moment"
    late = seen[max(going_on)]
    for words in ("Last written", "left</td>", "tokens/s", "validation loss", "checkpoint-",
                  "Sample 1", "<td>rank</td><td>4</td>"):  # fmt: skip
        assert words in late, words
    assert lines_on(late)[:2] == [max(going_on)] * 2, "each step is on the curve"
    assert REFRESH not in page_of(output)
    assert "<h2>Results</h2>" in page_of(output)
    assert differences(output, sample.unbroken) == [], "no bit of the run is changed"


def test_a_killed_run_leaves_a_whole_page_and_a_resumed_one_takes_up_its_curve(
    sample: Sample, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    ended = started(sample, output, lambda: at_event(StepFinished, 13, kill)).wait()
    assert ended.code == 128 + signal.SIGKILL
    page = page_of(output)
    assert page.rstrip().endswith("</html>")
    assert step_on(page) == 13
    assert REFRESH in page
    written = re.search(r"Last written (\S+ \S+ \S+)\. .* more than 1 min 00 s ago", page)
    assert written is not None
    assert written[1].startswith(time.strftime("%Y-%m-%d"))

    # The resumed run begins after the checkpoint of step 12, and is killed again at once.
    kill_again = lambda: at_event(StepFinished, 1, kill)  # noqa: E731
    started(sample, output, kill_again, "--resume").wait()
    page = page_of(output)
    assert step_on(page) == 13
    assert lines_on(page)[0] == 13
    assert resumed(sample, output, tmp_path / "streams") == []
    assert REFRESH not in page_of(output)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_page_of_a_stopped_run_says_so_and_is_not_loaded_again(
    sample: Sample, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "run"
    stop = lambda: os.kill(os.getpid(), number)  # noqa: E731
    ended = started(sample, output, lambda: at_event(StepFinished, 5, stop)).wait()
    assert ended.code == code
    page = page_of(output)
    assert REFRESH not in page
    assert f"Stopped by {number.name}" in page
    assert f"qlora-kit train --output {output} --resume" in page
    assert step_on(page) == 5


def test_the_page_of_a_run_that_ends_in_an_error_says_which(sample: Sample, tmp_path: Path) -> None:
    output = tmp_path / "run"

    def spoil() -> None:
        from faults.moments import at_call

        def fail() -> None:
            raise RuntimeError("no <b>luck</b>")

        at_call("qlora_kit.report.plot:draw_loss", 1, fail)

    ended = started(sample, output, spoil).wait()
    assert ended.code == 1
    page = page_of(output)
    assert REFRESH not in page
    assert "Ended by an error (RuntimeError)" in page
    assert resumed(sample, output, tmp_path / "streams") == []


def test_a_page_that_cannot_be_written_is_one_notice_and_changes_no_bit(
    sample: Sample, tmp_path: Path
) -> None:
    output = tmp_path / "run"

    def in_the_way() -> None:
        """Put a folder where the page belongs, until the steps are done."""

        def listen(event: Event) -> None:
            if isinstance(event, RunStarted):
                (output / "report.html").unlink()
                (output / "report.html").mkdir()
            elif isinstance(event, StepFinished) and event.optimizer_step == TOTAL_STEPS:
                (output / "report.html").rmdir()

        on_events(listen)

    ended = started(sample, output, in_the_way).wait()
    assert ended.code == 0, ended.errors
    notices = [line for line in ended.output.splitlines() if "page of the run" in line]
    assert len(notices) == 1
    assert "is not written" in notices[0]
    assert "is a directory; " in notices[0]
    assert "<h2>Results</h2>" in page_of(output)
    assert differences(output, sample.unbroken) == []

"""The page of a run that goes on, from its events; real runs are in `recipe/test_live_page.py`."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import EVALUATED, SKIPPED, STEP

from qlora_kit.config import TrainConfig
from qlora_kit.errors import NumericsError
from qlora_kit.events import (
    CheckpointSaved,
    Event,
    MicroBatchHalved,
    Notice,
    RunFinished,
    RunStarted,
)
from qlora_kit.report import live_page
from qlora_kit.report.facts import RunSummary
from qlora_kit.report.live_page import LivePage
from qlora_kit.report.log import Log
from qlora_kit.report.so_far import span_text

SECRET = "hf_" + "abcDEF123" * 4
HOSTILE = '<script>alert("x")</script><img src="https://evil.example/x.png">'
SAMPLES = [(("prompt", f"Q {HOSTILE}"), ("in the data", "A"), ("before", SECRET))]


def live(folder: Path, heard: list[Event] | None = None, **changes: Any) -> LivePage:
    summary = RunSummary.of(
        TrainConfig(rank=8), "tiny", (("data", HOSTILE),), (), {}, ("qlora-kit train --resume",)
    )
    arguments: dict[str, Any] = {"on_gpu": False, "predicted_bytes": None}
    announce = (heard if heard is not None else []).append
    return LivePage(folder, summary, SAMPLES, announce=announce, **{**arguments, **changes})


def text_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a page be written at each event."""
    monkeypatch.setattr(live_page, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(live_page, "_REST", 0)


EVENTS: tuple[Event, ...] = (
    RunStarted(1, 40, 2.0),
    STEP,
    replace(STEP, optimizer_step=2, epoch=0.1, loss=1.25),
    EVALUATED,
    replace(EVALUATED, optimizer_step=2, loss=2.5, is_best=False, metrics={"macro_f1": 0.75}),
    SKIPPED,
    MicroBatchHalved(3, 8, 4),
    CheckpointSaved(2, "runs/x/checkpoint-2"),
)


@pytest.mark.usefixtures("at_once")
def test_the_page_tells_all_that_the_events_did(tmp_path: Path) -> None:
    with live(tmp_path) as page:
        assert "Preparing the first step" in text_of(tmp_path)
        for event in EVENTS:
            page(event)
        text = text_of(tmp_path)
        for words in (
            "Training</p>", "<td>step</td><td>2 of 40 (5%), epoch 0.10 of 2.00</td>",
            "1.2500 in step 2", "2.5000 after step 2; the best checkpoint has 2.0000, step 1",
            "<td>macro f1</td><td>0.7500</td>", "90 tokens/s", "18 in this start",
            "<td>memory</td><td>1.00 GB</td>", "<td>checkpoint</td><td>checkpoint-2</td>",
            "skipped: loss nan", "out of memory: 4 row(s) at a time from here, of 8",
            "since this start, about", "width: 5.0%", '<meta http-equiv="refresh" content="0">',
        ):  # fmt: skip
            assert words in text, words
        page(RunFinished(40, "all steps done", 1.0))
        assert "All steps done; the page of the finished run follows" in text_of(tmp_path)


@pytest.mark.usefixtures("at_once")
def test_a_page_loads_nothing_escapes_everything_and_has_no_secret(tmp_path: Path) -> None:
    with live(tmp_path) as page:
        for event in EVENTS:
            page(event)
    text = text_of(tmp_path)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert SECRET not in text
    assert "default-src 'none'" in text
    assert not re.findall(r"(?:src|href)=", text.replace("img src=&#34;https", ""))


def test_a_resumed_run_goes_on_with_the_curve_of_its_log(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for step in range(1, 21):
        log(replace(STEP, optimizer_step=step))
    with live(tmp_path) as page:
        log(RunStarted(16, 40, 2.0))
        page(RunStarted(16, 40, 2.0))
        page._write()
        text = text_of(tmp_path)
    assert "15 of 40 (38%)" in text
    assert "<td>checkpoint</td><td>checkpoint-15</td>" in text
    path = re.findall(r'<path class="faint c0" d="([^"]+)"', text)[0]
    assert path.count("L") == 14
    assert "in this start" not in text, "tokens and speed are of this start alone"


def test_a_page_is_written_at_most_so_often(tmp_path: Path) -> None:
    with live(tmp_path) as page:
        begun = (tmp_path / "report.html").stat().st_mtime_ns
        page(RunStarted(1, 40, 2.0))
        for step in range(1, 200):
            page(replace(STEP, optimizer_step=step))
        assert (tmp_path / "report.html").stat().st_mtime_ns == begun
        page(RunFinished(200, "all steps done", 1.0))
        assert (tmp_path / "report.html").stat().st_mtime_ns > begun, "the last step is on it"


def test_writing_takes_a_fiftieth_of_the_time_however_slow_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[str] = []

    def slow(path: Path, text: str) -> None:
        time.sleep(0.02)
        writes.append(text)

    monkeypatch.setattr(live_page, "write_text", slow)
    monkeypatch.setattr(live_page, "EVERY_SECONDS", 0.0)
    with live(tmp_path) as page:
        page(RunStarted(1, 40, None))
        assert len(writes) == 2
        begun = time.monotonic()
        page._due = begun
        page(STEP)
        ended = time.monotonic()
        assert len(writes) == 3
        assert 50 * 0.02 <= page._due - ended <= 50 * (ended - begun)
        page(replace(STEP, optimizer_step=2))
        assert len(writes) == 3, "it is not yet due"


def test_a_page_that_fails_is_told_once(tmp_path: Path) -> None:
    heard: list[Event] = []
    (tmp_path / "report.html").mkdir()
    with live(tmp_path, heard) as page:
        page(RunStarted(1, 40, 2.0))
        page(RunFinished(40, "all steps done", 1.0))
    (notice,) = heard
    assert isinstance(notice, Notice)
    assert "is a directory" in notice.text
    assert notice.text.endswith("the run goes on")


def test_a_damaged_log_is_told_and_the_page_goes_on_without_it(tmp_path: Path) -> None:
    heard: list[Event] = []
    (tmp_path / "trainer_log.jsonl").write_text('{"optimizer_step": 1}}\n{"loss": 1}\n')
    with live(tmp_path, heard):
        pass
    assert len(heard) == 1
    assert "Preparing" in text_of(tmp_path)


@pytest.mark.parametrize(("error", "words"), [
    (NumericsError("step 3: loss nan; expected a number"), "Ended by an error: step 3:"),
    (KeyboardInterrupt(), "Stopped by the user"),
    (ZeroDivisionError(SECRET), "Ended by an error (ZeroDivisionError)"),
])  # fmt: skip
def test_the_end_is_on_the_page(tmp_path: Path, error: BaseException, words: str) -> None:
    with pytest.raises(type(error)), live(tmp_path):
        raise error
    text = text_of(tmp_path)
    assert words in text
    assert "refresh" not in text.partition("<style>")[0]
    assert "qlora-kit train --resume" in text


def test_on_a_gpu_the_memory_is_held_against_the_prediction(tmp_path: Path) -> None:
    for on_gpu in (True, False):
        with live(tmp_path, on_gpu=on_gpu, predicted_bytes=2 * 10**9) as page:
            page(RunStarted(1, 40, 2.0))
            page(STEP)
            page._write()
        text = text_of(tmp_path)
        assert ("1.00 GB; predicted peak 2.00 GB" in text) == on_gpu
        assert ('<path class="level c7"' in text) == on_gpu


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (3600, "1 h 00 min"),
    (47 * 3600 + 59, "47 h 00 min"), (84 * 3600, "3.5 days"),
])  # fmt: skip
def test_spans_of_time_are_for_people(seconds: float, text: str) -> None:
    assert span_text(seconds) == text

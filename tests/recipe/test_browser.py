"""The pages of runs in a real browser: nothing is wider than a telephone, and a live page moves."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Tab, browser, needs_browser
from faults.children import start
from faults.moments import on_events
from faults.runs import Sample, command
from sampled import shared_sample
from support import run_well

from qlora_kit.events import StepFinished

pytestmark = needs_browser

PHONE, SCREEN = 390, 1280


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return shared_sample(tmp_path_factory)


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as opened:
        yield opened


def look_at(tab: Tab, page: Path, width: int) -> dict[str, Any]:
    tab.open(page, width)
    found: dict[str, Any] = json.loads(
        tab.value(
            "JSON.stringify({wide: document.documentElement.scrollWidth,"
            "texts: [...document.querySelectorAll('.plot span, td, p')].map("
            "e => parseFloat(getComputedStyle(e).fontSize)),"
            "plots: [...document.querySelectorAll('.plot')].map(e => e.clientWidth),"
            "refresh: document.querySelector('meta[http-equiv=refresh]') !== null})"
        )
    )
    return found


def stopped_run(sample: Sample, output: Path) -> Path:
    """Stop a run after some steps; return its page, which is the live one."""

    def do() -> None:
        from faults.moments import at_event

        at_event(StepFinished, 12, lambda: signal.raise_signal(signal.SIGTERM))
        command(sample.arguments(output))

    start(do, output.with_suffix(".streams")).wait()
    return output / "report.html"


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_no_page_is_wider_than_its_window(
    sample: Sample, tab: Tab, tmp_path: Path, width: int
) -> None:
    live = stopped_run(
        sample, tmp_path / "runs" / "a-run-with-a-name-longer-than-a-telephone-is-wide"
    )
    run_well("runs", str(live.parent.parent), "--html", str(tmp_path / "runs" / "runs.html"))
    for page in (live, sample.unbroken / "report.html", tmp_path / "runs" / "runs.html"):
        found = look_at(tab, page, width)
        assert found["wide"] <= width, page
        assert min(found["texts"]) >= 12, "all text is legible"
        assert all(plot > 0.6 * min(width, 900) for plot in found["plots"])
        assert not found["refresh"]


def test_the_page_in_a_browser_follows_a_run_and_stands_still_at_its_end(
    sample: Sample, tab: Tab, tmp_path: Path
) -> None:
    output = tmp_path / "run"

    def do() -> None:
        from qlora_kit.report import live_page

        live_page.EVERY_SECONDS = 1.0  # and so often the browser loads it
        on_events(lambda event: time.sleep(0.25) if isinstance(event, StepFinished) else None)
        command(sample.arguments(output))

    child = start(do, output.with_suffix(".streams"))
    page = output / "report.html"
    while not page.is_file() and not child.ends_within(0.05):
        pass
    tab.open(page, PHONE)
    seen: list[str] = []
    while not child.ends_within(0.1):
        text = tab.value("document.querySelector('td + td')?.innerText")
        if text and text not in seen:
            seen.append(text)
    assert child.wait().code == 0
    assert len([text for text in seen if " of 30 " in text]) >= 3
    time.sleep(1.5)
    assert tab.value("document.querySelector('h2').innerText") == "Results"
    loaded = tab.value("performance.timeOrigin")
    time.sleep(2.5)
    assert tab.value("performance.timeOrigin") == loaded, "it is not loaded again"

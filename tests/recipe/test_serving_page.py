"""The page of `serve` in a real browser: by keyboard alone, on a telephone, with hostile text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Tab, axe, browser, needs_browser
from serving import ADAPTERS, Models, Server, make_models, server

pytestmark = needs_browser

PHONE, SCREEN = 390, 1280
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
DONE = "Both models have answered."


@pytest.fixture(scope="module")
def models(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"), stories)


@pytest.fixture(scope="module")
def served(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("served"), *models.arguments) as started:
        yield started


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as opened:
        yield opened


def opened(tab: Tab, served: Server, width: int, *, dark: bool = False) -> None:
    """Open the page, and wait until it has listed the models."""
    tab.open(served.url, width, dark=dark)
    until(tab, "document.querySelectorAll('#right-model option').length === 3")


def until(tab: Tab, expression: str) -> None:
    end = time.monotonic() + 60
    while not tab.value(expression):
        assert time.monotonic() < end, tab.value("document.body.innerText")
        time.sleep(0.05)


def text_of(tab: Tab, name: str) -> str:
    return str(tab.value(f"document.getElementById({name!r}).textContent"))


def focus(tab: Tab) -> str:
    return str(tab.value("document.activeElement.id"))


def go_to(tab: Tab, name: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(20):
        if focus(tab) == name:
            return
        tab.press("Tab")
    raise AssertionError(f"{name} is not reached by Tab")


def asked_of_both(tab: Tab, prompt: str, tokens: int = 20) -> None:
    """Ask by keyboard alone."""
    tab.value("document.activeElement.blur()")
    go_to(tab, "prompt")
    tab.write(prompt)
    go_to(tab, "tokens")
    tab.value("document.activeElement.select()")
    tab.write(str(tokens))
    tab.press("Enter")
    until(tab, f"document.getElementById('state').textContent === {DONE!r}")


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_by_keyboard_alone_two_models_answer_the_same_prompt(
    tab: Tab, served: Server, width: int
) -> None:
    opened(tab, served, width)
    assert text_of(tab, "left-kind") == "continues the text"
    assert text_of(tab, "right-kind") == "answers"
    asked_of_both(tab, "Once upon a time")
    body = {"max_tokens": 20, "temperature": 0}
    left = served.post(
        "/v1/completions", {**body, "model": "stories", "prompt": "Once upon a time"}
    )[1]
    right = served.post(
        "/v1/chat/completions",
        {**body, "model": "tom", "messages": [{"role": "user", "content": "Once upon a time"}]},
    )[1]
    assert text_of(tab, "left-answer") == left["choices"][0]["text"]
    assert text_of(tab, "right-answer") == right["choices"][0]["message"]["content"]
    assert "20 tokens in" in text_of(tab, "left-figures")
    # Another adapter, chosen by its arrow key.
    go_to(tab, "left-model")
    tab.press("ArrowDown")
    assert tab.value("document.getElementById('left-model').value") == "tom"
    assert text_of(tab, "left-kind") == "answers"
    go_to(tab, "prompt")
    tab.press("Enter", ctrl=True)
    until(tab, f"document.getElementById('state').textContent === {DONE!r}")
    assert text_of(tab, "left-answer") == text_of(tab, "right-answer"), "the same seed and model"


def test_the_report_of_the_run_is_one_step_away(tab: Tab, served: Server) -> None:
    opened(tab, served, SCREEN)
    assert tab.value("document.getElementById('left-report').hidden"), "a base has no run"
    go_to(tab, "right-report")
    tab.press("Enter")
    until(tab, "document.title === 'The report of tom'")


def test_an_answer_can_be_stopped(tab: Tab, served: Server) -> None:
    opened(tab, served, SCREEN)
    go_to(tab, "prompt")
    tab.write("Once upon a time")
    tab.value("document.getElementById('tokens').value = 400")
    tab.press("Enter", ctrl=True)
    until(tab, "document.getElementById('left-answer').textContent.length > 10")
    go_to(tab, "stop")
    tab.press("Enter")
    until(tab, "document.getElementById('state').textContent === 'Stopped.'")
    assert text_of(tab, "left-figures") == "stopped"
    assert focus(tab) == "ask", "the focus is not lost with the button"
    served.wait_for(r"stories: cancelled after \d+ tokens")


def test_text_of_models_and_servers_is_only_ever_text(tab: Tab, served: Server) -> None:
    opened(tab, served, SCREEN)
    # What a model writes stands here for certain: the page gets it from its own server.
    tab.value(
        "window.realFetch = window.fetch; window.fetch = async (...given) => {"
        "const answer = await window.realFetch(...given);"
        f"const event = {{choices: [{{delta: {{content: {HOSTILE!r}}}, text: {HOSTILE!r}}}]}};"
        "const line = 'data: ' + JSON.stringify(event) + '\\n\\n';"
        "return new Response(line, {status: answer.status}); }"
    )
    asked_of_both(tab, HOSTILE)
    for side in ("left", "right"):
        assert text_of(tab, f"{side}-answer") == HOSTILE
        assert tab.value(f"document.getElementById('{side}-answer').children.length") == 0
    tab.value("window.fetch = window.realFetch")
    # And where it got in as a tag after all, the policy of the page would not run it.
    tab.value(f"document.getElementById('left-answer').innerHTML = {HOSTILE!r}")
    time.sleep(0.3)
    assert tab.value("document.title").startswith("Compare two models")
    asked_of_both(tab, HOSTILE)
    assert tab.value("document.title").startswith("Compare two models")


def test_an_error_is_told_and_read_out(tab: Tab, served: Server) -> None:
    opened(tab, served, SCREEN)
    go_to(tab, "prompt")
    tab.write("Once upon a time")
    tab.value("document.getElementById('tokens').value = 4000")
    tab.press("Enter", ctrl=True)
    until(tab, "document.getElementById('state').textContent.startsWith('Not every model')")
    assert "expected at most 512 together" in text_of(tab, "left-figures")
    assert tab.value("document.getElementById('state').getAttribute('aria-live')") == "polite"


def test_it_loads_nothing_from_elsewhere(tab: Tab, served: Server) -> None:
    opened(tab, served, SCREEN)
    loaded = json.loads(
        tab.value("JSON.stringify(performance.getEntriesByType('resource').map(e => e.name))")
    )
    assert all(name.startswith(served.url) for name in loaded), loaded
    _, page, headers = served.get("/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert " on" not in page.partition("<body>")[2].partition("<script>")[0].replace(" one", "")
    assert "style=" not in page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_nobody_is_kept_from_reading_it(
    tab: Tab, served: Server, width: int, dark: bool, tmp_path: Path
) -> None:
    program = axe()
    opened(tab, served, width, dark=dark)
    asked_of_both(tab, "Once upon a time there was a very_long_word_" + "that_never_ends_" * 30, 60)
    assert tab.value("document.documentElement.scrollWidth") <= width
    tab.value(program)
    result: dict[str, Any] = json.loads(tab.value("axe.run().then(found => JSON.stringify(found))"))
    faults = [(each["id"], each["nodes"][0]["html"]) for each in result["violations"]]
    assert faults == []
    assert len(result["passes"]) > 15, "it has looked"
    heights = tab.value(
        "Math.min(...[...document.querySelectorAll('button, select, input')]"
        ".map(each => each.getBoundingClientRect().height))"
    )
    assert heights >= 24, "large enough for a finger"
    tab.picture(tmp_path / "page.png")


def test_the_adapters_of_the_page_are_those_of_the_server(tab: Tab, served: Server) -> None:
    opened(tab, served, PHONE)
    shown = tab.value(
        "[...document.querySelectorAll('#left-model option')].map(e => e.value).join()"
    )
    assert shown == ",".join(["stories", *ADAPTERS])

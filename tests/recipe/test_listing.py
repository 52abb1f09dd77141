"""`qlora-kit runs`: real runs of two tasks, one that goes on, killed, damaged and hostile ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from faults.children import start
from faults.classifier import _OPTIONS as CLASSIFY
from faults.classifier import _make as make_classifier
from faults.moments import at_event, on_events
from faults.runs import Sample, command, kit
from sampled import shared_sample
from support import run

from qlora_kit.events import Event, StepFinished
from qlora_kit.report.log import read_log
from qlora_kit.storage import LOCK

Capture = pytest.CaptureFixture[str]


def ended_at(sample: Sample, output: Path, step: int, number: int) -> None:
    """Do a run that gets a signal after a step."""

    def do() -> None:
        at_event(StepFinished, step, lambda: os.kill(os.getpid(), number))
        command(sample.arguments(output))

    start(do, output.parent.parent / output.name).wait()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return shared_sample(tmp_path_factory)


@pytest.fixture(scope="module")
def real_runs(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, a classifier, a stopped run and a killed one; for tests that only read."""
    folder = tmp_path_factory.mktemp("several") / "runs"
    folder.mkdir()
    shutil.copytree(sample.unbroken, folder / "first")
    kit(sample.arguments(folder / "second", "--rank", "8"), folder.parent / "second")
    films = make_classifier(Sample(folder.parent / "films", CLASSIFY))
    shutil.copytree(films.unbroken, folder / "films")
    ended_at(sample, folder / "stopped", 5, signal.SIGTERM)
    ended_at(sample, folder / "killed", 7, signal.SIGKILL)
    return folder


@pytest.fixture
def own_runs(real_runs: Path, tmp_path: Path) -> Path:
    """A copy of two of them, for a test that changes them."""
    for name in ("first", "films"):
        shutil.copytree(real_runs / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


def listed(folder: Path, *more: str, capsys: Capture) -> tuple[dict[str, dict[str, Any]], Any]:
    """Return the runs by name, in their order, and all that is printed for programs."""
    code, out, err = run("runs", str(folder), "--json", *more, capsys=capsys)
    assert code == 0, err
    found = json.loads(out)
    return {each["name"]: each for each in found["runs"]}, found


# ---------------------------------------------------------------- what is listed


def test_each_run_is_listed_with_its_state_and_its_figures(
    real_runs: Path, capsys: Capture
) -> None:
    runs, found = listed(real_runs, "--sort", "name", capsys=capsys)
    assert {name: each["state"] for name, each in runs.items()} == {
        "films": "finished", "first": "finished", "killed": "killed", "second": "finished",
        "stopped": "stopped",
    }  # fmt: skip
    assert [runs[name]["optimizer_step"] for name in runs] == [30, 30, 7, 30, 5]
    assert {each["total_steps"] for each in runs.values()} == {30}
    assert runs["films"]["settings"]["task"] == "classify"
    assert found["passed_over"] == []
    assert {"rank", "learning_rate"} <= set(found["differing"])
    for name in ("first", "second", "films"):
        rows = read_log(real_runs / name / "trainer_log.jsonl")
        steps = [row for row in rows if "learning_rate" in row]
        each = runs[name]
        assert each["best"] == min(row["eval_loss"] for row in rows if "eval_loss" in row)
        assert each["last_loss"] == steps[-1]["loss"]
        assert each["tokens_per_second"] == pytest.approx(
            sum(row["tokens"] for row in steps) / sum(row["step_seconds"] for row in steps)
        )
        rehearsal = json.loads((real_runs / name / "memory.json").read_text())["rehearsal"]
        assert each["predicted_peak_bytes"] == rehearsal["predicted_peak_bytes"]
        assert each["measured_peak_bytes"] == rehearsal["measured_peak_bytes"]


def test_the_terminal_shows_a_line_a_run(real_runs: Path, capsys: Capture) -> None:
    code, out, _ = run("runs", str(real_runs), capsys=capsys)
    assert code == 0
    title, head, *lines = out.splitlines()[:7]
    assert title == f"5 run(s) in {real_runs}"
    assert head.split()[:2] == ["run", "state"]
    columns = [match.start() for match in re.finditer(r"\S+", head)]
    assert {line[: columns[1]].strip() for line in lines} == {
        "first", "second", "films", "stopped", "killed",
    }  # fmt: skip
    first = next(line for line in lines if line.startswith("first "))
    assert "30 of 30" in first
    assert re.search(r"\d\.\d{4} loss", first)


def test_the_order_is_by_time_or_by_the_best_or_by_name(real_runs: Path, capsys: Capture) -> None:
    runs, _ = listed(real_runs, capsys=capsys)
    written = [each["written"] for each in runs.values()]
    assert written == sorted(written, reverse=True)
    runs, _ = listed(real_runs, "--sort", "best", capsys=capsys)
    causal = [each["best"] for each in runs.values() if each["settings"]["task"] == "causal"]
    measured = [best for best in causal if best is not None]
    assert measured == sorted(measured)
    assert len(measured) >= 2


def test_the_best_of_a_metric_that_rises_is_the_highest(
    real_runs: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name, best in (("a", 0.5), ("b", 0.9), ("c", 0.7)):
        folder = shutil.copytree(real_runs / "films", tmp_path / name)
        change_yaml(folder, best_metric="accuracy")
        row = {"optimizer_step": 30, "epoch": 2.0, "eval_loss": 1.0, "is_best": True,
               "seconds": 1.0, "eval_accuracy": best}  # fmt: skip
        (folder / "trainer_log.jsonl").write_text(json.dumps(row) + "\n")
    runs, _ = listed(tmp_path, "--sort", "best", capsys=capsys)
    assert [(name, each["best"]) for name, each in runs.items()] == [
        ("b", 0.9), ("c", 0.7), ("a", 0.5),
    ]  # fmt: skip


def change_yaml(folder: Path, **changes: Any) -> None:
    path = folder / "training_config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def test_a_run_that_goes_on_is_running_until_it_is_killed(
    sample: Sample, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "runs" / "now"
    output.parent.mkdir()

    def do() -> None:
        on_events(lambda event: _wait_after(event, 3))
        command(sample.arguments(output))

    child = start(do, tmp_path / "now")
    try:
        deadline = time.monotonic() + 60
        while listed_step(output.parent, capsys) != 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        runs, _ = listed(output.parent, capsys=capsys)
        assert (runs["now"]["state"], runs["now"]["optimizer_step"]) == ("running", 3)
    finally:
        child.send(signal.SIGKILL)
        child.wait()
    runs, _ = listed(output.parent, capsys=capsys)
    assert runs["now"]["state"] == "killed"
    assert (output / LOCK).is_file()


def _wait_after(event: Event, step: int) -> None:
    if isinstance(event, StepFinished) and event.optimizer_step == step:
        time.sleep(120)


def listed_step(folder: Path, capsys: Capture) -> int | None:
    runs, _ = listed(folder, capsys=capsys)
    return runs["now"]["optimizer_step"] if runs else None


def test_a_sweep_s_folder_and_a_run_alone_are_listed(
    own_runs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a sweep holds runs and a file; it may stand among other runs."""
    sweep = own_runs / "sweep"
    for number, rank in ((1, 4), (2, 8)):
        trial = shutil.copytree(own_runs / "first", sweep / f"trial-{number:02}-rank={rank}")
        change_yaml(trial, rank=rank)
    (sweep / "sweep.json").write_text("{}")
    runs, found = listed(sweep, "--sort", "name", capsys=capsys)
    assert list(runs) == ["trial-01-rank=4", "trial-02-rank=8"]
    assert found["differing"] == ["rank"]
    runs, found = listed(own_runs, "--sort", "name", capsys=capsys)
    assert list(runs) == ["films", "first", "sweep/trial-01-rank=4", "sweep/trial-02-rank=8"]
    assert found["passed_over"] == []
    monkeypatch.chdir(own_runs / "first")
    for alone in (own_runs / "first", Path()):
        runs, _ = listed(alone, capsys=capsys)
        assert list(runs) == ["first"]


def test_200_runs_take_a_few_seconds_and_no_torch(real_runs: Path, tmp_path: Path) -> None:
    for number in range(200):
        target = tmp_path / "many" / f"run-{number}"
        target.mkdir(parents=True)
        for name in ("training_config.yaml", "tokenizer_config.json", "trainer_log.jsonl",
                     "memory.json", "report.html"):  # fmt: skip
            os.link(real_runs / "first" / name, target / name)
    script = (
        "import sys, time\nfrom qlora_kit.cli import main\nbegun = time.process_time()\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(time.process_time() - begun, 'torch' in sys.modules, "
        "'matplotlib' in sys.modules)\n"
    )
    arguments = ["runs", "many", "--html"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    seconds, *imported = done.stdout.split()[-3:]
    assert imported == ["False", "False"]
    assert float(seconds) < 20, "of a busy machine"
    page = (tmp_path / "many" / "runs.html").read_text()
    assert page.count("<tr") == 201
    assert "The first 24 runs of the table are drawn" in page


# ---------------------------------------------------------------- the page


def test_the_page_draws_the_runs_and_links_to_their_own(
    real_runs: Path, tmp_path: Path, capsys: Capture
) -> None:
    page = tmp_path / "all.html"
    code, out, _ = run("runs", str(real_runs), "--html", str(page), capsys=capsys)
    assert code == 0
    assert f"written:\n  {page}\n" in out
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    links = re.findall(r'href="([^"]+)"', text)
    assert len(links) == 5
    for link in links:
        assert (tmp_path / unquote(link)).resolve().is_file()
    captions = re.findall(r'aria-label="([^"]+)"', text)
    assert captions.count("training loss, smoothed, causal, by optimiser step") == 1
    assert "loss on the validation rows, classify, by optimiser step" in captions
    shaded = re.findall(r'<th class="differs">(\w+)</th>', text)
    assert "rank" in shaded
    assert text.count('<tr class="best">') == 1, "the best of those that were measured alike"


def test_the_page_has_its_name_in_the_folder_and_does_not_become_a_run(
    own_runs: Path, capsys: Capture
) -> None:
    for _ in range(2):
        code, out, err = run("runs", str(own_runs), "--html", capsys=capsys)
        assert (code, err) == (0, "")
        assert "2 run(s)" in out
        assert "passed over" not in out
    assert (own_runs / "runs.html").is_file()


# ---------------------------------------------------------------- what cannot be listed


BAD: dict[tuple[str, ...], str] = {
    ("nowhere",): "nowhere: no such folder; expected a folder of runs; name",
    (): "runs: no such folder; expected a folder of runs; name",
    ("file.txt",): "file.txt: is a file; expected a folder of runs; name",
    ("file.txt/runs",): "file.txt/runs: no such folder; expected a folder of runs; name",
    ("empty", "--sort", "beauty"): "--sort: found beauty; expected 'time', 'best' or 'name'",
    ("empty", "--html", "page.txt"): "--html: found page.txt; expected a name that ends in .html",
    ("empty", "--html", "no/page.html"): "--html: no folder no; expected one; make it",
    ("empty", "--html", "empty"): "--html: found empty; expected a name that ends in .html",
    ("run/one", "--html"): "is inside the run",
    ("run", "--html", "run/one/all.html"): "is inside the run",
    ("empty", "more"): "unexpected extra argument",
    ("empty", "--output", "x"): "No such option",
    ("\0",): "expected text, and this holds a NUL",
}


@pytest.mark.parametrize("arguments", BAD, ids=repr)
def test_a_bad_input_is_one_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "run" / "one").mkdir(parents=True)
    for name in ("training_config.yaml", "tokenizer_config.json"):
        (tmp_path / "run" / "one" / name).write_text("{}")
    code, out, err = run("runs", *arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert BAD[arguments] in err


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: Capture) -> None:
    code, out, err = run("runs", str(tmp_path), "--html", capsys=capsys)
    assert (code, err) == (0, "")
    assert f"note: {tmp_path}: no runs" in out
    assert "No run has a step yet" in (tmp_path / "runs.html").read_text()


def _damaged() -> Iterator[tuple[str, Callable[[Path], object], str]]:
    yield "yaml", lambda run: (run / "training_config.yaml").write_text("a: [\n"), "not valid YAML"
    yield "list", lambda run: (run / "training_config.yaml").write_text("- a\n"), "found a list"
    yield (
        "large yaml", lambda run: (run / "training_config.yaml").write_text("a: b\n" + "#" * 2**19),
        "MB; expected the file of a run",
    )  # fmt: skip
    yield (
        "log", lambda run: (run / "trainer_log.jsonl").write_text('{"learning_rate": 1}}\n'),
        "trainer_log.jsonl: not valid JSON",
    )  # fmt: skip
    yield (
        "memory",
        lambda run: (run / "memory.json").write_text("{"),
        "memory.json: not valid JSON",
    )
    yield (
        "nested", lambda run: (run / "memory.json").write_text("[" * 10**5),
        "memory.json: JSON nested too deeply",
    )  # fmt: skip
    yield "link", lambda run: _link(run / "trainer_log.jsonl", "/etc/hostname"), "outside of"
    yield "endless", lambda run: _link(run / "memory.json", "/dev/zero"), "outside of"
    yield "pipe", lambda run: _pipe(run / "memory.json"), "a pipe, socket or device"
    yield "state", lambda run: (run / "checkpoint-30" / "state.json").write_text("?"), "state.json"
    yield "packed", lambda run: (run / "trainer_log.jsonl").write_bytes(b"\x1f\x8b0"), "gzip"


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(("damage", "words"), [(d, w) for _, d, w in _damaged()],
                         ids=[name for name, _, _ in _damaged()])  # fmt: skip
def test_a_damaged_run_is_passed_over_in_one_line(
    own_runs: Path, damage: Callable[[Path], object], words: str, capsys: Capture
) -> None:
    damage(own_runs / "first")
    code, out, err = run("runs", str(own_runs), capsys=capsys)
    assert (code, err) == (0, "")
    assert "1 run(s)" in out
    lines = [line for line in out.splitlines() if line.startswith("note: passed over: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert str(own_runs / "first") in lines[0]


def test_foreign_folders_and_links_are_named_and_passed_over(
    own_runs: Path, tmp_path: Path, capsys: Capture
) -> None:
    (own_runs / "photos" / "2024" / "deep" / "deeper").mkdir(parents=True)
    (own_runs / "notes.txt").write_text("mine")
    (own_runs / ".cache").mkdir()
    (own_runs / "elsewhere").symlink_to(own_runs / "first")
    (own_runs / "loop").symlink_to(own_runs)
    runs, found = listed(own_runs, "--sort", "name", capsys=capsys)
    assert list(runs) == ["films", "first"]
    assert found["passed_over"] == [
        f"{own_runs}/elsewhere: a link, which is not followed; name its target to list it",
        f"{own_runs}/loop: a link, which is not followed; name its target to list it",
        f"{own_runs}/photos: no run, and none in it",
    ]


HOSTILE = '"><script>alert(1)</script>'


def test_hostile_names_and_values_are_text_and_nothing_else(
    own_runs: Path, capsys: Capture
) -> None:
    name = "javascript:alert(1)\x1b[2J\n<b>"
    own = own_runs / name
    (own_runs / "first").rename(own)
    change_yaml(own, model=HOSTILE, rank=HOSTILE, best_metric=HOSTILE, data=[{"path": HOSTILE}])
    options = own / "training_config.yaml"
    options.write_text(options.read_text().replace("revision: null", 'revision: "\\ud800"'))
    os.mkdir(os.fsencode(own_runs) + b"/\xff")
    code, out, _ = run("runs", str(own_runs), "--html", capsys=capsys)
    assert code == 0
    assert f"passed over: {own_runs}: \\udcff: its name is no text; rename it" in out
    assert "\x1b" not in out
    assert r"\x1b[2J\n<b>" in out
    text = (own_runs / "runs.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>" not in text
    (link,) = [link for link in re.findall(r'href="([^"]*)"', text) if "films" not in link]
    assert link.startswith("./")
    assert unquote(unescape(link)) == f"./{name}/report.html"


NONSENSE = (
    {"optimizer_step": 10**400, "learning_rate": 1, "loss": 10**400},
    {"optimizer_step": "a", "learning_rate": [], "loss": {}, "tokens": "x", "step_seconds": 0},
    {
        "optimizer_step": 5,
        "learning_rate": 1,
        "loss": 1e308,
        "tokens": 1e16,
        "step_seconds": 1e-300,
    },
    {"optimizer_step": 6, "eval_loss": "nan", "is_best": True},
    [1, 2],
    "text",
)


def test_nonsense_in_a_log_is_no_figure(own_runs: Path, capsys: Capture) -> None:
    log = own_runs / "first" / "trainer_log.jsonl"
    before, _ = listed(own_runs, capsys=capsys)
    with log.open("a") as stream:
        stream.writelines(
            json.dumps(row).replace("[1, 2]", '[1, "learning_rate"]') + "\n" for row in NONSENSE
        )
    (own_runs / "first" / "memory.json").write_text('{"predicted": 3, "run": {"a": []}}')
    runs, _ = listed(own_runs, "--html", capsys=capsys)
    each = runs["first"]
    assert each["best"] is None
    assert each["last_loss"] == before["first"]["last_loss"]
    assert each["tokens_per_second"] == before["first"]["tokens_per_second"]
    assert each["predicted_peak_bytes"] is None
    assert each["optimizer_step"] == 30


def test_of_a_huge_log_the_end_is_read(
    own_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from qlora_kit.recipe import run_folders

    log = own_runs / "first" / "trainer_log.jsonl"
    row = {"epoch": 1.0, "loss": 2.0, "learning_rate": 1e-4, "tokens": 10, "step_seconds": 0.5}
    with log.open("w") as stream:
        for step in range(1, 50_001):
            stream.write(json.dumps({"optimizer_step": step, **row}) + "\n")
        stream.write('{"optimizer_step": 50001, "learning')  # its writer was killed
    parsed: list[bytes] = []
    real = run_folders._row

    def counted(line: bytes, path: Path) -> Any:
        parsed.append(line)
        return real(line, path)

    monkeypatch.setattr(run_folders, "_row", counted)
    monkeypatch.setattr(run_folders, "_MOST_LOG_BYTES", 2**20)
    runs, _ = listed(own_runs / "first", capsys=capsys)
    assert runs["first"]["optimizer_step"] == 50_000
    assert runs["first"]["tokens_per_second"] == pytest.approx(20)
    assert 400 < len(parsed) <= run_folders._MOST_ROWS
    assert all(json.loads(line)["optimizer_step"] > 30_000 for line in parsed)


def test_looking_at_a_run_leaves_it_as_it_was(real_runs: Path, capsys: Capture) -> None:
    def everything() -> dict[Path, tuple[int, int]]:
        found = {path: path.lstat() for path in real_runs.rglob("*")}
        return {path: (each.st_mtime_ns, each.st_size) for path, each in found.items()}

    before = everything()
    listed(real_runs, capsys=capsys)
    assert everything() == before

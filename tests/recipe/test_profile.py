"""`train --profile`: what it writes and says, and that the run is the same with it."""

from __future__ import annotations

import gc
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support import as_if_killed_at, run, run_well

from qlora_kit.report import profile
from qlora_kit.step.parts import PARTS
from qlora_kit.step.recording import Recording, RecordingError

pytestmark = pytest.mark.usefixtures("simulated_once", "few_rows")

RUN = (
    "train", "--model", "demo", "--device", "cpu", "--max-steps", "5", "--no-rehearse", "--samples",
    "0", "--batch-size", "2", "--gradient-accumulation-steps", "2", "--lora-dropout", "0.1",
    "--eval-steps", "2",
)  # fmt: skip


def summary_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "profile" / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def plain(few_rows: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a profile."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    run_well(*RUN, "--output", str(output))
    return output


def test_a_profiled_run_has_the_bits_of_the_plain_one_and_tells_its_time(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    # The evaluations and checkpoints between the steps are no part of them.
    code, out, err = run(*RUN, "--profile", "--output", str(output), capsys=capsys)
    assert code == 0, err
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (plain / name).read_bytes()
    assert not (plain / "profile").exists()

    summary = summary_of(output)
    assert summary["steps"] == [3, 4, 5], "three steps are profiled where no number is given"
    assert list(summary["parts"]) == list(PARTS)
    parts = summary["parts"].values()
    whole = summary["step_seconds"]
    assert sum(part["seconds"] for part in parts) + summary["idle_seconds"] == pytest.approx(whole)
    assert sum(part["share"] for part in parts) + summary["idle_share"] == pytest.approx(1)
    assert summary["step_seconds_not_recorded"] > 0
    assert summary["launches"] == pytest.approx(sum(part["launches"] for part in parts))
    assert summary["top"][0]["seconds"] >= summary["top"][1]["seconds"]
    events = json.loads((output / "profile" / "trace.json").read_text())["traceEvents"]
    recorded = [each for each in events if each.get("name") == "part of step: the whole"]
    assert len(recorded) == 1, "the trace is of one step"

    assert "time of steps 3 to 5, by part" in out
    gc.collect()
    left = [each for each in gc.get_objects() if isinstance(each, Recording)]
    assert not left, "the events of a step take far more memory than the step"
    page = (output / "report.html").read_text(encoding="utf-8")
    for part in (*PARTS, "idle", "one step, recorded"):
        assert f"\n{part} " in out
        assert f"<td>{part}</td>" in page
    assert "What took longest" in page
    assert "Time of a step" not in (plain / "report.html").read_text(encoding="utf-8")


def test_a_resumed_run_is_profiled_anew_only_if_it_is_asked_to(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run(*RUN, "--profile", "1", "--save-steps", "2", "--output", str(output),
               capsys=capsys)[0] == 0  # fmt: skip
    assert summary_of(output)["steps"] == [3]
    as_if_killed_at(output, 2)
    code, out, err = run("train", "--output", str(output), "--resume", capsys=capsys)
    assert code == 0, err
    assert "by part" not in out
    assert summary_of(output)["steps"] == [3]
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (plain / name).read_bytes()
    # The page of a run tells of the profile in its folder, whichever start of the run took it.
    assert "Time of a step" in (output / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("steps", "said", "is_written"),
    [
        ("2", "took 2 optimiser steps, of which the first 2 warm up; 0 recorded; expected at "
         "least 5", False),
        ("3", "took 3 optimiser steps, of which the first 2 warm up; 1 recorded; expected at "
         "least 5", True),
    ],
)  # fmt: skip
def test_a_run_that_is_too_short_says_so(
    steps: str, said: str, is_written: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    code, out, err = run(
        *RUN, "--profile", "3", "--max-steps", steps, "--output", str(output), capsys=capsys
    )
    assert code == 0, err
    assert said in out
    assert (output / "profile").exists() == is_written
    assert ("by part" in out) == is_written


@pytest.mark.parametrize("number", ["0", "many"])
def test_a_number_of_steps_below_one_is_refused(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(*RUN, f"--profile={number}", capsys=capsys)
    assert code == 2
    assert err.startswith(f"error: --profile: found {number}; expected")
    assert err.count("\n") == 1


def test_a_large_trace_is_compressed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "_LARGE_BYTES", 1000)
    output = tmp_path / "run"
    code, _, err = run(
        *RUN, "--profile", "1", "--max-steps", "3", "--output", str(output), capsys=capsys
    )
    assert code == 0, err
    assert {path.name for path in (output / "profile").iterdir()} == {
        "summary.json", "trace.json.gz"
    }  # fmt: skip
    with gzip.open(output / "profile" / "trace.json.gz") as stream:
        assert json.load(stream)["traceEvents"]


def test_a_device_that_lets_nothing_be_recorded_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def time(recording: Recording) -> None:
        raise RecordingError("the profiler recorded no kernel")

    monkeypatch.setattr(Recording, "time", time)
    output = tmp_path / "run"
    code, out, err = run(*RUN, "--profile", "--output", str(output), capsys=capsys)
    assert code == 0, err
    assert out.count("note: --profile: the profiler recorded no kernel; the run goes on") == 1
    assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": [3]}'])
def test_a_summary_of_another_form_is_not_shown(content: str, tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "summary.json").write_text(content)
    assert profile.read_profile(tmp_path) is None

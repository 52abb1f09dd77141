"""Metrics for TensorBoard and W&B, with stand-ins for both packages."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch.utils
from support import EVALUATED, SKIPPED, STEP, run

from qlora_kit.config import TrainConfig
from qlora_kit.errors import EnvironmentFault
from qlora_kit.events import Event, Notice
from qlora_kit.report import trackers
from qlora_kit.report.log import NAME, read_log
from qlora_kit.report.trackers import Tracking, check_tracker, metrics_of, settings_of

pytestmark = pytest.mark.usefixtures("simulated_once", "few_rows")

SHORT = ("--max-steps", "4", "--save-steps", "2", "--eval-steps", "2", "--device", "cpu",
         "--samples", "2")  # fmt: skip
# For runs that are neither rehearsed nor looked at.
PLAIN = ("--no-rehearse", "--samples", "0")
SECRET = "hf_" + "abcDEF123" * 4


@dataclass
class Received:
    """The calls that a stand-in received."""

    started: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    scalars: list[tuple[str, float, int]] = field(default_factory=list)
    finished: int = 0
    fails_in: str | None = None

    def of(self, name: str) -> dict[int, float]:
        return {step: value for each, value, step in self.scalars if each == name}

    def fail(self, where: str) -> None:
        if self.fails_in == where:
            raise RuntimeError("no route to host\nand a second line")


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> Received:
    """A stand-in for the writer of TensorBoard, which need not be installed."""
    received = Received()

    class SummaryWriter:
        def __init__(self, folder: str, **options: Any) -> None:
            received.fail("start")
            received.started.append({"folder": folder, **options})

        def add_hparams(self, values: dict[str, Any], metric_dict: Any) -> None:
            assert all(isinstance(value, bool | int | float | str) for value in values.values())
            received.settings.append(values)

        def add_scalar(self, name: str, value: float, global_step: int) -> None:
            received.fail("log")
            received.scalars.append((name, value, global_step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            received.fail("finish")
            received.finished += 1

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    monkeypatch.setattr(trackers, "_is_installed", lambda package: True)
    return received


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Received:
    """A stand-in for the package wandb."""
    received = Received()

    class Run:
        url = None

        def log(self, values: dict[str, float], step: int) -> None:
            received.fail("log")
            received.scalars += [(name, value, step) for name, value in values.items()]

        def finish(self) -> None:
            received.fail("finish")
            received.finished += 1

    def init(**options: Any) -> Run:
        received.fail("start")
        received.started.append(options)
        return Run()

    class Config:
        def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
            received.settings.append(values)

    module = types.ModuleType("wandb")
    module.init, module.config = init, Config()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "_is_installed", lambda package: True)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return received


@pytest.fixture(params=["tensorboard", "wandb"])
def either(request: pytest.FixtureRequest) -> tuple[str, Received]:
    return request.param, request.getfixturevalue(request.param)


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_told_before_anything_is_done(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    output = tmp_path / "run"
    arguments = ("train", "--output", str(output), *SHORT, "--report-to", name)
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 3
    assert err == (
        f"error: --report-to {name}: the package {name} is not installed; expected it; pip install "
        "'qlora-kit[tracking]', or leave --report-to out\n"
    )
    assert not output.exists()


def test_a_tracker_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("train", "--report-to", "paper", capsys=capsys)
    assert code == 2
    assert "expected 'none', 'tensorboard' or 'wandb'" in err


def test_a_run_sends_what_its_log_has_and_nothing_of_the_data(
    either: tuple[str, Received],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, received = either
    monkeypatch.setenv("MY_TOKEN", "a-secret-of-mine")
    output = tmp_path / "run-a-secret-of-mine"
    arguments = ("train", "--output", str(output), *SHORT, "--report-to", name)
    code, out, _ = run(*arguments, capsys=capsys)
    assert code == 0
    rows = read_log(output / NAME)
    assert received.of("train/loss") == {
        row["optimizer_step"]: row["loss"] for row in rows if "loss" in row
    }
    assert received.of("eval/loss") == {
        row["optimizer_step"]: row["eval_loss"] for row in rows if "eval_loss" in row
    }
    assert received.finished == 1
    (settings,) = received.settings
    assert (settings["rank"], settings["targets"]) == (16, "all-linear")
    assert "a-secret-of-mine" not in json.dumps(settings)
    # Compared line by line: in the file, a line's end is written as two other characters.
    samples = json.loads((output / "samples.json").read_text())["samples"]
    lines = [line for sample in samples for line in sample["prompt"].splitlines()]
    assert lines
    assert [line for line in lines if line in repr(received)] == []
    assert ("tensorboard --logdir" in out) == (name == "tensorboard")


def test_a_resumed_run_goes_on_in_the_same_place(
    either: tuple[str, Received], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, received = either
    output = tmp_path / "run"
    arguments = ("train", "--output", str(output), *SHORT, *PLAIN, "--report-to", name)
    assert run(*arguments, capsys=capsys)[0] == 0
    assert run("train", "--output", str(output), "--resume", "--max-steps", "6",
               capsys=capsys)[0] == 0  # fmt: skip
    assert [step for each, _, step in received.scalars if each == "train/loss"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert len(received.settings) == 1
    first, second = received.started
    if name == "tensorboard":
        folder = str(output / "tensorboard")
        assert (first, second) == ({"folder": folder}, {"folder": folder, "purge_step": 5})
    else:
        assert first == second
        assert (first["project"], first["name"], first["dir"], first["resume"]) == (
            "qlora-kit", "run", str(output), "allow",
        )  # fmt: skip
        assert first["settings"]["console"] == "off"
        assert json.loads((output / "wandb.json").read_text()) == {"id": first["id"]}


def test_a_tracker_that_does_not_start_is_one_line(
    either: tuple[str, Received], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, received = either
    received.fails_in = "start"
    arguments = ("train", "--output", str(tmp_path / "run"), *SHORT, "--report-to", name)
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 3
    assert err.count("\n") == 1
    assert f"--report-to {name}: it does not start (RuntimeError: no route to host);" in err


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_tracker_that_fails_later_does_not_end_the_run(
    where: str, either: tuple[str, Received], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, received = either
    received.fails_in = where
    output = tmp_path / "run"
    arguments = ("train", "--output", str(output), *SHORT, *PLAIN, "--report-to", name)
    code, out, _ = run(*arguments, capsys=capsys)
    assert code == 0
    assert out.count(f"{name} has failed (RuntimeError)") == 1
    assert (output / "adapter_model.safetensors").is_file()
    assert len([row for row in read_log(output / NAME) if "loss" in row]) == 4


def test_wandbs_own_variables_are_honoured(
    wandb: Received, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROJECT", "NAME", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", f"my {name}")
    with Tracking(TrainConfig(report_to="wandb"), tmp_path, 1, lambda event: None):
        pass
    (started,) = wandb.started
    assert (started["project"], started["name"], started["dir"]) == (
        "my PROJECT", "my NAME", "my DIR",
    )  # fmt: skip


# ---------------------------------------------------------------- listening


def test_without_a_tracker_nothing_happens(tmp_path: Path) -> None:
    heard: list[Event] = []
    check_tracker("none")
    with Tracking(TrainConfig(), tmp_path, 1, heard.append) as tracking:
        tracking(STEP)
    assert heard == []
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_is_finished_however_the_run_ends(wandb: Received, tmp_path: Path) -> None:
    config = TrainConfig(report_to="wandb")
    with pytest.raises(KeyboardInterrupt), Tracking(config, tmp_path, 1, lambda event: None):
        raise KeyboardInterrupt
    assert wandb.finished == 1


def test_what_fails_once_is_asked_no_more(wandb: Received, tmp_path: Path) -> None:
    heard: list[Event] = []
    config = TrainConfig(report_to="wandb")
    with Tracking(config, tmp_path, 1, heard.append) as tracking:
        wandb.fails_in = "log"
        tracking(STEP)
        wandb.fails_in = None
        tracking(STEP)
    assert wandb.scalars == []
    assert [event.text for event in heard if isinstance(event, Notice)][1:] == [
        "wandb has failed (RuntimeError) and gets nothing more; the run goes on, and its log has "
        "everything"
    ]


def test_the_same_steps_are_sent_that_are_logged() -> None:
    config = TrainConfig(logging_steps=3)
    sent = [step for step in range(1, 8) if metrics_of(replace(STEP, optimizer_step=step), config)]
    assert sent == [1, 3, 6]


def test_only_numbers_that_are_finite_are_sent(wandb: Received, tmp_path: Path) -> None:
    config = TrainConfig(report_to="wandb")
    with Tracking(config, tmp_path, 1, lambda event: None) as tracking:
        tracking(replace(STEP, grad_norm=math.inf))
        tracking(SKIPPED)
        tracking(EVALUATED)
    assert "train/grad_norm" not in {name for name, _, _ in wandb.scalars}
    assert wandb.of("train/skipped") == {2: 1}


def test_secrets_are_taken_out_of_settings() -> None:
    config = TrainConfig(
        model=SECRET, data=f"https://me:{SECRET}@host/x.jsonl", columns={"a": SECRET}
    )
    assert SECRET not in json.dumps(settings_of(config))


def test_a_reason_is_redacted(wandb: Received, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(wandb, "fail", lambda where: (_ for _ in ()).throw(OSError(SECRET)))
    with (
        pytest.raises(EnvironmentFault) as raised,
        Tracking(TrainConfig(report_to="wandb"), tmp_path, 1, lambda event: None),
    ):
        pass
    assert SECRET not in str(raised.value)


def test_tensorboard_itself_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(report_to="tensorboard")
    with Tracking(config, tmp_path, 1, lambda event: None) as tracking:
        tracking(STEP)
        tracking(EVALUATED)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == pytest.approx(STEP.loss)
    assert events.Scalars("eval/loss")[0].step == 1


def test_wandb_itself_takes_what_is_sent_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TrainConfig(report_to="wandb")
    with Tracking(config, tmp_path, 1, lambda event: None) as tracking:
        tracking(STEP)
        tracking(EVALUATED)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))

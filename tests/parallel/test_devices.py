"""`--devices`: the same command in several processes, its files, its errors, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from support import PROJECT, relative_error, run

import qlora_kit as qk
from qlora_kit.errors import ConfigError
from qlora_kit.parallel.launch import started_processes
from qlora_kit.report.log import read_log

# The command, whose processes wait only so many seconds for each other in a step.
IMPATIENT = PROJECT / "tests" / "impatient.py"
SECONDS = "20"


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("--device", "2"), "found 2; expected auto, cpu or cuda; did you mean --devices 2?"),
        (("--devices", "cpu"), "found cpu; expected a number or auto; did you mean --device cpu?"),
        (("--devices", "0"), "--devices: found 0; expected greater than or equal to 1"),
        (("--device-s", "2"), "'--devices'"),
    ],
)  # fmt: skip
def test_device_and_devices_are_told_apart(
    given: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("train", *given, capsys=capsys)
    assert code == 2
    assert line in err


@pytest.mark.parametrize("name", ["--devices", "--num-processes", "--nproc-per-node"])
def test_peers_names_are_taken(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("train", name, "2", "--dry-run", "--json", capsys=capsys)
    assert (code, json.loads(out)["devices"]) == (0, 2)


def test_one_process_starts_no_other() -> None:
    for devices in (None, 1, "1", "auto"):
        config = qk.TrainConfig(devices=devices, device="cpu")
        assert started_processes(config, ["must-not-be-started"]) is None


def test_a_launcher_is_not_contradicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for devices in (None, 2, "auto"):
        assert started_processes(qk.TrainConfig(devices=devices), ["not-started"]) is None
    with pytest.raises(ConfigError, match=r"--devices 3: the launcher has started 2 processes"):
        started_processes(qk.TrainConfig(devices=3), ["not-started"])


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"--devices 4: torch sees 2 GPUs;.*--devices 2, or"):
        started_processes(qk.TrainConfig(devices=4), ["not-started"])


# ---------------------------------------------------------------- runs


def arguments(stories: Path, folder: Path, output: Path, *more: object) -> list[str]:
    """Return the command line of a short run with dropout, packing and validation rows."""
    data = folder / "data.jsonl"
    if not data.is_file():
        rows = [{"prompt": f"{n} ", "completion": "is a number. " * (1 + n % 7)} for n in range(31)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "held-out.jsonl").write_text(json.dumps(rows[5]) + "\n" + json.dumps(rows[9]))
    return [
        "train", "--model", str(stories), "--data", str(data), "--device", "cpu", "--output",
        str(output), "--validation", str(folder / "held-out.jsonl"), "--max-length", "64",
        "--batch-size", "2", "--gradient-accumulation-steps", "4", "--max-steps", "6",
        "--save-steps", "2", "--eval-steps", "3", "--lora-dropout", "0.1", "--samples", "1",
        "--threads", "1", *map(str, more),
    ]  # fmt: skip


def kit(*command: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qlora_kit", *command], capture_output=True, text=True, check=False
    )


def adapter_of(run: Path) -> torch.Tensor:
    tensors = load_file(run / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def of_two(stories: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A run of two processes: its folder, and its outcome."""
    output = folder / "two"
    done = kit(*arguments(stories, folder, output, "--devices", 2, "--json"))
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def test_two_processes_write_the_run_of_one(
    stories: Path, folder: Path, of_two: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output, outcome = of_two
    one = folder / "one"
    code, out, err = run(*arguments(stories, folder, one, "--json"), capsys=capsys)
    assert code == 0, err
    alone = json.loads(out)
    assert len(outcome["process_tokens"]) == 2
    assert min(outcome["process_tokens"]) > 0
    assert sum(outcome["process_tokens"]) == sum(alone["process_tokens"])
    assert {path.name for path in output.iterdir()} == {path.name for path in one.iterdir()}
    for name in ("loss", "eval_loss"):
        logs = [
            [row[name] for row in read_log(run / "trainer_log.jsonl") if name in row]
            for run in (one, output)
        ]
        assert len(logs[0]) == {"loss": 6, "eval_loss": 2}[name]
        assert logs[1] == pytest.approx(logs[0], rel=1e-6)
    assert relative_error(adapter_of(output), adapter_of(one)) < 1e-5
    state = json.loads((output / "checkpoint-6" / "state.json").read_text())
    assert state["identity"]["processes"] == 2


def killed_after_step_2(unbroken: Path, output: Path) -> Path:
    """Copy a run, as if it had been killed after its first checkpoint."""
    shutil.copytree(unbroken, output)
    for name in ("checkpoint-4", "checkpoint-6", "adapter_model.safetensors"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output / "last").write_text("checkpoint-2\n")
    return output


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_the_unbroken_one_on_as_many_processes(
    folder: Path, of_two: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken, _ = of_two
    output = killed_after_step_2(unbroken, folder / "resumed")
    # The number of processes is among the options of the run.
    again = kit("train", "--output", str(output), "--resume")
    assert again.returncode == 0, again.stderr
    assert "2, which divide the rows of each step" in again.stdout
    assert torch.equal(adapter_of(output), adapter_of(unbroken))
    output = killed_after_step_2(unbroken, folder / "resumed-alone")
    code, out, err = run(
        "train", "--output", str(output), "--resume", "--devices", "1", capsys=capsys
    )
    assert code == 0, err
    assert "2 processes before and 1 now" in out
    assert "within float tolerance" in " ".join(out.split())
    assert relative_error(adapter_of(output), adapter_of(unbroken)) < 1e-5


# ---------------------------------------------------------------- ends


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(stories: Path, folder: Path) -> None:
    given = arguments(stories, folder, folder / "none", "--devices", 2)
    given[given.index("--data") + 1] = str(folder / "missing.jsonl")
    done = kit(*given)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "missing.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "none").exists()


@contextlib.contextmanager
def training(
    stories: Path, folder: Path, output: Path
) -> Iterator[tuple[subprocess.Popen[str], dict[str, psutil.Process]]]:
    """Yield a long run of two processes that has saved, and its processes by their rank."""
    given = arguments(stories, folder, output, "--devices", 2, "--no-rehearse")
    given[given.index("--max-steps") + 1] = "5000"
    with subprocess.Popen(
        [sys.executable, str(IMPATIENT), SECONDS, *given],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as launcher:  # fmt: skip
        until = time.monotonic() + 400
        while not (output / "last").is_file():
            assert launcher.poll() is None, launcher.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.1)
        children = psutil.Process(launcher.pid).children()
        yield launcher, {child.environ()["RANK"]: child for child in children}
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        launcher.kill()


ENDS = [
    (signal.SIGINT, "launcher", 130, "error: stopped by SIGINT"),
    (signal.SIGTERM, "1", 143, "error: stopped by SIGTERM"),
    (signal.SIGKILL, "1", 3, "error: process 1 of 2, counted from 0, is gone"),
    (signal.SIGKILL, "0", 3, "error: process 0 of 2, counted from 0, is gone"),
    (signal.SIGSTOP, "1", 3, "error: process 1 of 2, counted from 0, hangs"),
    (signal.SIGKILL, "launcher", -9, "error: stopped by SIGTERM"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "whom", "code", "line"), ENDS)
def test_a_run_ends_with_one_line(
    stories: Path, folder: Path, number: signal.Signals, whom: str, code: int, line: str
) -> None:
    output = folder / f"ended-{number.name}-{whom}"
    with training(stories, folder, output) as (launcher, ranks):
        os.kill(launcher.pid if whom == "launcher" else ranks[whom].pid, number)
        printed, _ = launcher.communicate(timeout=120)
        assert launcher.returncode == code, printed
        assert printed.count("error: ") == 1, printed
        assert line in printed
        assert "Traceback" not in printed
        _, left = psutil.wait_procs([*ranks.values()], timeout=60)
        assert not left, "no process stays behind"
    steps = sorted(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*"))
    if number != signal.SIGSTOP and whom != "0":
        logged = [row["optimizer_step"] for row in read_log(output / "trainer_log.jsonl")]
        assert steps[-1] == logged[-1], "the last step is saved"

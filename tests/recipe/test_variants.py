"""What every variant of LoRA keeps: its plan, its bits over a resume, its export, its report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import as_if_killed_at, relative_error, run
from variants import STEPS, VARIANTS

Trained = Callable[[str], Path]
EVERY = pytest.mark.parametrize("name", VARIANTS)
_MOST_SECONDS = 240


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a function that trains a variant, once, and returns the folder of the run."""
    folders: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("variants") / name
            finished(*command(name, folders[name]))
        return folders[name]

    return train


def command(name: str, output: Path, *more: str) -> tuple[str, ...]:
    return ("train", *STEPS, *VARIANTS[name], "--output", str(output), *more)


def finished(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kit", *arguments], capture_output=True, text=True,
        check=False, timeout=_MOST_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def bits_of(run_folder: Path) -> dict[str, bytes]:
    """Return all tensors of a run and of its last checkpoint, with the text of its losses."""
    found = {
        str(path.relative_to(run_folder)): path.read_bytes()
        for folder in (run_folder, run_folder / "checkpoint-4")
        for path in folder.glob("*.safetensors")
    }
    log = (run_folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    return {**found, "losses": json.dumps(losses).encode()}


@EVERY
def test_the_planned_peak_is_what_the_allocator_records(trained: Trained, name: str) -> None:
    rehearsal = json.loads((trained(name) / "memory.json").read_text())["rehearsal"]
    # Ranks under a budget are not known before the base is loaded: the plan is their bound.
    least = -0.1 if name == "rank budget" else -0.02
    assert least <= rehearsal["difference"] <= 0.02


@EVERY
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    trained: Trained, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    shutil.copytree(trained(name), own)
    as_if_killed_at(own, 2)
    code, _, err = run(*command(name, own, "--resume"), capsys=capsys)
    assert code == 0, err
    assert bits_of(own) == bits_of(trained(name))


@EVERY
def test_the_merged_model_is_the_trained_one(
    trained: Trained, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    given = ("export", str(trained(name)), "--to", str(merged), "--dtype", "float32")
    code, _, err = run(*given, capsys=capsys)
    assert code == 0, err
    report = json.loads((merged / "merge_report.json").read_text())
    measures = {each["variant"]: each for each in report["variants"]}
    assert measures["base"]["logit_error"] > 0.01, "the adapter changes what the base says"
    assert measures["written"]["logit_error"] < 1e-5


@EVERY
def test_the_report_names_the_options_that_were_asked_for(trained: Trained, name: str) -> None:
    page = (trained(name) / "report.html").read_text(encoding="utf-8")
    for flag in (each for each in VARIANTS[name] if each.startswith("--")):
        assert flag.removeprefix("--").replace("-", "_") in page.replace("-", "_")


@pytest.mark.slow
@EVERY
def test_a_killed_run_goes_on_to_the_same_bits(
    trained: Trained, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_kit", *command(name, own)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + _MOST_SECONDS
    while process.poll() is None and not (own / "last").is_file() and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (own / "last").is_file(), "the kill came before the first checkpoint"
    code, _, err = run(*command(name, own, "--resume"), capsys=capsys)
    assert code == 0, err
    assert bits_of(own) == bits_of(trained(name))


@pytest.mark.slow
@EVERY
def test_two_processes_take_the_steps_of_one(trained: Trained, name: str, tmp_path: Path) -> None:
    together = tmp_path / "two"
    finished(*command(name, together, "--devices", "2"))
    own = load_file(together / "adapter_model.safetensors")
    alone = load_file(trained(name) / "adapter_model.safetensors")
    assert own.keys() == alone.keys()
    for key, tensor in alone.items():
        if not torch.equal(own[key], tensor):
            assert relative_error(own[key], tensor) < 1e-3, key

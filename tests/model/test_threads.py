"""The number of threads that compute: the user's, the run's, or the number of free cores."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from support import run

from qlora_kit.model import threads
from qlora_kit.model.threads import choose_threads, free_cores

TELL = """
from qlora_kit.model.environment import prepare_environment
prepare_environment()
import os
from qlora_kit.model.threads import choose_threads
print("ready", flush=True)
input()
print(choose_threads().describe(), "|", os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.fixture(autouse=True)
def threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def teller(**environment: str) -> Iterator[Callable[[], str]]:
    """Start a process with all imports; yield a function that makes it count and report."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    with subprocess.Popen(
        [sys.executable, "-c", TELL], env={**inherited, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield lambda: process.communicate("\n", timeout=120)[0].strip()
        assert process.returncode == 0


def told(**environment: str) -> str:
    with teller(**environment) as tell:
        return tell()


def test_what_the_user_set_stays() -> None:
    assert told(OMP_NUM_THREADS="1") == "1 thread (as OMP_NUM_THREADS says) | 10000"
    waiting = told(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    assert waiting == "1 thread (as OMP_NUM_THREADS says) | None"
    assert choose_threads(2).describe() == "2 threads (as set for this run)"
    assert torch.get_num_threads() == 2


def test_busy_cores_are_left_to_those_who_have_them() -> None:
    cores = len(os.sched_getaffinity(0))
    spin = [sys.executable, "-c", "while True: pass"]
    with teller() as tell:
        busy = [subprocess.Popen(spin) for _ in range(cores)]
        try:
            time.sleep(1)  # until all of them have started
            assert free_cores() == (0, cores)
            said = tell()
        finally:
            for process in busy:
                process.kill()
                process.wait()
    assert said == f"1 thread (0 of {cores} cores are free) | 10000"


@pytest.mark.parametrize(("content", "cores"), [
    ("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("nonsense", 8), (None, 8),
])  # fmt: skip
def test_a_container_has_the_cores_it_may_use(
    content: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    if content is not None:
        quota.write_text(content)
    monkeypatch.setattr(threads, "_QUOTA", quota)
    monkeypatch.setattr(threads, "_allowed_cores", lambda: list(range(8)))
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda *_, **__: [0.0] * 8)
    assert free_cores() == (cores, cores)


def test_a_resumed_run_keeps_the_threads_it_began_with(
    simulated_once: None, few_rows: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "run")
    start = ("train", "--model", "demo", "--output", output, "--samples", "0", "--no-rehearse",
             "--validation-fraction", "0", "--save-steps", "1")  # fmt: skip
    code, out, err = run(*start, "--max-steps", "1", "--threads", "2", capsys=capsys)
    assert code == 0, err
    assert "CPU, 2 threads (as set for this run)" in out
    stored = yaml.safe_load((tmp_path / "run" / "training_config.yaml").read_text())
    assert stored["threads"] == 2

    torch.set_num_threads(1)
    again = ("train", "--output", output, "--resume", "--max-steps", "2")
    code, _, err = run(*again, "--threads", "1", capsys=capsys)
    assert code == 2
    assert "threads was 2 and is now 1" in err
    assert "--allow-change precision" in err
    code, out, err = run(*again, capsys=capsys)
    assert code == 0, err
    assert "CPU, 2 threads (as set for this run)" in out
    assert torch.get_num_threads() == 2

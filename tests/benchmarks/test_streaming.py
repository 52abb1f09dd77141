"""The benchmark of streams runs, and every side has all rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_small_run_of_the_benchmark(assets: Path, form: str) -> None:
    command = [sys.executable, str(PROJECT / "benchmarks" / "streaming.py"), "--no-save"]
    done = subprocess.run(
        [*command, "--rows", "400", "--megabytes", "1", "--form", form],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "QLORA_KIT_ASSETS": str(assets)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line.split()[0]: line.split()[2] for line in done.stdout.splitlines() if line.split()}
    assert [rows[side] for side in ("stream", "stream_half", "bare")] == ["400", "200", "400"]


@pytest.mark.slow
def test_the_first_step_comes_streamed_or_not(assets: Path) -> None:
    command = [sys.executable, str(PROJECT / "benchmarks" / "streaming.py"), "--no-save"]
    done = subprocess.run(
        [*command, "--first-step", "--rows", "400", "--megabytes", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "QLORA_KIT_ASSETS": str(assets)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seconds = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()}
    assert all(float(seconds[side]) > 0 for side in ("default", "read_first"))

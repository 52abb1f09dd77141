"""The benchmark of reading and tokenising runs, and its sides do the same work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT


@pytest.mark.slow
def test_a_small_run_of_the_benchmark(assets: Path) -> None:
    command = [sys.executable, str(PROJECT / "benchmarks" / "data_speed.py"), "--no-save"]
    done = subprocess.run(
        [*command, "--rows", "300", "--rounds", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "QLORA_KIT_ASSETS": str(assets)},
    )
    # It fails where the sides differ in a token or in a label.
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"ours", "ours_cached", "bare", "bare_unmasked"} <= {*done.stdout.split()}

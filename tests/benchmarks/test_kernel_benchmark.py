"""`benchmarks/kernels.py` without a GPU: every case is computed, through Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT

from qlora_kit.layers.kernels.dialect import IS_INSTALLED


@pytest.mark.skipif(not IS_INSTALLED, reason="Triton is not installed")
def test_every_case_is_rehearsed(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels.py", "--rehearse", "--json", str(file)],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert {row["note"] for row in rows} == {""}
    # The interpreter cuts bfloat16 off instead of rounding it.
    assert all(float(row["error"]) < 1e-2 for row in rows)
    cases = {row["case"] for row in rows}
    assert len(rows) == 2 * len(cases) == 32

"""The benchmark of LoRA's products: all its figures, and cases that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import PROJECT

_SCRIPT = PROJECT / "benchmarks" / "lora_products.py"


def rehearse(folder: Path, before: str = "pass") -> tuple[list[dict[str, Any]], str]:
    """Run the rehearsal without a GPU, after a line of code; return its rows and its output."""
    file = folder / "rows.json"
    script = f"""
import runpy, sys
{before}
sys.argv[1:] = ["--rehearse", "--json", {str(file)!r}]
sys.path.insert(0, {str(_SCRIPT.parent)!r})
runpy.run_path({str(_SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text())["rows"], done.stdout


def test_a_rehearsal_has_every_figure(tmp_path: Path) -> None:
    rows, _ = rehearse(tmp_path)
    assert [row["side"] for row in rows] == ["frozen", "plain", "split"]
    assert all(row["forward_ms"] > 0 and row["backward_launches"] > 0 for row in rows)
    _, plain, split = rows
    # Triton's interpreter cuts numbers to bf16 instead of rounding them.
    assert plain["error_dA"] < 1e-6 < split["error_dA"] < 4e-5


def test_a_case_that_fails_becomes_its_row(tmp_path: Path) -> None:
    rows, output = rehearse(tmp_path, 'sys.modules["qlora_kit.layers.lora"] = None')
    assert [row["side"] for row in rows if "failed" in row] == ["frozen", "plain", "split"]
    assert output.count("ModuleNotFoundError") == 3

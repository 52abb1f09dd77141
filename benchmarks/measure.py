"""What the benchmarks share: a side in its own process, its memory, the machine's rate.

A side is a function that is run in a fresh Python process and returns a dictionary; so no
side sees the memory, the threads or the imports of another.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "bitsandbytes", "transformers", "peft", "trl", "accelerate", "qlora-kit")


def run_side(script: str, side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run `script --side SIDE --settings JSON` in a fresh process and return what it prints.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    command = [sys.executable, script, "--side", side, "--settings", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}: exit {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def resident_bytes() -> int:
    """Return the memory of this process now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """Return the largest memory this process has had."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{name} is not in /proc/self/status; this needs Linux")


def matmul_flops(size: int = 1024, seconds: float = 1.0) -> float:
    """Return the floating-point operations a second that a large fp32 product reaches here."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, device, versions, date."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "device": "cpu",
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def save_results(name: str, content: dict[str, Any]) -> Path:
    """Write a result as JSON, with the machine and the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python", *(Path(sys.argv[0]).as_posix(), *sys.argv[1:])])
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"machine": machine(), "command": command, **content}, indent=2) + "\n"
    )
    return path


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows as an aligned table."""
    cells = [columns, *([str(row.get(c, "not measured")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))

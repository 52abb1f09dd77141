"""Runs the sides of benchmarks in processes of their own, and measures memory and the machine.

A side is a function that runs in a fresh Python process and returns a dictionary. So no side sees
the memory, the threads or the imports of another.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"

# Benchmarks measure the checkout that this file is in, even where another one is installed.
sys.path.insert(0, str(PROJECT))

from qlora_kit.model.environment import prepare_environment  # noqa: E402

# Called here because every benchmark imports this module before it imports torch. So on a GPU every
# benchmark has the same allocator as a run of the kit.
prepare_environment()

_PACKAGES = (
    "torch", "triton", "bitsandbytes", "transformers", "peft", "trl", "liger-kernel", "unsloth",
    "accelerate",
)  # fmt: skip


def run_side(script: str, side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run `script --side SIDE --settings JSON` in a fresh process; return the JSON it prints last.

    Raises:
        RuntimeError: the process failed; the error has the end of its stderr.
    """
    command = [sys.executable, script, "--side", side, "--settings", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}: exit {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_kit(checkout: Path, *arguments: str, **environment: str) -> str:
    """Run a command of the kit as a checkout has it; return what it prints.

    Raises:
        SystemExit: the command failed; with the end of what it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kit", *arguments], cwd=checkout, check=False,
        env={**os.environ, "PYTHONPATH": str(checkout), **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(arguments)}\n{done.stderr[-2000:]}")
    return done.stdout


class AnonymousPeak:
    """The peak of this process's anonymous memory, since this object was made or restarted.

    Mapped files, such as libraries and checkpoints, are resident too, but do not count: the system
    takes their pages back whenever it needs them. Linux keeps no peak without mapped files, so a
    thread looks every 10 ms.
    """

    def __init__(self) -> None:
        self.start_bytes = self._peak = _status("RssAnon")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(0.01)

    def restart(self) -> None:
        """Forget the peak so far; the start stays."""
        self._peak = _status("RssAnon")

    def _look(self) -> None:
        self._peak = max(self._peak, _status("RssAnon"))

    @property
    def growth_bytes(self) -> int:
        """Bytes between the start and the peak."""
        self._look()
        return self._peak - self.start_bytes


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{name} is not in /proc/self/status; this needs Linux")


def machine() -> dict[str, Any]:
    """Return the things that a figure depends on: processor, device, versions, date."""
    import torch

    import qlora_kit

    found: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "device": "cpu",
        "versions": {
            **{name: version_of(name) for name in _PACKAGES},
            "qlora-kit": qlora_kit.__version__,
        },
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["device_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        found["versions"]["cuda"] = torch.version.cuda
    return found


def version_of(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def command_line() -> str:
    """Return the command of this process; the path of its script is relative to the project."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(PROJECT) if script.is_relative_to(PROJECT) else Path(script.name)
    return " ".join(["python", shown.as_posix(), *sys.argv[1:]])


def machine_and_command() -> dict[str, Any]:
    """Return the machine, and the command of this process; both go with every figure."""
    return {"machine": machine(), "command": command_line()}


def save_results(name: str, content: dict[str, Any]) -> Path:
    """Write a result as JSON, with the machine and the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    found = {**machine_and_command(), **content}
    path.write_text(json.dumps(found, indent=2) + "\n")
    return path


def print_table(
    rows: list[dict[str, Any]],
    columns: list[str],
    write: Callable[[str], object] = print,
    absent: str = "not measured",
) -> None:
    """Print rows as an aligned table.

    Args:
        rows: the rows.
        columns: the names of the values to show, in order.
        write: receives each line.
        absent: what stands where a row has no value.
    """
    cells = [columns, *([str(row.get(c, absent)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        write("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))

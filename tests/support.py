"""Runs the command line and fresh processes for test files, and measures errors and peaks."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.cli import main
from qlora_kit.events import Evaluated, StepFinished, StepSkipped

PROJECT = Path(__file__).parent.parent

# The files of a run of four steps that saves and evaluates at every other step.
RUN_FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "best", "checkpoint-2",
    "checkpoint-4", "data.html", "last", "loss.png", "memory.json", "memory.png",
    "qlora_kit.json", "report.html", "samples.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "trainer_log.jsonl", "training_config.yaml",
}  # fmt: skip

# Events of a run, as the log and the trackers hear them.
STEP = StepFinished(1, 0.5, 2.5, 1e-4, 0.3, 7, 9, 0.1, 10**9)
EVALUATED = Evaluated(1, 0.5, 2.0, True, 0.2)
SKIPPED = StepSkipped(2, 1.0, math.nan, math.inf, (3, 4))


def assets_folder() -> Path | None:
    """Return the folder of real inputs, or None where it is not on this machine."""
    folder = Path(os.environ.get("QLORA_KIT_ASSETS", PROJECT.parent / "shared" / "assets"))
    return folder if folder.is_dir() else None


def slow(*cases: Any) -> list[Any]:
    """Mark cases of a parametrised test as slow; a tuple is several arguments."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, output and errors."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def run_well(*arguments: str) -> None:
    """Run a command that must end well, for a fixture of a module, which cannot capture output."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0


# Code that `run_python` puts before the code it runs: `Peak` measures the memory of a block.
MEASURE = textwrap.dedent(
    """
    import json, sys, threading
    from pathlib import Path

    def anonymous():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024

    class Peak:
        # The growth of anonymous memory from the start of the block to its peak.
        def __enter__(self):
            self.before = self.peak = anonymous()
            self.done = threading.Event()
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
            return self
        def watch(self):
            while not self.done.wait(0.001):
                self.peak = max(self.peak, anonymous())
        def __exit__(self, *error):
            self.done.set()
            self.thread.join()
            self.grown = max(self.peak, anonymous()) - self.before
    """
)


def run_python(code: str, *arguments: object) -> str:
    """Run Python code in a fresh process, in which `Peak` is defined; return its output."""
    command = [sys.executable, "-c", MEASURE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recorded_peak(work: Callable[[], Any]) -> int:
    """Run `work`; return the most bytes it held at one time, by the allocator's record."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate((change for _, change in sorted(changes)), initial=0))


def relative_error(found: Any, expected: Any) -> float:
    """Return ‖found − expected‖ / ‖expected‖, computed in fp64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


# Options that a simulation does not read, although they differ between otherwise equal runs.
NOT_SIMULATED = {
    "output", "overwrite", "resume", "data", "validation", "max_steps", "save_steps", "eval_steps",
    "report_to", "samples", "vram", "ram",
}  # fmt: skip


# The results of all simulations in this process, for the tests of every module.
_ANSWERS: dict[str, Any] = {}


def remembering(simulate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `simulate` that answers at once when it gets the same arguments again."""
    from qlora_kit.config import TrainConfig

    def of_key(value: Any) -> Any:
        if not isinstance(value, TrainConfig):
            return value
        return value.model_dump(exclude=NOT_SIMULATED), value.model_fields_set - NOT_SIMULATED

    def remembered(*arguments: Any, **named: Any) -> Any:
        key = repr((simulate.__name__, [of_key(value) for value in arguments], named))
        if key not in _ANSWERS:
            _ANSWERS[key] = simulate(*arguments, **named)
        return _ANSWERS[key]

    return remembered


def as_if_killed_at(run_folder: Path, step: int) -> None:
    """Leave a run as a kill after `step` would: with no later checkpoint, and none named best."""
    for name in ("last", "best"):
        (run_folder / name).unlink(
            missing_ok=name == "best"
        )  # a run that measures nothing has none
    for checkpoint in run_folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    (run_folder / "last").write_text(f"checkpoint-{step}\n")

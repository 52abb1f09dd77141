"""The record of the CPU's allocator that a rehearsal keeps, and the memory of the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import recorded_peak
from torch import nn

from qlora_kit.plan.allocator_record import AllocatorRecord
from qlora_kit.private_torch import begin_memory_record


def work() -> None:
    """Do more operations than a piece of the record holds, the largest in the middle of a piece."""
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(200)))
    x = torch.randn(16, 64)
    for _ in range(3):
        layers(x).sum().backward()
    torch.empty(3_000_000).sum()
    layers(x).sum().backward()


def test_it_sees_what_the_profiler_sees() -> None:
    torch.manual_seed(0)
    work()  # The objects that torch makes only once are made here.
    with AllocatorRecord(1_000) as record:
        work()
    assert record.peak_bytes == pytest.approx(1_000 + recorded_peak(work), abs=1_000)
    assert record.peak_bytes > 12_000_000


def test_what_is_freed_in_another_piece_of_the_record_is_no_longer_counted() -> None:
    with AllocatorRecord(0) as record:
        for _ in range(4_000):
            torch.empty(1_000)
    assert record.peak_bytes == 4_000


def test_nothing_that_runs_is_in_the_record() -> None:
    """An operation that begins in a record and ends after it writes its end into freed memory."""
    begin_memory_record()
    with torch.profiler.record_function("as torch.optim names its step"):
        torch.ones(3).add_(1)
    events = torch.autograd._disable_profiler().events()
    assert {event.name() for event in events} == {"[memory]"}


@pytest.mark.slow
def test_the_process_takes_what_the_plan_says(tmp_path: Path) -> None:
    """The model has SmolLM2's shape, 2 × 256 tokens and 4 bits; the process includes its heap."""
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "a cat", "completion": " sat on the mat and" * 60}
    rows.write_text("\n".join(json.dumps(row) for _ in range(8)))
    output = tmp_path / "run"
    command = [
        sys.executable, "-m", "qlora_kit", "train", "--model", "smollm2-135m",
        "--weights", "random", "--data", str(rows), "--max-length", "256", "--batch-size", "2",
        "--gradient-accumulation-steps", "1", "--max-steps", "3", "--samples", "0",
        "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    account = json.loads((output / "memory.json").read_text())
    predicted = account["predicted"]["predicted_peak_bytes"]
    growth = account["run"]["peak_anonymous_bytes"] - account["process"]["before_bytes"]
    assert predicted < growth <= 1.3 * predicted + 60e6
    assert account["process"]["predicted_bytes"] >= account["run"]["peak_anonymous_bytes"]

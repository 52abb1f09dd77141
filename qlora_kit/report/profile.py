"""The profile of a run: where the time of an optimiser step goes.

Wraps some optimiser steps of a run, which are recorded by torch's profiler (`step.recording`), and
writes what it found into the run's folder: `profile/summary.json`, and the trace of the first
recorded step. The run takes the same steps with and without it, bit for bit.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.errors import QloraKitError
from qlora_kit.events import Announce, Facts, Notice
from qlora_kit.lora.attach import Adapter
from qlora_kit.model.memory import return_free_memory
from qlora_kit.report.tables import Rows
from qlora_kit.step.parts import PARTS, Sizes
from qlora_kit.step.recording import Recording, RecordingError, StepTime, finish, recorded
from qlora_kit.storage import read_json, storage_errors, write_by, write_json

FOLDER = "profile"
SUMMARY = "summary.json"
TRACE = "trace.json"
WARM_UP = 2
"""The first optimiser steps, which are not recorded: kernels are chosen and memory is taken."""

IDLE = "idle"
_TOP, _TOP_SHOWN = 20, 6
_SHORT_NAME = 32
# Above this size a trace is compressed, to about a thirteenth; viewers open both.
_LARGE_BYTES = 20 * 10**6

Summary = Mapping[str, Any]
"""The content of `summary.json`, see `summary_of`."""


@dataclass
class Profile:
    """Records some optimiser steps of a run, after two that warm up.

    Attributes:
        output: the run's folder.
        asked: number of steps to record.
        adapter: the adapter that is trained.
        announce: receives a line when the last step is recorded, and the table at the end.
    """

    output: Path
    asked: int
    adapter: Adapter
    announce: Announce
    _begun: int = field(default=0, init=False)
    _warm_seconds: float | None = field(default=None, init=False)
    _found: dict[int, StepTime] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        ranks = [layer.rank for layer in self.adapter.layers.values()]
        ranks += [stack.rank for stack in self.adapter.stacks.values()]
        self._model = self.adapter.base.model
        self._device = self.adapter.base.hardware.device
        self._sizes = Sizes.of(self._model, max(ranks, default=0))

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Return the block that an optimiser step runs in, which is recorded where it is due."""
        self._begun += 1
        if self._begun <= WARM_UP:
            with self._timed():
                yield
        elif len(self._found) < self.asked:
            with recorded(self._model, self._sizes, self._device) as recording:
                yield
            self._keep(number, recording)
            # The events of a step are up to millions of small objects, which know each other.
            del recording
            return_free_memory()
        else:
            yield

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        finish(self._device)
        start = time.perf_counter()
        yield
        finish(self._device)
        self._warm_seconds = time.perf_counter() - start

    def _keep(self, number: int, recording: Recording) -> None:
        folder = self.output / FOLDER
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
        if not self._found:
            _write_trace(recording, folder / TRACE)
        try:
            self._found[number] = recording.time()
        except RecordingError as error:
            self.asked = len(self._found)
            self.announce(Notice(f"--profile: {error}; the run goes on without it"))
            return
        # Written after each step, so that a run that is killed keeps what was found.
        write_json(folder / SUMMARY, self.summary())
        if len(self._found) == self.asked:
            self.announce(Notice(f"{_told(self.summary())}; it is in {folder / SUMMARY}"))

    def summary(self) -> Summary:
        """Return the summary of the steps that were recorded so far."""
        return summary_of(self._found, self._device.type, self.asked, self._warm_seconds)

    def close(self) -> None:
        """Announce the table, and say where fewer steps were recorded than asked for."""
        found = len(self._found)
        if found < self.asked:
            self.announce(
                Notice(
                    f"--profile {self.asked}: this start of the run took {self._begun} optimiser "
                    f"steps, of which the first {WARM_UP} warm up; {found} recorded; expected at "
                    f"least {WARM_UP + self.asked}; pass more --max-steps or --epochs"
                )
            )
        if self._found:
            summary = self.summary()
            self.announce(Facts(title_of(summary), part_rows(summary)))
            longest = [(_shortened(name), of) for name, of in top_rows(summary)[:_TOP_SHOWN]]
            self.announce(Facts("what took longest", tuple(longest)))


def _write_trace(recording: Recording, path: Path) -> None:
    compressed = path.with_name(f"{path.name}.gz")
    write_by(path, recording.save_trace)
    with storage_errors(path):
        is_large = path.stat().st_size > _LARGE_BYTES
        if is_large:
            write_by(compressed, lambda staging: _compress(path, staging))
        # A trace of an earlier start must not stand beside this one.
        (path if is_large else compressed).unlink(missing_ok=True)


def _compress(source: Path, target: Path) -> None:
    with source.open("rb") as plain, gzip.open(target, "wb", compresslevel=5) as packed:
        shutil.copyfileobj(plain, packed, 1 << 20)


def summary_of(
    found: Mapping[int, StepTime], device: str, asked: int, warm_seconds: float | None
) -> Summary:
    """Sum up recorded steps; all seconds and launches are means of a step.

    Args:
        found: the recorded steps, by their number in the run.
        device: the kind of the device, such as "cuda".
        asked: number of steps that were asked for.
        warm_seconds: seconds of the step before, which was not recorded.
    """
    steps = list(found.values())

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    whole = mean([step.whole_seconds for step in steps])
    parts = {
        part: {
            "seconds": (seconds := mean([step.seconds[part] for step in steps])),
            "share": seconds / whole,
            "launches": mean([step.launches[part] for step in steps]),
        }
        for part in PARTS
    }
    return {
        "steps": list(found),
        "asked_steps": asked,
        "device": device,
        "step_seconds": whole,
        "step_seconds_not_recorded": warm_seconds,
        "busy_seconds": mean([step.busy_seconds for step in steps]),
        "idle_seconds": (idle := mean([step.idle_seconds for step in steps])),
        "idle_share": idle / whole,
        "launches": sum(part["launches"] for part in parts.values()),
        "parts": parts,
        "top": _top(steps),
    }


def _top(steps: Sequence[StepTime]) -> list[dict[str, Any]]:
    """Return the operations or kernels that took most time, with means of a step."""
    total: dict[tuple[str, str], tuple[float, int]] = {}
    for step in steps:
        for key, (seconds, launches) in step.operations.items():
            spent, number = total.get(key, (0.0, 0))
            total[key] = spent + seconds, number + launches
    longest = sorted(total.items(), key=lambda item: -item[1][0])[:_TOP]
    return [
        {
            "name": name,
            "part": part,
            "seconds": seconds / len(steps),
            "launches": launches / len(steps),
        }
        for (name, part), (seconds, launches) in longest
    ]


# ---------------------------------------------------------------- shown


def read_profile(output: Path) -> Summary | None:
    """Return the summary in a run's folder; None if there is none, or one of another form."""
    path = output / FOLDER / SUMMARY
    if not path.is_file():
        return None
    try:
        summary: Summary = read_json(path)
        # A finished run must not fail for a table of one of its earlier starts.
        title_of(summary), part_rows(summary), top_rows(summary)
    except (QloraKitError, KeyError, IndexError, TypeError, ValueError):
        return None
    return summary


def title_of(summary: Summary) -> str:
    """Return the title of the table."""
    first, last = summary["steps"][0], summary["steps"][-1]
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"time of {which}, by part"


def part_rows(summary: Summary) -> Rows:
    """Return a row a part, with the mean of a step: seconds, share and launches."""
    unit = "calls" if summary["device"] == "cpu" else "launches"
    rows = [
        (part, _figures(of["seconds"], of["share"], of["launches"], unit))
        for part, of in summary["parts"].items()
    ]
    what = "in no operation: Python" if summary["device"] == "cpu" else "the GPU waits"
    idle = f"{_figures(summary['idle_seconds'], summary['idle_share'])}  {what}"
    whole = _figures(summary["step_seconds"], 1.0, summary["launches"], unit)
    rows += [(IDLE, idle), ("one step, recorded", whole)]
    if (seconds := summary["step_seconds_not_recorded"]) is not None:
        rows.append(("one step, not recorded", f"{seconds:9.4f} s"))
    return tuple(rows)


def top_rows(summary: Summary) -> Rows:
    """Return a row for each operation or kernel that took longest, with the mean of a step."""
    unit = "calls" if summary["device"] == "cpu" else "launches"
    whole = summary["step_seconds"]
    return tuple(
        (
            of["name"],
            f"{_figures(of['seconds'], of['seconds'] / whole, of['launches'], unit)}, {of['part']}",
        )
        for of in summary["top"]
    )


def _shortened(name: str) -> str:
    """Return the beginning of a name: kernels are called by their whole template."""
    return name if len(name) <= _SHORT_NAME else f"{name[: _SHORT_NAME - 1]}…"


def _figures(seconds: float, share: float, launches: float | None = None, unit: str = "") -> str:
    counted = "" if launches is None else f"  {launches:,.0f} {unit}"
    return f"{seconds:9.4f} s  {share:6.1%}{counted}"


def _told(summary: Summary) -> str:
    """Return the profile in one line: the step, and the three parts that take longest."""
    longest = sorted(summary["parts"].items(), key=lambda item: -item[1]["seconds"])[:3]
    shares = [(part, of["share"]) for part, of in longest] + [(IDLE, summary["idle_share"])]
    parts = ", ".join(f"{part} {share:.0%}" for part, share in shares)
    return f"{title_of(summary)}: {summary['step_seconds']:.4g} s a step; {parts}"

"""The peak memory of a side of a benchmark in each phase, by the allocator's own record."""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Meter(Protocol):
    """Runs phases and remembers the peak of each."""

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        """Run one phase, note its peak, and return the result of `run`."""
        ...

    def peaks_of(self, name: str) -> dict[str, int | None]:
        """Return the peaks of one phase, in bytes, by the count they come from."""
        ...

    def summary(self) -> dict[str, Any]:
        """Return all peaks, in bytes."""
        ...


def meter_of_this_machine(limit: int | None) -> Meter:
    """Return a meter for the GPU if there is one, else for the CPU.

    Args:
        limit: the most bytes that torch may take of the GPU; emulates a smaller card.
    """
    import torch

    return GpuMeter(limit) if torch.cuda.is_available() else CpuMeter()


class GpuMeter:
    """Peaks of torch's caching allocator, and the memory in use on the device at the end."""

    def __init__(self, limit: int | None) -> None:
        import torch

        self._cuda = torch.cuda
        self._peaks: dict[str, dict[str, int]] = {}
        if limit:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        torch.empty(1, device="cuda")
        self._context = self._in_use() - torch.cuda.memory_reserved()

    def _in_use(self) -> int:
        free, total = self._cuda.mem_get_info()
        return int(total - free)

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        """Run one phase; its peak is noted even when it runs out of memory."""
        gc.collect()
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()
        try:
            return run()
        finally:
            self._cuda.synchronize()
            self._peaks[name] = {
                "allocated_bytes": self._cuda.max_memory_allocated(),
                # Bytes that were asked for, without the rest of a block that could not be split.
                "requested_bytes": self._cuda.memory_stats()["requested_bytes.all.peak"],
                "reserved_bytes": self._cuda.max_memory_reserved(),
                "device_bytes": self._in_use(),
            }

    def peaks_of(self, name: str) -> dict[str, int | None]:
        """Return the peaks of allocated, requested and reserved bytes, and the device's use."""
        return dict(self._peaks[name])

    def summary(self) -> dict[str, Any]:
        """Return the peaks; `context_bytes` were in use on the device before any tensor."""
        return {
            "measured_on": self._cuda.get_device_name(),
            "phase_peaks_bytes": {n: p["allocated_bytes"] for n, p in self._peaks.items()},
            "phase_peaks_requested_bytes": {
                n: p["requested_bytes"] for n, p in self._peaks.items()
            },
            "reserved_bytes": max((p["reserved_bytes"] for p in self._peaks.values()), default=0),
            "device_bytes": self._in_use(),
            "context_bytes": self._context,
        }


class CpuMeter:
    """The CPU allocator's own record: live bytes after each allocation, from torch's profiler.

    It only sees allocations and frees inside its phases.
    """

    def __init__(self) -> None:
        self._live = 0
        self._peaks: dict[str, int] = {}

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        """Run one phase under the profiler."""
        from torch.profiler import ProfilerActivity, profile

        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            result = run()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            record.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = sorted(
            (e["ts"], i, e["args"]["Bytes"])
            for i, e in enumerate(events)
            if e.get("name") == "[memory]"
        )
        running = list(itertools.accumulate((c[-1] for c in changes), initial=self._live))
        self._peaks[name], self._live = max(running), running[-1]
        return result

    def peaks_of(self, name: str) -> dict[str, int | None]:
        """Return the peak of allocated bytes; only a GPU has the other counts."""
        return {
            "allocated_bytes": self._peaks[name],
            "requested_bytes": None,
            "reserved_bytes": None,
            "device_bytes": None,
        }

    def summary(self) -> dict[str, Any]:
        """Return the peaks; a CPU reserves no memory ahead."""
        return {
            "measured_on": "CPU allocator",
            "phase_peaks_bytes": self._peaks,
            "phase_peaks_requested_bytes": None,
            "reserved_bytes": None,
            "device_bytes": None,
            "context_bytes": None,
        }

"""A run on a stream, whose samples other processes tokenise: killed at random, and told to stop."""

from __future__ import annotations

from .kills import kills
from .runs import TOTAL_STEPS, Sample, make_sample
from .stops import stops
from .table import Row

_PROMISE = "a streamed run under SIGKILL and signals that stop: resume is bit-equal"
# The buffer is smaller than a pass, so where the reading stands is neither its start nor its end.
_OPTIONS = (
    "--stream-data", "--shuffle-buffer", "16", "--data-workers", "1", "--max-length", "128",
    "--max-steps", str(TOTAL_STEPS),
)  # fmt: skip


def streaming(sample: Sample, killed: int, stopped: int, seed: int, in_shell: int = 0) -> Row:
    """Kill and stop streamed runs.

    Args:
        sample: whose folder and options are taken.
        killed: number of SIGKILLs at random times, or more.
        stopped: number of SIGTERMs and SIGINTs at random times.
        seed: of the random times.
        in_shell: number of the kills that hit `python -m qlora_kit` in a process of its own.
    """
    own = make_sample(sample.folder / "streamed", (*_OPTIONS, *sample.options))
    parts = {
        "kills": kills(own, killed, seed, in_shell=in_shell, saves=()),
        "stops": stops(own, stopped, seed, stride=None),
    }
    broken = [part.detail for part in parts.values() if not part.is_kept]
    detail = ", ".join(f"{part.tried} {name}" for name, part in parts.items())
    rows = parts.values()
    tried, held = sum(row.tried for row in rows), sum(row.held for row in rows)
    return Row(_PROMISE, tried, held, "; ".join([detail, *broken]))

"""Runs on one stream, on two that are mixed, and on data that are read first: other processes
tokenise the samples of all.

They are killed at random, and told to stop.
"""

from __future__ import annotations

from qlora_kit.data.samples import BUILT_IN

from .kills import kills
from .runs import TOTAL_STEPS, Sample, make_sample
from .stops import stops
from .table import Row

_PROMISE = "a streamed run under SIGKILL and signals that stop: resume is bit-equal"
_OF_TWO = "two streams that are mixed under SIGKILL and signals that stop: resume is bit-equal"
# The buffer is smaller than a pass, so where the reading stands is neither its start nor its end.
_BESIDE = ("--data-workers", "1", "--max-length", "128", "--max-steps", str(TOTAL_STEPS))
_OPTIONS = ("--stream-data", "--shuffle-buffer", "16", *_BESIDE)
_READ_FIRST = "data read first and tokenised later under SIGKILL and signals: resume is bit-equal"
_ROWS_OF_OTHER = 13


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
    return _broken(own, _PROMISE, killed, stopped, seed, in_shell)


def tokenized_later(sample: Sample, killed: int, stopped: int, seed: int, in_shell: int = 0) -> Row:
    """Kill and stop runs on data that are read first, and tokenised beside the training.

    Takes what `streaming` takes.
    """
    options = ("--no-tokenize-first", *_BESIDE, *sample.options)
    own = make_sample(sample.folder / "tokenized-later", options)
    return _broken(own, _READ_FIRST, killed, stopped, seed, in_shell)


def mixed_streaming(sample: Sample, killed: int, stopped: int, seed: int, in_shell: int = 0) -> Row:
    """Kill and stop runs on two streams of unequal size; the smaller begins again and again.

    Takes what `streaming` takes.
    """
    folder = sample.folder / "mixed"
    folder.mkdir(parents=True)
    text = BUILT_IN["train"].read_text(encoding="utf-8").splitlines(keepends=True)
    other = folder / "other.jsonl"
    other.write_text("".join(text[-_ROWS_OF_OTHER:]), encoding="utf-8")
    mix = ("--data", str(other), "--data-weights", "2,1", *_OPTIONS, *sample.options)
    return _broken(make_sample(folder, mix), _OF_TWO, killed, stopped, seed, in_shell)


def _broken(own: Sample, promise: str, killed: int, stopped: int, seed: int, in_shell: int) -> Row:
    """Kill and stop the runs of a sample."""
    parts = {
        "kills": kills(own, killed, seed, in_shell=in_shell, saves=()),
        "stops": stops(own, stopped, seed, stride=None),
    }
    broken = [part.detail for part in parts.values() if not part.is_kept]
    detail = ", ".join(f"{part.tried} {name}" for name, part in parts.items())
    rows = parts.values()
    tried, held = sum(row.tried for row in rows), sum(row.held for row in rows)
    return Row(promise, tried, held, "; ".join([detail, *broken]))

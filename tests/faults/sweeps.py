"""A sweep that is killed and stopped at random: no trial is repeated, and no bit differs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .children import Ended, finish, spread, start
from .runs import Sample, command, logged_losses
from .table import Row, row_of

_PROMISE = "a sweep under SIGKILL and SIGTERM: no finished trial repeated, each as if trained alone"
_ALPHAS = (8, 16, 32)
_STEPS = 8
_MOST_SURVIVED = 10
_ENDS_A_CHAIN = 4
_COMPARED = ("adapter_model.safetensors", "last", "best")
_OF_CHECKPOINT = ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors")


@dataclass(frozen=True)
class Case:
    """A sweep that is ended once or several times, or a trial that is trained alone.

    Attributes:
        kind: "SIGKILL", "SIGTERM" or "alone".
        seed: the seed of random moments; of a trial alone, its number.
        ends: number of ends.
    """

    kind: str
    seed: int
    ends: int = 1


def sweeps(sample: Sample, killed: int, stopped: int, seed: int, alone: int = 3) -> Row:
    """End sweeps of three trials at random moments, and train trials alone.

    Args:
        sample: the run whose `--alpha` is varied.
        killed: number of SIGKILLs.
        stopped: number of SIGTERMs.
        seed: the seed of the moments.
        alone: number of trials that are trained alone.
    """
    folder = sample.folder / "sweeps"
    unbroken = folder / "unbroken"
    started = time.perf_counter()
    ended = finish(lambda: command(_arguments(sample, unbroken)), folder / "unbroken-streams")
    seconds = time.perf_counter() - started
    if ended.code:
        raise RuntimeError(f"the sweep without a fault failed:\n{ended.errors}")
    cases = [Case("alone", number) for number in range(alone)]
    for kind, count in (("SIGKILL", killed), ("SIGTERM", stopped)):
        sizes = [min(_ENDS_A_CHAIN, count - done) for done in range(0, count, _ENDS_A_CHAIN)]
        cases += [Case(kind, seed + number, size) for number, size in enumerate(sizes)]
    results = spread(partial(_of_case, sample, unbroken, seconds), cases, folder)
    detail = f"{killed} kills, {stopped} stops, {alone} alone"
    return row_of(_PROMISE, [faults for result in results for faults in result], detail)


def _arguments(sample: Sample, output: Path, *more: str) -> list[str]:
    _, *options = sample.arguments(output, "--max-steps", _STEPS, *more)
    return ["sweep", *options, "--over", f"alpha={','.join(map(str, _ALPHAS))}"]


def _of_case(sample: Sample, unbroken: Path, seconds: float, case: Case) -> list[list[str]]:
    output = sample.folder / "sweeps" / f"{case.kind}-{case.seed}"
    if case.kind == "alone":
        return [_alone(sample, unbroken, case.seed, output)]
    return _broken(sample, unbroken, seconds, case, output)


def _alone(sample: Sample, unbroken: Path, number: int, output: Path) -> list[str]:
    """Train a trial as a run of its own, in a process of its own."""
    given = sample.arguments(output, "--max-steps", _STEPS, "--alpha", _ALPHAS[number])
    ended = finish(lambda: command(given), output.with_suffix(".streams"))
    if ended.code:
        return [f"alone: ended with {ended.code}: {ended.errors[-200:]}"]
    return [f"alone: {fault}" for fault in _different(output, _trials(unbroken)[number])]


def _broken(
    sample: Sample, unbroken: Path, seconds: float, case: Case, output: Path
) -> list[list[str]]:
    """End a sweep at random moments, let it come to its end, and look at every trial."""
    moments, streams = random.Random(f"{case.kind} {case.seed}"), output.with_suffix(".streams")
    results: list[list[str]] = []
    done: dict[str, tuple[int, int]] = {}
    survived = 0
    while len(results) < case.ends and survived < _MOST_SURVIVED:
        child = start(lambda: command(_arguments(sample, output, "--resume")), streams)
        if child.ends_within(moments.uniform(0, 1.1) * seconds):
            # The sweep ended before the moment, so this counts as no end.
            if wrong := _end(child.wait(), unbroken, output):
                return [*results, wrong]
            shutil.rmtree(output)
            done, survived = {}, survived + 1
            continue
        child.send(getattr(signal, case.kind))
        ended = child.wait()
        results.append(_stopped(ended) if case.kind == "SIGTERM" else [])
        done = {**_finished(output), **done}
    ended = finish(lambda: command(_arguments(sample, output, "--resume")), streams)
    results[-1] += _end(ended, unbroken, output)
    results[-1] += [
        f"{name}: was finished, and trained again"
        for name, written in done.items()
        if _written(output / name) != written
    ]
    shutil.rmtree(output)
    return [[f"{case.kind}-{case.seed}: {fault}" for fault in faults] for faults in results]


def _stopped(ended: Ended) -> list[str]:
    code = 128 + signal.SIGTERM
    # A signal that comes before the program listens ends it without a word.
    is_told = ended.error_lines in ([], ["error: stopped by SIGTERM"])
    return [] if ended.code == code and is_told else [f"exit {ended.code}: {ended.errors[-200:]}"]


def _end(ended: Ended, unbroken: Path, output: Path) -> list[str]:
    """Return how a sweep that came to its end differs from the unbroken one."""
    if ended.code:
        return [f"ended with {ended.code}: {ended.errors.strip()[-200:]}"]
    wrong = [
        f"{found.name}: {fault}"
        for found, expected in zip(_trials(output), _trials(unbroken), strict=True)
        for fault in _different(found, expected)
    ]
    orders = [_without_seconds(each) for each in (output, unbroken)]
    wrong += [] if orders[0] == orders[1] else ["sweep.json: other figures"]
    if left := sorted(path.name for path in output.rglob(".*")):
        wrong.append(f"left behind: {left}")
    return wrong


def _trials(output: Path) -> Sequence[Path]:
    return sorted(output.glob("trial-*"))


def _different(found: Path, expected: Path) -> list[str]:
    last = f"checkpoint-{_STEPS}"
    names = (*_COMPARED, *(f"{last}/{name}" for name in _OF_CHECKPOINT))
    wrong = [f"{name} differs" for name in names if _bytes(found / name) != _bytes(expected / name)]
    if logged_losses(found) != logged_losses(expected):
        wrong.append("the logged losses differ")
    return wrong


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _records(output: Path) -> list[dict[str, Any]]:
    path = output / "sweep.json"
    return json.loads(path.read_text())["trials"] if path.is_file() else []


def _without_seconds(output: Path) -> list[Any]:
    return [
        (each["name"], each["state"], {**each["figures"], "seconds": 0})
        for each in _records(output)
    ]


def _finished(output: Path) -> dict[str, tuple[int, int]]:
    """Return, by name, when the adapter of each finished trial was written."""
    names = [each["name"] for each in _records(output) if each["state"] == "finished"]
    return {name: _written(output / name) for name in names}


def _written(trial: Path) -> tuple[int, int]:
    status = (trial / _COMPARED[0]).stat()
    return status.st_ino, status.st_mtime_ns

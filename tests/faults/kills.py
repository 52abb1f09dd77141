"""SIGKILL: at random times, at every write, fsync and rename of a save, and through the shell."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_kit.events import Event, StepFinished

from .children import Child, Ended, finish, spread, start
from .moments import Disk, DiskCall, at_call, at_event, on_events
from .runs import (
    TOTAL_STEPS,
    Sample,
    after_a_crash,
    command,
    copy_run,
    differences,
    highest_whole,
    resumed,
)
from .table import Row, row_of

_PROMISE = "SIGKILL: no checkpoint lost or partial, resume is bit-equal"
_KILLS_A_CHAIN = 4
_MOST_SURVIVED = 20
# The step whose save is hit, by kind: an ordinary step; a step that is the best so far, and whose
# save replaces one that was made when its evaluation was stopped; and the last step, with the end
# of the run.
_SAVES = {"save": 28, "replacing save": 15, "last save": TOTAL_STEPS}
_SCORES_OF_AN_EVALUATION = 2
_EVALUATIONS_UNTIL_IT = 3


@dataclass(frozen=True)
class Case:
    """One run that is killed, once or several times.

    Attributes:
        kind: the kind of kill.
        seed: the seed of random moments.
        kills: number of kills.
        call: number of the call to the disk, counted from the start of a save.
        is_half: whether the call, a write, is half done.
    """

    kind: str
    seed: int = 0
    kills: int = 1
    call: int = 0
    is_half: bool = False


def kills(
    sample: Sample,
    count: int,
    seed: int,
    *,
    in_shell: int = 20,
    stride: int = 1,
    saves: Sequence[str] = tuple(_SAVES),
) -> Row:
    """Kill runs `count` times or more.

    Args:
        sample: the run to kill.
        count: least number of kills; kills at random times are added to reach it.
        seed: the seed of the random times.
        in_shell: number of kills that hit `python -m qlora_kit` in a process of its own.
        stride: distance between the calls of a save that are hit; 1 hits every call.
        saves: the kinds of saves that are hit.
    """
    cases = [*_at_each_call(sample, stride, saves), *_chains("shell", in_shell, seed)]
    left = count - sum(case.kills for case in cases)
    cases += _chains("random", max(left, count // 5), seed + 1)
    seconds = {case.kind: 0.0 for case in cases if case.kind in _BEGIN}
    seconds = {kind: _seconds_of(sample, _BEGIN[kind]) for kind in seconds}
    results = spread(partial(_killed, sample, seconds), cases, sample.folder / "kills")
    each = [faults for result in results for faults in result]
    return row_of(_PROMISE, each, _counted(cases))


def _counted(cases: list[Case]) -> str:
    kinds = {
        "at a call of a save": tuple(_SAVES),
        "through the shell": ("shell",),
        "at random times": ("random",),
    }
    numbers = {
        words: sum(case.kills for case in cases if case.kind in names)
        for words, names in kinds.items()
    }
    return ", ".join(f"{number} {words}" for words, number in numbers.items())


def _chains(kind: str, count: int, seed: int) -> list[Case]:
    """Cut `count` kills into runs that are killed, resumed and killed again."""
    sizes = [min(_KILLS_A_CHAIN, count - done) for done in range(0, count, _KILLS_A_CHAIN)]
    return [Case(kind, seed * 1000 + number, kills=size) for number, size in enumerate(sizes)]


def _killed(sample: Sample, seconds: dict[str, float], case: Case) -> list[list[str]]:
    """Do a case; return the faults of each kill."""
    label = f"{case.kind}-{case.seed}-{case.call}-{case.is_half}".replace(" ", "-")
    output = sample.folder / "kills" / label
    if case.kind in _BEGIN:
        return _killed_at_random(sample, case, output, seconds[case.kind])
    return [_killed_in_a_save(sample, case, output)]


# ---------------------------------------------------------------- at random times


def _start(arguments: list[str], streams: Path) -> Child:
    return start(lambda: command(arguments), streams)


def _start_in_shell(arguments: list[str], streams: Path) -> Child:
    with (
        streams.with_suffix(".out").open("wb") as output,
        streams.with_suffix(".err").open("wb") as errors,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_kit", *arguments], stdout=output, stderr=errors
        )
    process.returncode = 0  # `Child.wait` reaps it, not `Popen`
    return Child(process.pid, streams)


_BEGIN: dict[str, Callable[[list[str], Path], Child]] = {
    "random": _start,
    "shell": _start_in_shell,
}


def _seconds_of(sample: Sample, begin: Callable[[list[str], Path], Child]) -> float:
    """Return how many seconds the run takes without a fault."""
    output = sample.folder / "kills" / "timed"
    output.parent.mkdir(exist_ok=True)
    started = time.perf_counter()
    begin(sample.arguments(output, "--overwrite"), output.with_suffix(".streams")).wait()
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds


def _killed_at_random(sample: Sample, case: Case, output: Path, seconds: float) -> list[list[str]]:
    times, streams = random.Random(case.seed), output.with_suffix(".streams")
    results: list[list[str]] = []
    saved, survived = 0, 0
    while len(results) < case.kills and survived < _MOST_SURVIVED:
        child = _BEGIN[case.kind](sample.arguments(output, "--resume"), streams)
        if child.ends_within(times.uniform(0, 1.2) * seconds):
            # The run ended before the time of the kill, so this counts as no kill.
            wrong = _end_of(child.wait(), output, sample)
            if wrong:
                return [*results, wrong]
            shutil.rmtree(output)
            saved, survived = 0, survived + 1
            continue
        child.send(signal.SIGKILL)
        child.wait()
        results.append(after_a_crash(output, saved))
        saved = highest_whole(output)[0]
    results[-1] += resumed(sample, output, streams)
    shutil.rmtree(output)
    return results


def _end_of(ended: Ended, output: Path, sample: Sample) -> list[str]:
    if ended.code:
        return [f"resume ended with {ended.code}: {ended.errors.strip()[-200:]}"]
    return differences(output, sample.unbroken)


# ---------------------------------------------------------------- at each call of a save


def _at_each_call(sample: Sample, stride: int, saves: Sequence[str]) -> list[Case]:
    """Count the calls of a save in a rehearsal, and return a case for each."""
    found = spread(partial(_cases_of, sample, stride), saves, sample.folder / "kills")
    return [case for cases in found for case in cases]


def _cases_of(sample: Sample, stride: int, kind: str) -> list[Case]:
    _prepare_save(sample, kind)
    calls = _rehearsed(sample, kind)
    cases = [Case(kind, call=index) for index in range(0, len(calls) + 1, stride)]
    halves = [n for n, name in enumerate(calls) if name in ("write", "save_file")]
    return cases + [Case(kind, call=index, is_half=True) for index in halves[::stride]]


def _half_a_run(sample: Sample, kind: str) -> Path:
    return sample.folder / "kills" / f"before-{kind.replace(' ', '-')}"


def _prepare_save(sample: Sample, kind: str) -> None:
    """Make the run folder that exists when the process with the save starts."""
    output = _half_a_run(sample, kind)

    def do() -> None:
        if kind != "replacing save":
            at_event(StepFinished, _SAVES[kind], _kill)
        else:
            at_call(
                sample.measures,
                _SCORES_OF_AN_EVALUATION * _EVALUATIONS_UNTIL_IT - 1,
                _stop,
            )
        command(sample.arguments(output))

    ended = finish(do, output.with_suffix(".streams"))
    if ended.code not in (128 + signal.SIGKILL, 128 + signal.SIGTERM):
        raise RuntimeError(f"ended with {ended.code}: {ended.errors}")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _from_the_save_on(
    sample: Sample, kind: str, output: Path, fault: Callable[[DiskCall], None]
) -> Disk:
    """Resume a run, and watch the disk during one of its saves; called in a child."""
    from qlora_kit.train import loop

    disk, real, step = Disk(output, fault), loop.save_checkpoint, _SAVES[kind]

    def save_checkpoint(*arguments: Any) -> Path:
        progress = arguments[3]
        disk.is_on = progress.optimizer_step == step
        return real(*arguments)

    def listen(event: Event) -> None:
        # Old checkpoints are deleted after a save; the next step ends it.
        if isinstance(event, StepFinished):
            disk.is_on = False

    loop.save_checkpoint = save_checkpoint
    on_events(listen)
    with contextlib.suppress(SystemExit):
        command(sample.arguments(output, "--resume"))
    return disk


def _rehearsed(sample: Sample, kind: str) -> list[str]:
    """Return the names of the calls of a save."""
    output = copy_run(
        _half_a_run(sample, kind), sample.folder / "kills" / f"rehearsal-{_SAVES[kind]}"
    )

    def rehearse() -> None:
        disk = _from_the_save_on(sample, kind, output, lambda call: None)
        output.with_suffix(".json").write_text(json.dumps(disk.calls))

    ended = finish(rehearse, output.with_suffix(".streams"))
    calls: list[str] = json.loads(output.with_suffix(".json").read_text())
    if ended.code or "fsync" not in calls:
        raise RuntimeError(f"no save of kind {kind} was seen: {ended.errors}")
    return calls


def _killed_in_a_save(sample: Sample, case: Case, output: Path) -> list[str]:
    """Kill a process right before one call of a save, and so right after the call before it."""
    copy_run(_half_a_run(sample, case.kind), output)
    saved = highest_whole(output)[0]

    def fault(call: DiskCall) -> None:
        if call.index == case.call:
            if case.is_half and call.halve:
                call.halve()
            _kill()

    def do() -> None:
        disk = _from_the_save_on(sample, case.kind, output, fault)
        if case.call == len(disk.calls):
            _kill()

    streams = output.with_suffix(".streams")
    ended = finish(do, streams)
    if ended.code != 128 + signal.SIGKILL:
        return [f"{case}: was not killed: {ended.code}"]
    wrong = after_a_crash(output, saved) + resumed(sample, output, streams)
    shutil.rmtree(output)
    return [f"{case.kind}, call {case.call}: {fault}" for fault in wrong]

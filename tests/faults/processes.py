"""A run on two processes, of which one is killed, stopped like a hang, or has a failing disk.

The processes are forked, and find each other by the variables that a launcher sets; the launcher of
`--devices` has tests of its own (`tests/parallel/test_devices.py`).
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .children import Child, Ended, spread, start
from .moments import Disk, DiskCall
from .runs import Sample, after_a_crash, command, differences, highest_whole
from .table import Row, row_of

_PROMISE = "one of two processes killed, hanging or without disk: all end, nothing lost"
_COUNT = 2
_KILLS_A_CHAIN = 3
_MOST_SURVIVED = 10
# Processes wait this long for each other in a step, and for one that works for all, instead of
# minutes and hours. On a busy machine one may be some seconds late.
_STEP_SECONDS, _WORK_SECONDS = 10.0, 30.0
# Within this time after the fault all processes have ended: a wait, and what it takes to say so.
_MOST_SECONDS = 90.0
_EXIT_ENVIRONMENT = 3


@dataclass(frozen=True)
class Case:
    """A run with faults of one kind.

    Attributes:
        kind: "killed", "hangs" or "disk".
        seed: the seed of the moments.
        faults: number of the faults; after each, the run is resumed.
    """

    kind: str
    seed: int
    faults: int = 1


def processes(sample: Sample, killed: int, hanging: int, disks: int, seed: int) -> Row:
    """Do faults to one of two processes at random moments.

    Args:
        sample: the run to break.
        killed: number of kills.
        hanging: number of processes that are stopped, as if they hung.
        disks: number of runs whose writer has a disk that becomes full.
        seed: the seed of the moments.
    """
    folder = sample.folder / "processes"
    folder.mkdir(exist_ok=True)
    unbroken = folder / "unbroken"
    started = time.perf_counter()
    ends = _finished(_ranks(sample, unbroken))
    seconds = time.perf_counter() - started
    if any(end.code for end in ends):
        raise RuntimeError(f"the run without a fault failed:\n{ends[0].errors}{ends[1].errors}")
    sizes = [min(_KILLS_A_CHAIN, killed - done) for done in range(0, killed, _KILLS_A_CHAIN)]
    cases = [Case("killed", seed + number, size) for number, size in enumerate(sizes)]
    cases += [Case("hangs", seed + number) for number in range(hanging)]
    cases += [Case("disk", seed + number) for number in range(disks)]
    # Each case has two processes of its own.
    results = spread(partial(_broken, sample, unbroken, seconds), cases, folder, workers=1)
    detail = f"{killed} kills, {hanging} that hang, {disks} full disks"
    return row_of(_PROMISE, [faults for result in results for faults in result], detail)


def _ranks(
    sample: Sample, output: Path, in_writer: Callable[[], None] = lambda: None
) -> list[Child]:
    """Start the processes of a run; `in_writer` is called in the first, before it begins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def do(rank: int) -> None:
        from qlora_kit.parallel import data_parallel

        data_parallel.STEP_SECONDS = _STEP_SECONDS
        data_parallel.WORK_SECONDS = _WORK_SECONDS
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(_COUNT), LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(_COUNT), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        if rank == 0:
            in_writer()
        command(sample.arguments(output, "--resume"))

    streams = [output.with_suffix(f".{rank}.streams") for rank in range(_COUNT)]
    return [start(partial(do, rank), streams[rank]) for rank in range(_COUNT)]


def _finished(ranks: list[Child]) -> list[Ended]:
    return [rank.wait() for rank in ranks]


def _broken(sample: Sample, unbroken: Path, seconds: float, case: Case) -> list[list[str]]:
    """Do the faults of a case, then let the run end; return what was wrong after each fault."""
    output = sample.folder / "processes" / f"{case.kind}-{case.seed}"
    moments = random.Random(f"{case.kind} {case.seed}")
    results: list[list[str]] = []
    survived = 0
    while len(results) < case.faults and survived < _MOST_SURVIVED:
        saved = highest_whole(output)[0]
        wrong = _with_fault(sample, output, case.kind, moments, seconds)
        if wrong is None:
            # The run ended before its fault, so this counts as none.
            shutil.rmtree(output)
            survived += 1
            continue
        results.append([f"{case}: {each}" for each in wrong + after_a_crash(output, saved)])
    ends = _finished(_ranks(sample, output))
    if any(end.code for end in ends):
        results[-1].append(f"{case}: resume ended with {[end.code for end in ends]}")
    results[-1] += [f"{case}: {each}" for each in differences(output, unbroken)]
    shutil.rmtree(output)
    return results


def _with_fault(
    sample: Sample, output: Path, kind: str, moments: random.Random, seconds: float
) -> list[str] | None:
    """Run until a fault; return what was wrong, or None if the run ended before."""
    if kind == "disk":
        return _full_disk(sample, output, moments)
    ranks = _ranks(sample, output)
    victim = moments.randrange(_COUNT)
    ended_early = ranks[victim].ends_within(moments.uniform(0.1, 1.0) * seconds)
    if ended_early:
        return None if all(end.code == 0 for end in _finished(ranks)) else ["ended by itself"]
    ranks[victim].send(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
    began = time.perf_counter()
    survivor = ranks[1 - victim].wait(_MOST_SECONDS)
    took = time.perf_counter() - began
    ranks[victim].send(signal.SIGKILL)
    lost = ranks[victim].wait()
    if survivor.code == 0:
        return []  # the last step was done, and it needed the other no more
    return _wrong_end(survivor, lost, took)


def _wrong_end(survivor: Ended, lost: Ended, took: float) -> list[str]:
    wrong = []
    if survivor.code != _EXIT_ENVIRONMENT:
        wrong.append(f"the survivor ended with {survivor.code} after {took:.0f} s")
    lines = [*survivor.error_lines, *lost.error_lines]
    if len(lines) != 1 or not lines[0].startswith("error: "):
        wrong.append(f"said {lines}")
    return wrong


def _full_disk(sample: Sample, output: Path, moments: random.Random) -> list[str] | None:
    """Let the disk of the writer become full at a random call of a save."""
    left = moments.randrange(20, 400)

    def fault(call: DiskCall) -> None:
        if call.index >= left and call.name not in ("unlink", "rmdir", "rename"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def watch() -> None:
        Disk(output, fault).is_on = True

    ends = _finished(_ranks(sample, output, watch))
    if all(end.code == 0 for end in ends):
        return None
    wrong = []
    if [end.code for end in ends] != [_EXIT_ENVIRONMENT] * _COUNT:
        wrong.append(f"ended with {[end.code for end in ends]}")
    lines = [line for end in ends for line in end.error_lines]
    if len(lines) != 1 or "no space left" not in lines[0].lower():
        wrong.append(f"said {lines}")
    return wrong

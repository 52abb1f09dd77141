"""A disk that fails: errors at each call, and disks of twenty sizes that become full."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_kit.events import StepFinished

from .children import Ended, finish, spread
from .moments import Disk, DiskCall, at_event
from .runs import (
    TOTAL_STEPS,
    Sample,
    after_a_crash,
    command,
    copy_run,
    highest_whole,
    resumed,
)
from .table import Row, row_of

_ERRORS_PROMISE = "ENOSPC, EIO, EACCES at each call: exit 3, one line, nothing lost"
_SIZES_PROMISE = "a disk that becomes full: exit 3, one line, nothing lost"
_KINDS = (errno.ENOSPC, errno.EIO, errno.EACCES)
_STORAGE_EXIT = 3
_KILLED_AT = TOTAL_STEPS - 3
# Functions that clean up after a write that succeeded: if they fail, the kit goes on.
_CLEARING = ("unlink", "rmdir")
# If this fails on a folder that exists already, Python notices that, and goes on.
_HARMLESS = (*_CLEARING, "mkdir")
# The page of a run that goes on may fail: the run has a notice of it, and ends well.
_PAGE_FAILED = "the page of the run is not written"


# ---------------------------------------------------------------- errors


@dataclass(frozen=True)
class Case:
    """An error in place of one call to the disk.

    Attributes:
        call: number of the call, counted from the start of the process.
        name: the name of the function.
        number: the number of the error.
    """

    call: int
    name: str
    number: int

    def __str__(self) -> str:
        return f"{errno.errorcode[self.number]} at call {self.call}, {self.name}"


def disk_errors(sample: Sample, count: int) -> Row:
    """Let `count` calls of a resumed run fail, one in each run, spread evenly over all calls."""
    folder = sample.folder / "disk"
    before = _half_a_run(sample, folder / "before")
    calls = _rehearsed(sample, before, folder / "rehearsal")
    places = sorted({round(n * (len(calls) - 1) / (count - 1)) for n in range(count)})
    cases = [Case(k, calls[k], _KINDS[n % len(_KINDS)]) for n, k in enumerate(places)]
    results = spread(partial(_with_error, sample, before), cases, folder)
    return row_of(_ERRORS_PROMISE, results, f"{len(calls)} calls in a resumed run")


def _half_a_run(sample: Sample, output: Path) -> Path:
    """Make the run folder of a process that was killed after a checkpoint."""

    def do() -> None:
        at_event(StepFinished, _KILLED_AT, lambda: os.kill(os.getpid(), 9))
        command(sample.arguments(output))

    finish(do, output.with_suffix(".streams"))
    if not highest_whole(output)[0]:
        raise RuntimeError("no checkpoint to begin with")
    return output


def _rehearsed(sample: Sample, before: Path, output: Path) -> list[str]:
    copy_run(before, output)
    counted = output.with_suffix(".json")

    def rehearse() -> None:
        disk = Disk(output, lambda call: None)
        disk.is_on = True
        with contextlib.suppress(SystemExit):
            command(sample.arguments(output, "--resume"))
        disk.is_on = False
        counted.write_text(json.dumps(disk.calls))

    finish(rehearse, output.with_suffix(".streams"))
    calls: list[str] = json.loads(counted.read_text())
    return calls


def _with_error(sample: Sample, before: Path, case: Case) -> list[str]:
    output = copy_run(before, sample.folder / "disk" / f"run-{case.call}")
    saved, streams = highest_whole(output)[0], output.with_suffix(".streams")

    def fault(call: DiskCall) -> None:
        # A full disk stays full, but its files can still be deleted.
        is_full = case.number == errno.ENOSPC and call.index > case.call
        if call.index == case.call or (is_full and call.name not in (*_CLEARING, "rename")):
            if call.halve and case.number == errno.ENOSPC:
                call.halve()
            raise OSError(case.number, os.strerror(case.number))

    def do() -> None:
        Disk(output, fault).is_on = True
        command(sample.arguments(output, "--resume"))

    ended = finish(do, streams)
    wrong = []
    if ended.code or not (case.name in _HARMLESS or _PAGE_FAILED in ended.output):
        wrong = _wrong_end(ended)
    wrong += after_a_crash(output, saved) + resumed(sample, output, streams)
    shutil.rmtree(output)
    return [f"{case}: {fault}" for fault in wrong]


def _wrong_end(ended: Ended) -> list[str]:
    lines = ended.error_lines
    if ended.code != _STORAGE_EXIT or len(lines) != 1 or not lines[0].startswith("error: "):
        return [f"exit {ended.code}, said {lines}"]
    return []


# ---------------------------------------------------------------- full disks


def full_disks(sample: Sample, count: int) -> Row:
    """Run on disks of `count` sizes, all too small for the run; then make room and resume.

    With every other size the check of free space is off, so that the disk becomes full in the
    middle of the run, and not only where the kit looks ahead.
    """
    folder = sample.folder / "sizes"
    if reason := _why_no_mounts(folder):
        return Row(_SIZES_PROMISE, 0, 0, f"skipped: {reason}")
    files = [path for path in sample.unbroken.rglob("*") if path.is_file()]
    needed = sum(-(-path.stat().st_size // _PAGE_BYTES) * _PAGE_BYTES for path in files)
    sizes = [needed * (n + 1) // (count + 1) for n in range(count)]
    cases = [(size, n % 2 == 0) for n, size in enumerate(sizes)]
    results = spread(partial(_on_small_disk, sample), cases, folder)
    return row_of(_SIZES_PROMISE, results, f"{sizes[0] / 1e3:.0f} to {sizes[-1] / 1e3:.0f} kB")


_PAGE_BYTES = 4096
_ENOUGH_BYTES = 100_000_000
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_REMOUNT, _RECURSIVE, _PRIVATE = 0x20, 0x4000, 0x40000
_DETACH = 2


def _on_small_disk(sample: Sample, case: tuple[int, bool]) -> list[str]:
    size, is_unchecked = case
    disk = sample.folder / "sizes" / f"disk-{size}"
    disk.mkdir()
    _leave_the_mounts_of_others()
    _mount(disk, size)
    output, streams = disk / "run", disk.with_suffix(".streams")

    def do() -> None:
        if is_unchecked:
            _never_check_space()
        command(sample.arguments(output))

    wrong = _wrong_end(finish(do, streams)) + after_a_crash(output)
    _mount(disk, _ENOUGH_BYTES, _REMOUNT)
    wrong += resumed(sample, output, streams)
    _call("umount2", os.fsencode(disk), _DETACH)
    return [f"{size} bytes: {fault}" for fault in wrong]


def _never_check_space() -> None:
    from qlora_kit.train import checkpoint

    checkpoint.check_space = lambda *arguments: None


def _why_no_mounts(folder: Path) -> str | None:
    """Return why a process cannot have a disk of its own on this machine; None if it can."""

    def attempt() -> None:
        _leave_the_mounts_of_others()
        (folder / "tried").mkdir()
        _mount(folder / "tried", _PAGE_BYTES)

    ended = finish(attempt, folder / "tried-streams")
    return None if ended.code == 0 else ended.errors.strip().splitlines()[-1]


def _leave_the_mounts_of_others() -> None:
    """Give this process mounts of its own; on some systems this needs no root."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _call("unshare", _NEW_MOUNTS)
    elif not _has_own_mounts:
        _call("unshare", _NEW_MOUNTS | _NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        _has_own_mounts.append(True)
    _call("mount", b"none", b"/", None, _RECURSIVE | _PRIVATE, None)


# Remembers that this process has its user namespace: it cannot enter a second one from there.
_has_own_mounts: list[bool] = []


def _mount(folder: Path, size_bytes: int, flags: int = 0) -> None:
    size = f"size={size_bytes}".encode()
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", flags, size)


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")

"""Checks before work begins: a folder can be written, has room, and no other process writes it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_kit.errors import EnvironmentFault, OutputError, StorageError, raised_as
from qlora_kit.storage.faults import storage_errors

LOCK = ".lock"


def check_writable(folder: Path) -> None:
    """Check that `folder` can be made or written, before long work begins.

    Raises:
        OutputError: a part of its path is a file.
        StorageError: the nearest existing folder may not be written.
    """
    nearest = _nearest_existing(folder)
    if not nearest.is_dir():
        raise OutputError(f"{folder}: {nearest} is a file; expected a folder; name another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: {nearest} may not be written; name another folder")


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that there is room for `what`, before long work begins.

    Raises:
        StorageError: the disk has fewer bytes free.
    """
    with storage_errors(folder):
        free_bytes = shutil.disk_usage(_nearest_existing(folder)).free
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{folder}: {free_bytes / 1e9:.2f} GB free; expected {needed_bytes / 1e9:.2f} GB for "
            f"{what}; free space, or name another folder"
        )


def _nearest_existing(folder: Path) -> Path:
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Lock an existing folder against other processes while the block runs.

    The system releases the lock when the process ends, however it ends.

    Raises:
        EnvironmentFault: another process holds the lock.
        StorageError: the lock file cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    line = (
        f"{folder}: another qlora-kit process writes here; expected none; wait for it, or name "
        "another folder"
    )
    with storage_errors(folder), raised_as(EnvironmentFault, line, of=Timeout):
        lock.acquire()
    try:
        yield
    finally:
        # The file is removed while the lock is held: a process that opened it meanwhile sees that
        # the file has no name any more.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()

"""Checks before work begins: a folder can be written, has room, and no other process writes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_kit.errors import EnvironmentFault, OutputError, StorageError, raised_as
from qlora_kit.storage.faults import storage_errors

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
# `is_locked` holds a lock for an instant, which is no reason to refuse the folder.
_LOCK_SECONDS = 0.2


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
    lock = FileLock(folder / LOCK, timeout=_LOCK_SECONDS)
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


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds the lock of a folder, see `only_writer`.

    Returns:
        None where there is no lock file: who wrote here last has ended by itself. False where the
        file is left behind: its process was killed.

    Raises:
        StorageError: the lock file cannot be opened.
    """
    path = folder / LOCK
    if sys.platform == "win32":
        # There nobody can ask without taking the lock, and a file in use cannot be deleted.
        return True if path.exists() else None
    with storage_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False

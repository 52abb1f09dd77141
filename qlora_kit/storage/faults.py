"""What the disk refuses, as one line: the path, the reason, the remedy."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.errors import StorageError


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into one line about `path`.

    Raises:
        StorageError: in place of the `OSError`.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space" if full else "check the path and its rights"
        raise StorageError(f"{path}: {reason(error)}; {remedy}") from error


def reason(error: OSError) -> str:
    """Return what the system says, in lower case: "no space left on device"."""
    return (error.strerror or str(error)).lower()

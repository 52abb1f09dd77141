"""Turns an error of the disk into one line: the path, the reason, the remedy."""

from __future__ import annotations

import errno
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path

from qlora_kit.errors import StorageError, raised_as
from qlora_kit.errors import reason as reason

_NUMBER_IN_TEXT = re.compile(r"\(os error (\d+)\)")


def storage_errors(path: Path) -> AbstractContextManager[None]:
    """Turn an error of the operating system inside the block into one line about `path`.

    Raises:
        StorageError: in place of the system's error.
    """

    def line(error: Exception) -> str | None:
        refused = _of_the_system(error)
        if refused is None:
            return None
        full = refused.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space" if full else "check the path and its rights"
        return f"{path}: {reason(refused)}; {remedy}"

    return raised_as(StorageError, line)


def _of_the_system(error: Exception) -> OSError | None:
    """Return the system's error that an error reports; None if it reports none."""
    if isinstance(error, OSError):
        return error
    # safetensors and tokenizers raise their own errors, with the system's number in the text.
    match = _NUMBER_IN_TEXT.search(str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None

"""What the disk refuses, as one line: the path, the reason, the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.errors import QloraKitError, StorageError

_NUMBER_IN_TEXT = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an error of the system inside the block into one line about `path`.

    Raises:
        StorageError: in place of it.
    """
    try:
        yield
    except QloraKitError:
        raise
    except Exception as error:
        refused = _of_the_system(error)
        if refused is None:
            raise
        full = refused.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space" if full else "check the path and its rights"
        raise StorageError(f"{path}: {reason(refused)}; {remedy}") from error


def _of_the_system(error: Exception) -> OSError | None:
    """Return what the system said, if that is what the error is about."""
    if isinstance(error, OSError):
        return error
    # safetensors and tokenizers have errors of their own, with the system's in their text.
    match = _NUMBER_IN_TEXT.search(str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def reason(error: OSError) -> str:
    """Return what the system says, in lower case: "no space left on device"."""
    return (error.strerror or str(error)).lower()

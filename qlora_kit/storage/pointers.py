"""Checks that a file is not Git LFS's pointer to it, as a clone without the large files has it.

A pointer is a few lines of text. Read in place of the file it seems damaged; read as plain text it
would be learnt. Reads the start of a file; changes nothing.
"""

from __future__ import annotations

from pathlib import Path

from qlora_kit.errors import QloraKitError

# The first line of every pointer, up to the version of the format.
POINTER_START = b"version https://git-lfs.github.com/spec/"


def check_no_pointer(path: Path, kind: type[QloraKitError]) -> None:
    """Check that a file is no pointer; a missing or unreadable file passes as well.

    Args:
        path: the file that will be read.
        kind: the class of the error that is raised.

    Raises:
        QloraKitError: an error of `kind`: the file is a pointer.
    """
    try:
        with path.open("rb") as stream:
            is_pointer = stream.read(len(POINTER_START)) == POINTER_START
    except OSError:
        return
    if is_pointer:
        raise kind(
            f"{path}: a Git LFS pointer to the file; expected the file itself; get it with `git "
            "lfs pull`, or download it again"
        )

"""Whether a file is only Git LFS's pointer to it, as a clone without the large files leaves it.

Such a pointer is a few lines of text. Read as what it stands for it is damaged, or, as plain text,
something to learn from.
"""

from __future__ import annotations

from pathlib import Path

from qlora_kit.errors import QloraKitError

# The first line of every pointer, up to the version of the format.
POINTER_START = b"version https://git-lfs.github.com/spec/"


def check_no_pointer(path: Path, kind: type[QloraKitError]) -> None:
    """Check that a file is not a pointer; one that is missing or cannot be read is none.

    Args:
        path: what will be read.
        kind: of the error that is raised.

    Raises:
        QloraKitError: of `kind`.
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

"""Checks that a folder from elsewhere has no links that lead out of it.

An archive or a repository may hold links to files of this machine. Their content would then be
read as a part of a model, or written over. `check_confined` is called once, before a folder is
opened; the files of a folder that it accepted are opened by name as usual. Changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.errors import InputError
from qlora_kit.storage.faults import storage_errors

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def check_confined(folder: Path, kind: type[InputError] = InputError) -> None:
    """Check that everything in `folder` is a file or folder that lies inside it.

    The folder itself may be a link: the user named it. In a snapshot of the hub's cache the
    files are links to the `blobs` of the same repository, which count as inside. Folders whose
    name starts with a dot are not entered: nothing is read from them.

    Args:
        folder: an adapter, model, tokenizer or run; if it is no folder, nothing is checked.
        kind: the class of the error that is raised.

    Raises:
        InputError: an error of `kind`: a link leads outside, or there is a pipe, socket or device.
        StorageError: the folder cannot be listed.
    """
    if not folder.is_dir():
        return
    homes = _homes(folder)
    with storage_errors(folder):
        for entry in _entries(folder):
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if not any(target.is_relative_to(home) for home in homes):
                    raise kind(
                        f"{entry.path}: a link to {target}, outside of {folder}; expected only "
                        "files inside of it; put a copy in its place if you trust it"
                    )
                if not target.exists():
                    continue
            if not (entry.is_file() or entry.is_dir()):
                raise kind(
                    f"{entry.path}: a pipe, socket or device; expected only files and folders; "
                    "remove it"
                )


def _homes(folder: Path) -> list[Path]:
    """Return the folders in which the content of `folder` may lie, with links resolved."""
    home = Path(os.path.realpath(folder))
    if home.parent.name == _SNAPSHOTS and home.parent.parent.name.startswith("models--"):
        return [home, home.parent.parent / _BLOBS]
    return [home]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    # A list instead of recursion: folders may be nested deeper than Python's calls.
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    waiting.append(entry.path)

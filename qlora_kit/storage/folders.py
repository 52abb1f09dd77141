"""A folder, written as a whole and checked before it is trusted.

Its files go to a staging folder beside the target. Each file is flushed to the disk, a manifest of
SHA-256 hashes is written last, and one rename makes the folder visible. So a folder under its
final name is complete, and `verify_folder` can tell whether it has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.errors import DataError, OutputError, StorageError, raised_as
from qlora_kit.storage.faults import storage_errors
from qlora_kit.storage.files import json_text, staging_path, sync_file, sync_folder, write_json
from qlora_kit.storage.reading import parse_json

MANIFEST = "manifest.json"
_HASH_BLOCK_BYTES = 1 << 20
# The names that `staging_path` and `_aside` make: the target, the process, and the reason.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>staging|replaced)")

# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder that becomes `target` when the block ends well.

    Args:
        target: the final name; it must not exist unless `replace` is True.
        replace: move an existing target aside first, and delete it after the rename.

    Raises:
        OutputError: the target exists and `replace` is False.
        StorageError: a file or the folder could not be written; the staging folder is removed.
    """
    if target.exists() and not replace:
        raise OutputError(f"{target}: exists; expected a new folder; name another one")
    staging = staging_path(target)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_up(target.parent, target.name)
        staging.mkdir()
        try:
            yield staging
            _seal(staging)
            _swap(staging, target)
        except StorageError as error:
            # The user knows the folder by its final name, not by the staging folder's.
            faults = [fault.replace(str(staging), str(target)) for fault in error.faults]
            raise StorageError(*faults) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Flush every file of the folder and write the manifest of their hashes last."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            hashes[path.relative_to(folder).as_posix()] = _hash(path)
            sync_file(path)
    write_json(folder / MANIFEST, {"sha256": hashes})


def _swap(staging: Path, target: Path) -> None:
    aside = _aside(target)
    if target.exists():
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        # Interrupted between the two renames: the old folder gets its name back. After a kill at
        # this point, `clean_up` gives it back.
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.replaced")


def delete_folder(folder: Path) -> None:
    """Delete a folder; a kill meanwhile leaves it whole, or leaves nothing under its name.

    Raises:
        StorageError: the folder could not be deleted.
    """
    doomed = staging_path(folder)
    with storage_errors(folder):
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clean_up(folder: Path, name: str | None = None) -> None:
    """Undo the half-done work that killed processes left in `folder`.

    A target that was moved aside and not replaced gets its name back. Everything else that killed
    processes left is deleted. The staging folders of living processes are left alone.

    Args:
        folder: the folder of the targets.
        name: the only target to clean up after; if None, all targets.
    """
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or name not in (None, match["name"]) or _is_running(int(match["pid"])):
            continue
        target = folder / match["name"]
        if match["kind"] == "replaced" and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    # In a container process numbers are small and soon used again: a dead process had our number.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- checking


def verify_folder(folder: Path) -> None:
    """Check a folder written by `staged_folder` against its manifest.

    Raises:
        StorageError: the manifest or a file is missing, or changed since it was written.
    """
    with storage_errors(folder):
        for name, expected in _manifest(folder).items():
            path = folder / name
            if path.is_symlink() or not path.is_file():
                raise StorageError(f"{path}: missing; the folder is not whole")
            if _hash(path) != expected:
                raise StorageError(f"{path}: changed since it was written; its hash differs")


_NOT_A_MANIFEST = (OSError, UnicodeDecodeError, DataError, KeyError, TypeError, AttributeError)


def _manifest(folder: Path) -> dict[str, str]:
    """Return hashes by name, all of them inside the folder."""
    path = folder / MANIFEST
    line = f"{folder}: no readable {MANIFEST}; the folder is not whole"
    with raised_as(StorageError, line, of=_NOT_A_MANIFEST):
        text = path.read_text(encoding="utf-8")
        content = parse_json(text, str(path))
        hashes: dict[str, str] = content["sha256"]
        # The kit writes a manifest in one form only, so not even a changed space goes unseen.
        known = text == json_text(content) and list(content) == ["sha256"]
        inside = all(".." not in Path(name).parts and not name.startswith("/") for name in hashes)
    if not (known and inside and hashes):
        raise StorageError(f"{path}: not as it was written; the folder is not whole")
    return hashes


def is_sealed(folder: Path) -> bool:
    """Whether the folder was written whole by `staged_folder`."""
    return (folder / MANIFEST).is_file()


def manifest_hash(folder: Path) -> str:
    """Return the SHA-256 of a folder's manifest, which names every file in the folder.

    Raises:
        StorageError: there is no manifest.
    """
    with storage_errors(folder):
        return _hash(folder / MANIFEST)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        StorageError: the file cannot be read.
    """
    with storage_errors(path):
        return _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()

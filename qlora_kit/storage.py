"""The one way anything is written, and the one reader of lines.

A folder is written as a whole: its files go to a staging folder beside the target, each is
flushed to the disk, a manifest of SHA-256 hashes is written last, and one rename makes it
visible. So a folder that exists under its final name is complete, and `verify_folder` can
tell whether it still is what was written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_kit.errors import DataError, OutputError, StorageError

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
_HASH_BLOCK_BYTES = 1 << 20


class Line(NamedTuple):
    """One record and where it stands: `file` as given, `line` counted from 1."""

    file: str
    line: int
    record: Any


# ---------------------------------------------------------------- reading


def read_lines(path: Path) -> Iterator[Line]:
    r"""Yield the lines of a UTF-8 text file, without their line ends.

    Only "\n" (and "\r\n") ends a line: `str.splitlines` would also split at U+2028 and
    give later lines the wrong number.

    Raises:
        DataError: the file is missing, a folder, not readable or not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                yield Line(str(path), number, _decode(raw, path, number))
    except OSError as error:
        raise DataError(f"{path}: {_reason(error)}; expected a readable file") from error


def _decode(raw: bytes, path: Path, number: int) -> str:
    encoding = "utf-8-sig" if number == 1 else "utf-8"
    try:
        return raw.decode(encoding).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error


def read_json_lines(path: Path) -> Iterator[Line]:
    """Yield the records of a JSON-lines file; blank lines are skipped but counted.

    Raises:
        DataError: a line is not valid JSON, see `parse_json`.
    """
    for file, number, text in read_lines(path):
        if text.strip():
            yield Line(file, number, parse_json(text, f"{file}:{number}"))


def read_json(path: Path) -> Any:
    """Read a JSON file whole.

    Raises:
        DataError: the file is missing or is not valid JSON.
    """
    return parse_json("\n".join(line.record for line in read_lines(path)), str(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN or Infinity, no bottomless nesting.

    Raises:
        DataError: naming `where` and what was found.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply; flatten the record") from error
    except ValueError as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = error.msg
            where = f"{where}:{error.lineno}" if "\n" in text else where
        raise DataError(f"{where}: not valid JSON ({reason}); correct it") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'key "{twice}" stands twice')
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


# ---------------------------------------------------------------- writing one file


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a reader sees the old or the new file, never half.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.staging")
    with storage_errors(path):
        try:
            with staging.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, see `write_bytes`."""
    # A number that is not finite would not be read back: `parse_json` is strict.
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, readable by whom the umask allows.

    safetensors itself forces mode 0600, which hides an adapter from the user who serves it.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    staging = path.with_name(f".{path.name}.{os.getpid()}.staging")
    with storage_errors(path):
        try:
            save_file(dict(tensors), staging, metadata={"format": "pt", **(metadata or {})})
            staging.chmod(0o666 & ~_umask())
            _sync_file(staging)
            staging.replace(path)
        except SafetensorError as error:
            raise StorageError(f"{path}: could not be written ({error}); free space") from error
        finally:
            staging.unlink(missing_ok=True)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file into memory, on the CPU.

    Raises:
        StorageError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with storage_errors(path):
        try:
            tensors: dict[str, torch.Tensor] = load_file(path)
        except SafetensorError as error:
            raise StorageError(f"{path}: not a complete safetensors file ({error})") from error
    return tensors


# ---------------------------------------------------------------- writing a folder


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder that becomes `target` when the block ends well.

    Args:
        target: the final name; must not exist unless `replace`.
        replace: an existing target is moved aside first and deleted after the rename.

    Raises:
        OutputError: the target exists and `replace` is False.
        StorageError: anything could not be written; the staging folder is removed.
    """
    if target.exists() and not replace:
        raise OutputError(f"{target}: exists; expected a new folder; name another one")
    staging = target.with_name(f".{target.name}.{os.getpid()}.staging")
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            _seal(staging)
            _swap(staging, target)
        except StorageError as error:
            # The user knows the folder by its name, not by where it is staged.
            faults = [fault.replace(str(staging), str(target)) for fault in error.faults]
            raise StorageError(*faults) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Flush every file of the folder and write the manifest of their hashes last."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            hashes[path.relative_to(folder).as_posix()] = _hash_and_sync(path)
    write_json(folder / MANIFEST, {"sha256": hashes})


def _swap(staging: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    if target.exists():
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        # Interrupted between the two renames: the old folder takes its place again.
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def verify_folder(folder: Path) -> None:
    """Check a folder written by `staged_folder` against its manifest.

    Raises:
        StorageError: the manifest or a file is missing, or a file changed since.
    """
    try:
        hashes = read_json(folder / MANIFEST)["sha256"]
    except (DataError, KeyError, TypeError) as error:
        raise StorageError(f"{folder}: no readable {MANIFEST}; the folder is not whole") from error
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise StorageError(f"{path}: missing; the folder is not whole")
        if _hash(path) != expected:
            raise StorageError(f"{path}: changed since it was written; its hash differs")


def is_sealed(folder: Path) -> bool:
    """Whether the folder was written whole by `staged_folder`."""
    return (folder / MANIFEST).is_file()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _hash_and_sync(path: Path) -> str:
    digest = _hash(path)
    _sync_file(path)
    return digest


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # POSIX offers no way to read the mask without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def check_writable(folder: Path) -> None:
    """Check that `folder` can be made or written, before anything long is begun.

    Raises:
        OutputError: a part of its path is a file.
        StorageError: the nearest existing folder may not be written.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"{folder}: {nearest} is a file; expected a folder; name another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: {nearest} may not be written; name another folder")


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into one line about `path`.

    Raises:
        StorageError: in place of the `OSError`.
    """
    try:
        yield
    except OSError as error:
        remedy = "free space" if error.errno == errno.ENOSPC else "check the path and its rights"
        raise StorageError(f"{path}: {_reason(error)}; {remedy}") from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()

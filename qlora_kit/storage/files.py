"""One file, written whole: staged beside its name, flushed to the disk, renamed.

A reader sees the old file or the new one, never half of either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import StorageError, raised_as
from qlora_kit.storage.faults import storage_errors

if TYPE_CHECKING:
    import torch


def staging_path(path: Path) -> Path:
    """Return the staging path of `path`: beside it, so that one rename moves it into place.

    The name has the number of the process that writes it, see `folders.clean_up`.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.staging")


def write_bytes(path: Path, content: bytes, *, is_private: bool = False) -> None:
    """Replace `path` by `content`; a reader sees the old file or the new one, never half.

    Args:
        path: the file.
        content: its bytes.
        is_private: whether nobody but its owner may read it.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    staging = staging_path(path)
    with storage_errors(path):
        try:
            if is_private:
                staging.touch(mode=0o600)
                # What an earlier try left keeps the rights that it had.
                staging.chmod(0o600)
            with staging.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_by(path: Path, write: Callable[[Path], None]) -> None:
    """Replace `path` by the file that `write` writes where it is told, see `write_bytes`.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    staging = staging_path(path)
    with storage_errors(path):
        try:
            write(staging)
            sync_file(staging)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_text(path: Path, text: str, *, is_private: bool = False) -> None:
    """Write text as UTF-8, see `write_bytes`."""
    write_bytes(path, text.encode(), is_private=is_private)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, see `write_bytes`."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return `value` as indented JSON with a final newline; equal values give equal texts."""
    # A number that is not finite could not be read back: `parse_json` is strict.
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, with the permissions that the umask gives.

    safetensors itself forces mode 0600, which would hide an adapter from the user who serves it.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    from safetensors.torch import save_file

    def write(staging: Path) -> None:
        save_file(dict(tensors), staging, metadata={"format": "pt"})
        staging.chmod(0o666 & ~_umask())

    write_by(path, write)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file into memory, on the CPU.

    Raises:
        StorageError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def line(error: Exception) -> str:
        return f"{path}: not a complete safetensors file ({error})"

    with storage_errors(path), raised_as(StorageError, line, of=SafetensorError):
        tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk; only then does a rename last."""
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

"""The tensors of a checkpoint on disk, one at a time.

Takes a folder; returns a `TensorSource` that reads each tensor when it is asked for, mapped from
the file. So the whole checkpoint is never in memory. Never runs code that a file contains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_kit.errors import DataError, ModelError, first_line, raised_as
from qlora_kit.model.faults import model_errors
from qlora_kit.storage import check_no_pointer, read_json

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


class TensorSource(Protocol):
    """Named tensors that are read one at a time.

    Attributes:
        gives_own: whether a tensor that is read has memory of its own. A tensor of a file lies in
            the mapped file until it is copied.
    """

    gives_own: bool

    @property
    def names(self) -> Sequence[str]:
        """The names, in the order in which they are read fastest."""

    def read(self, name: str) -> Tensor:
        """Return one tensor."""


class SafetensorsShards:
    """A checkpoint in one or more safetensors files."""

    gives_own = False

    def __init__(self, files: Sequence[Path]) -> None:
        self._shards: dict[str, Any] = {}
        for path in files:
            self._shards |= _open_shard(path)

    @property
    def names(self) -> Sequence[str]:
        """The names, file by file."""
        return list(self._shards)

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file."""
        with model_errors(
            f"{name}: cannot be read", "a tensor that torch knows; download it again"
        ):
            tensor: Tensor = self._shards[name].get_tensor(name)
        return tensor


def _open_shard(path: Path) -> dict[str, Any]:
    """Return the name of each tensor in a file, each with the open file."""

    def line(error: Exception) -> str:
        return f"{path}: not a complete safetensors file ({error}); download it again"

    check_no_pointer(path, ModelError)
    with raised_as(ModelError, line, of=(SafetensorError, OSError)):
        shard = safe_open(path, framework="pt")
        return dict.fromkeys(shard.keys(), shard)


class PickledShards:
    """A checkpoint in `.bin` files, read without running the code they may contain.

    A shard is mapped when its first tensor is read, and let go when a tensor of another shard is.
    """

    gives_own = False

    def __init__(self, files: Sequence[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._open_path: Path | None = None
        self._open: dict[str, Tensor] = {}
        for path in files:
            self._file_of.update(dict.fromkeys(_load_pickle(path), path))

    @property
    def names(self) -> Sequence[str]:
        """The names, file by file."""
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file."""
        path = self._file_of[name]
        if path != self._open_path:
            self._open = {}
            self._open_path, self._open = path, _load_pickle(path)
        return self._open[name]


def _load_pickle(path: Path) -> dict[str, Tensor]:
    check_no_pointer(path, ModelError)
    # A damaged or hostile pickle can raise any error in the unpickler.
    with raised_as(ModelError, lambda error: _not_plain(path, error)):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # Files from before torch 1.6 are not zip archives and cannot be mapped.
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(map(_is_plain_tensor, content, content.values())):
        raise ModelError(
            f"{path}: not a checkpoint of plain tensors; expected name: tensor; download it again"
        )
    return content


def _not_plain(path: Path, error: Exception) -> str | None:
    if isinstance(error, MemoryError):
        return None
    return (
        f"{path}: not a checkpoint of plain tensors ({first_line(error, 120)}); expected name: "
        "tensor; download it from a source you trust"
    )


def _is_plain_tensor(name: Any, value: Any) -> bool:
    """Whether an entry is an ordinary tensor in the file, and no other kind of torch's tensors."""
    is_tensor = isinstance(name, str) and isinstance(value, Tensor)
    return is_tensor and value.device.type == "cpu" and value.layout is torch.strided


class SomeTensors:
    """The tensors of a checkpoint that are wanted.

    Args:
        source: the checkpoint.
        wants: whether a tensor is wanted, by its name.
    """

    def __init__(self, source: TensorSource, wants: Callable[[str], bool]) -> None:
        self._source, self._wants = source, wants
        self.gives_own = source.gives_own

    @property
    def names(self) -> Sequence[str]:
        """The names of the wanted tensors."""
        return [name for name in self._source.names if self._wants(name)]

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._source.read(name)


def open_checkpoint(folder: Path) -> TensorSource:
    """Find and open the weights in a folder; safetensors are preferred to `.bin`.

    Raises:
        ModelError: there are no weights, a shard of the index is missing, or a file is damaged.
    """
    files = _weight_files(folder)
    if files[0].suffix == ".safetensors":
        return SafetensorsShards(files)
    return PickledShards(files)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of the matrices of a checkpoint; None where there is none to look at."""
    try:
        source = open_checkpoint(folder)
    except ModelError:
        return None
    return next((t.dtype for t in map(source.read, source.names) if t.dim() > 1), None)


def _weight_files(folder: Path) -> list[Path]:
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        if (folder / index).is_file():
            return list(_indexed_files(folder / index))
        if (folder / single).is_file():
            return [folder / single]
    raise ModelError(
        f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or their index "
        "with shards (or pass --weights random)"
    )


def _indexed_files(index: Path) -> Iterator[Path]:
    line = f'{index}: not an index; expected a "weight_map" of file names'
    with raised_as(ModelError, line, of=(DataError, KeyError, AttributeError, TypeError)):
        names = dict.fromkeys(read_json(index)["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("no file names")
    for name in names:
        path = index.parent / name
        if Path(name).name != name or "\\" in name:
            raise ModelError(f"{index}: names {name!r}; expected a file in the same folder")
        if not path.is_file():
            raise ModelError(f"{path}: missing, though the index names it; download it again")
        yield path

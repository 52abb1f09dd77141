"""Sharded safetensors: takes tensors one by one, and writes files of a bounded size.

Takes an empty folder and named tensors; leaves `model.safetensors`, or numbered shards with the
index that transformers reads. Never holds more than one shard in memory.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qlora_kit.storage import save_tensors, write_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors, and writes a file whenever the next tensor would not fit.

    Args:
        folder: the folder of the files.
        shard_bytes: bytes of the largest file, unless a single tensor is larger.

    Attributes:
        total_bytes: bytes of all tensors so far.
        tensors: number of all tensors so far.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0
        self.tensors = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor on the CPU that shares its memory with no other.

        Raises:
            StorageError: a file could not be written.
        """
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.tensors += 1

    def _flush(self) -> None:
        save_tensors(self._folder / f"shard-{len(self._shards)}.safetensors", self._pending)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> int:
        """Write the rest, give the files their final names, and return how many there are.

        Raises:
            StorageError: a file could not be written.
        """
        self._flush()
        count = len(self._shards)
        if count == 1:
            (self._folder / "shard-0.safetensors").rename(self._folder / _SINGLE)
            return 1
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"shard-{index}.safetensors").rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        write_json(
            self._folder / _INDEX,
            {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map},
        )
        return count

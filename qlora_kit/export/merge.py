"""Dequantise and merge: an unquantised model with the adapter folded in.

Streams the base tensor by tensor, quantises and dequantises each linear weight just as
training did, adds the adapter's delta in fp32 and rounds once. So what is written is what
was trained, and the model never stands in memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from qlora_kit.data.template import end_token_ids
from qlora_kit.errors import AdapterError, ModelError, OutputError
from qlora_kit.events import Announce, silent
from qlora_kit.lora.adapter import StoredAdapter, check_layers
from qlora_kit.model.architecture import (
    build_skeleton,
    linear_layers,
    read_generation_config,
)
from qlora_kit.model.hardware import dtype_name, dtype_named
from qlora_kit.model.load import BaseSpec, Digest, frozen_tensors
from qlora_kit.model.memory import memory_returned, out_of_memory_while
from qlora_kit.model.quantize import FrozenWeight
from qlora_kit.storage import (
    MANIFEST,
    check_space,
    is_sealed,
    save_tensors,
    staged_folder,
    write_json,
)


@dataclass(frozen=True)
class Merged:
    """What an export wrote.

    Attributes:
        folder: the merged model.
        tensors: number of tensors.
        layers: number of layers the adapter changed.
        bytes: of the weights.
        shards: number of weight files.
    """

    folder: Path
    tensors: int
    layers: int
    bytes: int
    shards: int


def merge_to(
    folder: Path,
    stored: StoredAdapter,
    spec: BaseSpec,
    tokenizer: Any,
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | None = None,
    shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
    announce: Announce = silent,
) -> Merged:
    """Write the merged model as sharded safetensors that plain transformers opens.

    Args:
        folder: new folder; visible only when it is whole.
        stored: the adapter.
        spec: the base, quantised as in training.
        tokenizer: saved beside the weights.
        dtype: of the merged weights.
        device: where each tensor is quantised and merged; the CPU if None.
        shard_bytes: largest file, unless a single tensor is larger.
        overwrite: replace an existing folder.
        announce: receives the progress.

    Host memory stays under one shard plus three times the largest tensor.

    Raises:
        AdapterError: a layer of the adapter is not in the base, or the base's weights are not
            those it was trained on.
        ModelError: a merged value does not fit the dtype.
        OutOfMemory: a tensor does not fit on the device, or a shard in host memory.
        StorageError: the disk has no room for it, or refuses it.
        OutputError: the folder exists, or replacing it would delete what is not a merged
            model or what the merge reads.
    """
    _check_target(folder, [stored.folder, spec.folder], overwrite)
    architecture = spec.architecture()
    skeleton = build_skeleton(architecture)
    check_layers(stored, linear_layers(skeleton), "the base")
    check_space(folder, _merged_bytes(skeleton, dtype), "the merged model")
    digest = Digest()
    with (
        out_of_memory_while("merging", "pass --device cpu, or a smaller --max-shard-size"),
        staged_folder(folder, replace=overwrite) as staging,
        memory_returned(),
    ):
        stream = frozen_tensors(spec, skeleton, device or torch.device("cpu"), digest, announce)
        writer = _ShardWriter(staging, shard_bytes)
        for name, tensor in merged_tensors(stream, stored, dtype):
            writer.add(name, tensor)
        shards = writer.finish()
        if stored.record is not None and digest.hexdigest() != stored.record.digest:
            raise AdapterError(
                f"{stored.folder}: trained on other weights than {spec.source.name} has; name "
                "the right base with --model"
            )
        _write_config(staging, architecture, skeleton, tokenizer, dtype, spec.folder)
        tokenizer.save_pretrained(staging)
    return Merged(folder, writer.tensors, len(stored.tensors), writer.total_bytes, shards)


def _check_target(folder: Path, sources: Sequence[Path | None], overwrite: bool) -> None:
    target = folder.resolve()
    for source in (source.resolve() for source in sources if source is not None):
        if target == source or target in source.parents:
            raise OutputError(f"{folder}: holds {source}, which the merge reads; name another --to")
    if overwrite and folder.exists() and not is_sealed(folder):
        raise OutputError(
            f"{folder}: --overwrite replaces a merged model, but this holds no {MANIFEST}; name "
            "another --to"
        )


def _merged_bytes(skeleton: PreTrainedModel, dtype: torch.dtype) -> int:
    tied = skeleton.all_tied_weights_keys or {}
    stored: dict[str, Tensor] = skeleton.state_dict()
    return sum(t.numel() for name, t in stored.items() if name not in tied) * dtype.itemsize


@torch.no_grad()
def merged_tensors(
    stream: Iterator[tuple[str, FrozenWeight | Tensor]], stored: StoredAdapter, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the merged model as it is written, on the CPU.

    Args:
        stream: every parameter of the base, frozen as in training.
        stored: the adapter.
        dtype: of the merged weights.

    Raises:
        ModelError: a merged value does not fit the dtype.
    """
    unpacked = dtype_named(stored.record.dequantization_dtype) if stored.record else torch.float32
    for name, value in stream:
        tensor = value.dequantize(unpacked) if isinstance(value, FrozenWeight) else value
        path = name.removesuffix(".weight")
        if path in stored.tensors:
            tensor = tensor.float() + stored.delta(path).to(tensor.device)
        yield name, _cast(name, tensor, dtype)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype).cpu().contiguous()
    if not torch.isfinite(cast).all():
        raise ModelError(
            f"{name}: its largest value {float(tensor.abs().max()):.3g} does not fit "
            f"{dtype_name(dtype)}; pass --dtype bfloat16"
        )
    return cast


class _ShardWriter:
    """Collects tensors and writes a file whenever the next would not fit."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0
        self.tensors = 0

    def add(self, name: str, tensor: Tensor) -> None:
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
        """Write the rest, give the files their final names and write the index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            (self._folder / "shard-0.safetensors").rename(self._folder / "model.safetensors")
            return 1
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"shard-{index}.safetensors").rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        write_json(
            self._folder / "model.safetensors.index.json",
            {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map},
        )
        return count


def _write_config(
    folder: Path,
    architecture: PreTrainedConfig,
    skeleton: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    base_folder: Path | None,
) -> None:
    numbers = json.loads(architecture.to_json_string(use_diff=True))
    numbers.pop("quantization_config", None)
    numbers.pop("torch_dtype", None)
    numbers["architectures"] = [type(skeleton).__name__]
    numbers["dtype"] = dtype_name(dtype)
    write_json(folder / "config.json", numbers)
    generation = read_generation_config(base_folder) if base_folder else None
    if generation is None:
        generation = GenerationConfig.from_model_config(architecture)
    ends = end_token_ids(tokenizer, generation.eos_token_id)
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    generation.save_pretrained(folder)

"""Writes a model in 4 or 8 bits: a bitsandbytes checkpoint that loads in seconds.

Takes the spec of a model; writes a folder. The checkpoint is streamed tensor by tensor. The weights
of the linear layers are quantised as training does it, and their parts are stored under
bitsandbytes' names, so plain transformers opens the model too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.errors import ModelError
from qlora_kit.events import Announce, silent
from qlora_kit.export.merge import (
    check_packable,
    has_original,
    packed_tensors,
    stored_bytes,
)
from qlora_kit.export.model_files import write_model_files
from qlora_kit.export.shards import ShardWriter
from qlora_kit.export.target import check_target
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import PlainWeight
from qlora_kit.model.architecture import unquantized_share
from qlora_kit.model.convert import with_kernels
from qlora_kit.model.load import BaseSpec, Digest, frozen_tensors
from qlora_kit.model.memory import memory_returned, out_of_memory_while
from qlora_kit.storage import check_space, staged_folder


@dataclass(frozen=True)
class Quantized:
    """The quantised model that was written.

    Attributes:
        folder: its folder.
        bytes: bytes of its tensors.
        original_bytes: bytes of the same tensors before.
        shards: number of weight files.
    """

    folder: Path
    bytes: int
    original_bytes: int
    shards: int


def quantize_to(
    folder: Path,
    spec: BaseSpec,
    quantization: Quantization,
    tokenizer: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
    announce: Announce = silent,
) -> Quantized:
    """Write a model with its linear layers in 4 or 8 bits.

    Args:
        folder: a new folder; it is visible only when it is whole.
        spec: the unquantised model.
        quantization: the quantisation, in 4 or 8 bits.
        tokenizer: the tokenizer, saved beside the weights.
        dtype: dtype of embeddings, head and norms; the stored dtype if None.
        device: the device on which each tensor is quantised; the CPU if None.
        shard_bytes: bytes of the largest file, unless a single tensor is larger.
        overwrite: replace an existing folder.
        announce: receives the progress.

    Raises:
        ModelError: the model is quantised already, too many of its weights are not of linear
            layers, or a value does not fit the dtype.
        OutOfMemory: a tensor does not fit in memory.
        StorageError: the disk has no room for the model, or refuses to write it.
        OutputError: the folder exists; or see `target.check_target`.
    """
    check_target(folder, [spec.folder], overwrite)
    skeleton = spec.skeleton()
    if not has_original(spec, skeleton):
        raise ModelError(
            f"{spec.source.name}: is quantised already; expected unquantised weights; name the "
            "model it was made of"
        )
    unquantized_share(skeleton)
    check_packable(skeleton, spec.source.name)
    device = device or torch.device("cpu")
    spec = replace(spec, quantization=Quantization(bits=16))
    original_bytes = 0

    def plain() -> Iterator[tuple[str, Tensor]]:
        nonlocal original_bytes
        for name, value in frozen_tensors(spec, skeleton, device, Digest(), announce):
            tensor = value.values if isinstance(value, PlainWeight) else value
            assert isinstance(tensor, Tensor)
            original_bytes += tensor.nbytes
            yield name, tensor

    with (
        out_of_memory_while("quantising", "pass --device cpu, or a smaller --max-shard-size"),
        staged_folder(folder, replace=overwrite) as staging,
        memory_returned(),
    ):
        stream = plain()
        first = next(stream)
        dtype = dtype or first[1].dtype
        check_space(folder, stored_bytes(skeleton, dtype, quantization), "the quantised model")
        writer = ShardWriter(staging, shard_bytes)
        tensors = itertools.chain([first], stream)
        packed = packed_tensors(tensors, skeleton, quantization, dtype, device)
        for name, tensor in with_kernels(packed, skeleton):
            writer.add(name, tensor)
        shards = writer.finish()
        write_model_files(
            staging,
            skeleton,
            tokenizer,
            dtype,
            base_folder=spec.folder,
            quantization=quantization,
        )
    return Quantized(folder, writer.total_bytes, original_bytes, shards)

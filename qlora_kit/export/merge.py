"""Dequantise and merge: a model with the adapter folded in, unquantised or quantised again.

Streams the base tensor by tensor, quantises and dequantises each linear weight just as
training did, adds the adapter's delta in fp32 and rounds once. So what is written is what
was trained, and the model never stands in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.errors import AdapterError, ConfigError, ModelError, OutputError
from qlora_kit.events import Announce, silent
from qlora_kit.export.model_files import write_model_files
from qlora_kit.export.shards import ShardWriter
from qlora_kit.layers.projections import projected_weights, projections, stacks
from qlora_kit.layers.quantize import Quantization, bitsandbytes_parts
from qlora_kit.layers.weight import FrozenWeight
from qlora_kit.lora.adapter import StoredAdapter, check_layers
from qlora_kit.lora.saved import check_saved
from qlora_kit.model.convert import as_stored
from qlora_kit.model.hardware import dtype_name, dtype_named
from qlora_kit.model.load import BaseSpec, Digest, freeze, frozen_tensors, stored_quantization
from qlora_kit.model.memory import memory_returned, out_of_memory_while
from qlora_kit.storage import MANIFEST, check_space, is_sealed, staged_folder

BaseName = Literal["quantized", "original"]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Merge:
    """What is merged into what, and how it is written.

    Attributes:
        stored: the adapter.
        spec: the base, quantised as in training.
        dtype: of the merged weights; with `requantize`, of all that is not a linear layer.
        over: "quantized": the base as training had it, dequantised. "original": the weights
            of the checkpoint.
        requantize: pack the merged linear weights as the base was packed.
        device: where each tensor is quantised and merged.
    """

    stored: StoredAdapter
    spec: BaseSpec
    dtype: torch.dtype = torch.float16
    over: BaseName = "quantized"
    requantize: bool = False
    device: torch.device = _CPU

    @property
    def unpacked(self) -> torch.dtype:
        """What training unpacked the weights to."""
        record = self.stored.record
        return dtype_named(record.dequantization_dtype) if record else torch.float32


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


Check = Callable[[Merge, Path], None]
"""Sees a merge and the folder it was written to before anyone else can, and raises to undo it."""


def merge_to(
    folder: Path,
    stored: StoredAdapter,
    spec: BaseSpec,
    tokenizer: Any,
    *,
    dtype: torch.dtype = torch.float16,
    over: BaseName = "quantized",
    requantize: bool = False,
    device: torch.device | None = None,
    shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
    check: Check | None = None,
    announce: Announce = silent,
) -> Merged:
    """Write the merged model as sharded safetensors that plain transformers opens.

    Args:
        folder: new folder; visible only when it is whole.
        stored: the adapter.
        spec: the base, quantised as in training.
        tokenizer: saved beside the weights.
        dtype: of the merged weights.
        over: which base the delta is added to, see `Merge`.
        requantize: pack the linear weights again, as a bitsandbytes checkpoint.
        device: where each tensor is quantised and merged; the CPU if None.
        shard_bytes: largest file, unless a single tensor is larger.
        overwrite: replace an existing folder.
        check: sees the whole model before it becomes visible, see `export.verify`.
        announce: receives the progress.

    Host memory stays under one shard plus three times the largest tensor.

    Raises:
        AdapterError: a layer of the adapter is not in the base, or the base's weights are not
            those it was trained on.
        ConfigError: `over` or `requantize` ask for what this base cannot give.
        ModelError: a merged value does not fit the dtype.
        OutOfMemory: a tensor does not fit on the device, or a shard in host memory.
        StorageError: the disk has no room for it, or refuses it.
        OutputError: the folder exists, or replacing it would delete what is not a merged
            model or what the merge reads.
    """
    merge = Merge(stored, spec, dtype, over, requantize, device or _CPU)
    check_target(folder, [stored.folder, spec.folder], overwrite)
    skeleton = spec.skeleton()
    _check_possible(merge, skeleton)
    check_layers(stored, projections(skeleton), "the base")
    check_saved(stored.saved, skeleton, stored.folder)
    if stored.changes_nothing:
        raise AdapterError(
            f"{stored.folder}: A or B of every layer is zero ({len(stored.tensors)} layers), so "
            "merging changes nothing; expected a trained adapter; train it, or name another"
        )
    check_space(folder, _merged_bytes(skeleton, merge), "the merged model")
    with staged_folder(folder, replace=overwrite) as staging:
        writer = ShardWriter(staging, shard_bytes)
        remedy = "pass --device cpu, or a smaller --max-shard-size"
        with out_of_memory_while("merging", remedy), memory_returned():
            digest = Digest()
            for name, tensor in _written_tensors(merge, skeleton, digest, announce):
                writer.add(name, tensor)
            shards = writer.finish()
        if stored.record is not None and digest.hexdigest() != stored.record.digest:
            raise AdapterError(
                f"{stored.folder}: trained on other weights than {spec.source.name} has; name "
                "the right base with --model"
            )
        packed = spec.quantization if requantize else None
        write_model_files(
            staging,
            skeleton,
            tokenizer,
            dtype,
            base_folder=spec.folder,
            quantization=packed,
            untied=bool(untied_copies(stored, skeleton)),
        )
        if check is not None:
            check(merge, staging)
    return Merged(folder, writer.tensors, len(stored.tensors), writer.total_bytes, shards)


# ---------------------------------------------------------------- before anything is read


def check_target(folder: Path, sources: Sequence[Path | None], overwrite: bool) -> None:
    """Check that writing a model to `folder` deletes nothing that is not one.

    Raises:
        OutputError: it holds one of `sources`, stands inside a checkpoint or a model, or would
            be replaced and is no model of the kit.
    """
    target = folder.resolve()
    for source in (source.resolve() for source in sources if source is not None):
        if target == source or target in source.parents:
            raise OutputError(f"{folder}: holds {source}, which is read for it; name another --to")
    for parent in target.parents:
        if is_sealed(parent):
            raise OutputError(
                f"{folder}: is inside {parent}, which was written whole and is replaced or deleted "
                "as a whole; name another --to"
            )
    if overwrite and folder.exists() and not is_sealed(folder):
        raise OutputError(
            f"{folder}: --overwrite replaces a model that the kit wrote, but this holds no "
            f"{MANIFEST}; name another --to"
        )


def _check_possible(merge: Merge, skeleton: PreTrainedModel) -> None:
    quantization, name = merge.spec.quantization, merge.spec.source.name
    if merge.over == "original" and not has_original(merge.spec, skeleton):
        raise ConfigError(
            f"--base original: {name} is stored quantised and has no other weights; expected an "
            "unquantised checkpoint; leave --base out"
        )
    if merge.requantize and quantization.bits == 16:
        raise ConfigError(
            "--requantize: the adapter was trained on an unquantised base; expected one in 4 or 8 "
            "bits; merge without it, then pass the merged model to `qlora-kit quantize`"
        )
    if merge.requantize:
        check_packable(skeleton, name)


def check_packable(skeleton: PreTrainedModel, name: str) -> None:
    """Check that bitsandbytes' form of a checkpoint can hold a model's layers.

    Raises:
        ModelError: it has stacked ones.
    """
    if found := stacks(skeleton):
        raise ModelError(
            f"{name}: keeps its experts stacked ({next(iter(found))}), which a checkpoint of "
            "bitsandbytes cannot hold; expected linear layers; merge without --requantize, and let "
            "`train` and `evaluate` quantise as they load"
        )


def has_original(spec: BaseSpec, skeleton: PreTrainedModel) -> bool:
    """Whether a checkpoint holds its weights as they were before quantisation."""
    return spec.random or stored_quantization(skeleton.config) is None


def _merged_bytes(skeleton: PreTrainedModel, merge: Merge) -> int:
    return stored_bytes(
        skeleton, merge.dtype, merge.spec.quantization if merge.requantize else None
    )


def stored_bytes(
    skeleton: PreTrainedModel, dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """Return about what a model takes on the disk.

    Args:
        skeleton: the architecture.
        dtype: of what is not packed.
        quantization: how linear layers are packed, or None.
    """
    tied: dict[str, str] = skeleton.all_tied_weights_keys or {}
    parameters: dict[str, Tensor] = skeleton.state_dict()
    sizes = {name: t.numel() for name, t in parameters.items() if name not in tied}
    total = sum(sizes.values())
    if quantization is None:
        return total * dtype.itemsize
    linear = sum(sizes[name] for name in projected_weights(skeleton))
    constants = 0.25 if quantization.double_quant else 0.5  # bits a weight, at most
    return int(linear * (quantization.bits + constants) / 8) + (total - linear) * dtype.itemsize


# ---------------------------------------------------------------- the stream


def _written_tensors(
    merge: Merge, skeleton: PreTrainedModel, digest: Digest, announce: Announce
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the new model as it lies in its files."""
    spec, unpacked = merge.spec, merge.unpacked
    if merge.over == "original":
        spec, unpacked = replace(spec, quantization=Quantization(bits=16)), torch.float32
    stream = _with_copies(
        frozen_tensors(spec, skeleton, merge.device, digest, announce),
        untied_copies(merge.stored, skeleton),
    )
    if not merge.requantize:
        merged = merged_tensors(stream, merge.stored, merge.dtype, unpacked)
        yield from as_stored(merged, skeleton)
        return
    merged = merged_tensors(stream, merge.stored, torch.float32, unpacked)
    yield from packed_tensors(merged, skeleton, merge.spec.quantization, merge.dtype, merge.device)


def untied_copies(stored: StoredAdapter, skeleton: PreTrainedModel) -> dict[str, str]:
    """Return the tied parameters that an adapter makes differ, by name, with what they copied."""
    tied = skeleton.all_tied_weights_keys or {}
    return {
        copy: source
        for copy, source in tied.items()
        if copy in stored.saved or source in stored.saved
    }


def _with_copies(
    stream: Iterator[tuple[str, FrozenWeight | Tensor]], copies: Mapping[str, str]
) -> Iterator[tuple[str, FrozenWeight | Tensor]]:
    """Yield each parameter, and after it the copies of it that are stored for themselves."""
    for name, value in stream:
        yield name, value
        for copy, source in copies.items():
            if source == name:
                yield copy, value


@torch.no_grad()
def merged_tensors(
    stream: Iterator[tuple[str, FrozenWeight | Tensor]],
    stored: StoredAdapter,
    dtype: torch.dtype,
    unpacked: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the merged model as it is written, on the CPU.

    Args:
        stream: every parameter of the base, frozen as in training.
        stored: the adapter.
        dtype: of the merged weights.
        unpacked: what the frozen weights are unpacked to before the delta is added in fp32.

    Raises:
        ModelError: a merged value does not fit the dtype.
    """
    for name, value in stream:
        tensor = value.dequantize(unpacked) if isinstance(value, FrozenWeight) else value
        path = name.removesuffix(".weight")
        if name in stored.saved:
            tensor = stored.saved[name]
        elif path in stored.tensors:
            # Into the delta: only that one is sure to be nobody else's memory.
            tensor = stored.delta(path).to(tensor.device).add_(tensor)
        yield name, _cast(name, tensor, dtype)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype).cpu().contiguous()
    # The extremes of a tensor with NaN are NaN; twenty times as fast as asking every value.
    if cast.numel() and not all(map(torch.isfinite, cast.aminmax())):
        raise ModelError(
            f"{name}: its largest value {float(tensor.abs().max()):.3g} does not fit "
            f"{dtype_name(dtype)}; pass --dtype bfloat16"
        )
    return cast


@torch.no_grad()
def packed_tensors(
    tensors: Iterator[tuple[str, Tensor]],
    skeleton: PreTrainedModel,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yield a model as a bitsandbytes checkpoint holds it, on the CPU.

    Args:
        tensors: every parameter, unquantised.
        skeleton: says which of them are weights of linear layers.
        quantization: how those are packed.
        dtype: of the others.
        device: where each tensor is quantised.

    Raises:
        ModelError: a value does not fit the dtype or the quantisation.
    """
    linear = projected_weights(skeleton)
    for name, tensor in tensors:
        if name not in linear:
            yield name, _cast(name, tensor, dtype)
            continue
        weight = freeze(name, tensor, True, quantization, device)
        assert isinstance(weight, FrozenWeight)
        owner = name.removesuffix("weight")
        for part, value in bitsandbytes_parts(weight, dtype).items():
            # Copied: all layers share one code book, and a file holds no tensor twice.
            yield owner + part, value.to("cpu", copy=True).contiguous()

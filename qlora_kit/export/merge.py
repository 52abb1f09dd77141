"""Merges an adapter into its base, and writes the model: unquantised, or quantised again.

Takes an adapter and the spec of its base; writes a folder. The base is streamed tensor by tensor.
Each linear weight is quantised and dequantised just as training did, the adapter's delta is added
in fp32, and the sum is rounded once. So the written model is the trained one. The whole model is
never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.errors import AdapterError, ConfigError, ModelError
from qlora_kit.events import Announce, silent
from qlora_kit.export.model_files import write_model_files
from qlora_kit.export.shards import ShardWriter
from qlora_kit.export.target import check_target
from qlora_kit.layers.projections import carriers, projected_weights, stacks
from qlora_kit.layers.quantize import Quantization, bitsandbytes_parts
from qlora_kit.layers.weight import FrozenWeight
from qlora_kit.lora.adapter import check_layers, check_token_rows
from qlora_kit.lora.biases import check_mergeable
from qlora_kit.lora.saved import check_saved
from qlora_kit.lora.stored import StoredAdapter
from qlora_kit.lora.vocabulary import check_same
from qlora_kit.model.convert import as_stored, with_kernels
from qlora_kit.model.encoder_decoder import stays_unpacked
from qlora_kit.model.hardware import dtype_name, dtype_named
from qlora_kit.model.load import (
    BaseSpec,
    Digest,
    freeze,
    frozen_tensors,
    stored_quantization,
    unpacked_modules,
)
from qlora_kit.model.memory import memory_returned, out_of_memory_while
from qlora_kit.storage import check_space, staged_folder

if TYPE_CHECKING:
    from qlora_kit.export.gguf.model_file import GgufFile

BaseName = Literal["quantized", "original"]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Merge:
    """A merge: the adapter, the base, and how the result is written.

    Attributes:
        stored: the adapter.
        spec: the base, quantised as in training.
        dtype: dtype of the merged weights; with `requantize`, of all weights but linear ones.
        over: the weights that the delta is added to. "quantized": the base as training had it,
            dequantised. "original": the weights of the checkpoint.
        requantize: whether the merged linear weights are packed as the base was packed.
        device: the device on which each tensor is quantised and merged.
        file: the GGUF file that is written instead of safetensors; None without one.
    """

    stored: StoredAdapter
    spec: BaseSpec
    dtype: torch.dtype = torch.float16
    over: BaseName = "quantized"
    requantize: bool = False
    device: torch.device = _CPU
    file: GgufFile | None = None

    @property
    def form(self) -> str:
        """How the merged weights are written, in words."""
        return dtype_name(self.dtype) if self.file is None else self.file.form

    @property
    def exact(self) -> str:
        """The option that writes the merged weights unrounded."""
        return "--dtype float32" if self.file is None else "--gguf-type f32"

    @property
    def is_merge_aware(self) -> bool:
        """Whether training multiplied by the merged weights, packed again."""
        return self.stored.spec.variant.merge_aware

    @property
    def unpacked(self) -> torch.dtype:
        """The dtype that training unpacked the weights to."""
        record = self.stored.record
        return dtype_named(record.dequantization_dtype) if record else torch.float32


@dataclass(frozen=True)
class Merged:
    """The merged model that an export wrote.

    Attributes:
        folder: its folder.
        tensors: number of tensors.
        layers: number of layers that the adapter changed; the experts of a stack count as one.
        bytes: bytes of the weights.
        shards: number of weight files.
    """

    folder: Path
    tensors: int
    layers: int
    bytes: int
    shards: int


Check = Callable[[Merge, Path], None]
"""Takes a merge and its folder before the folder is visible; raises an error to undo the merge."""


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
    file: GgufFile | None = None,
    overwrite: bool = False,
    check: Check | None = None,
    announce: Announce = silent,
) -> Merged:
    """Write the merged model: as sharded safetensors that plain transformers opens, or as GGUF.

    Args:
        folder: a new folder; it is visible only when it is whole.
        stored: the adapter.
        spec: the base, quantised as in training.
        tokenizer: the tokenizer, saved beside the weights.
        dtype: dtype of the merged weights.
        over: the weights that the delta is added to, see `Merge`.
        requantize: pack the linear weights again, as a bitsandbytes checkpoint has them.
        device: the device on which each tensor is quantised and merged; the CPU if None.
        shard_bytes: bytes of the largest file, unless a single tensor is larger.
        file: the GGUF file to write instead; it has types and tokenizer of its own.
        overwrite: replace an existing folder.
        check: checks the whole model before it becomes visible, see `export.verify`.
        announce: receives the progress.

    Host memory stays under one shard plus three times the largest tensor.

    Raises:
        AdapterError: a layer of the adapter is not in the base, the adapter was trained on other
            weights than the base has, or the adapter changes nothing.
        ConfigError: this base cannot give what `over` or `requantize` ask for.
        ModelError: a merged value does not fit the dtype.
        OutOfMemory: a tensor does not fit on the device, or a shard in host memory.
        StorageError: the disk has no room for the model, or refuses to write it.
        OutputError: the folder exists; or replacing it would delete a folder that is no merged
            model, or files that the merge reads.
    """
    check_target(folder, [stored.folder, spec.folder], overwrite)
    skeleton = spec.skeleton()
    stored = stored.with_twins(skeleton)
    if file is not None:
        dtype = torch.float32  # rounded once, when it is written
    merge = Merge(stored, spec, dtype, over, requantize, device or _CPU, file)
    _check_possible(merge, skeleton)
    check_layers(stored, carriers(skeleton), "the base")
    check_saved(stored.saved, spec, skeleton, stored.folder, stored.biases)
    check_mergeable(stored.added, skeleton, stored.folder)
    check_token_rows(stored, spec)
    if stored.changes_nothing:
        raise AdapterError(
            f"{stored.folder}: A or B of every layer is zero ({len(stored.tensors)} layers), so "
            "merging changes nothing; expected a trained adapter; train it, or name another"
        )
    needed = _merged_bytes(skeleton, merge) if file is None else file.bytes
    check_space(folder, needed, "the merged model")
    with staged_folder(folder, replace=overwrite) as staging:
        remedy = "pass --device cpu, or a smaller --max-shard-size"
        with out_of_memory_while("merging", remedy), memory_returned():
            digest = Digest()
            stream = _written_tensors(merge, skeleton, digest, announce)
            tensors, size, shards = _write_tensors(merge, staging, stream, shard_bytes)
        if stored.record is not None and digest.hexdigest() != stored.record.digest:
            raise AdapterError(
                f"{stored.folder}: trained on other weights than {spec.source.name} has; name "
                "the right base with --model"
            )
        if file is None:
            write_model_files(
                staging,
                skeleton,
                tokenizer,
                dtype,
                base_folder=spec.folder,
                quantization=spec.quantization if requantize else None,
                untied=bool(untied_copies(stored, skeleton)),
                kept=unpacked_modules(skeleton.config) if merge.is_merge_aware else (),
            )
        if check is not None:
            check(merge, staging)
    return Merged(folder, tensors, len(stored.spec.targets), size, shards)


def _write_tensors(
    merge: Merge, folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> tuple[int, int, int]:
    """Write the tensors; return their number, their bytes, and the number of files."""
    if merge.file is not None:
        return (*merge.file.write(folder, tensors), 1)
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    shards = writer.finish()
    return writer.tensors, writer.total_bytes, shards


# ---------------------------------------------------------------- before anything is read


def _check_possible(merge: Merge, skeleton: PreTrainedModel) -> None:
    quantization, name = merge.spec.quantization, merge.spec.source.name
    if merge.is_merge_aware and merge.over == "original":
        raise ConfigError(
            "--base original: the adapter was trained merge-aware, as codes that are made of the "
            "quantised base; expected that base; leave --base out"
        )
    if merge.is_merge_aware and quantization.bits == 16:
        raise ConfigError(
            "--bits 16: the adapter was trained merge-aware, as codes that a base in 16 bits does "
            "not have; expected the bits of its training; leave --bits out"
        )
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
    """Return the approximate bytes of a model on the disk.

    Args:
        skeleton: the architecture.
        dtype: dtype of the tensors that are not packed.
        quantization: how the weights of linear layers are packed; None if they are not.
    """
    tied: dict[str, str] = skeleton.all_tied_weights_keys or {}
    parameters: dict[str, Tensor] = skeleton.state_dict()
    sizes = {name: t.numel() for name, t in parameters.items() if name not in tied}
    total = sum(sizes.values())
    if quantization is None:
        return total * dtype.itemsize
    linear = sum(sizes[name] for name in _packed_weights(skeleton))
    constants = 0.25 if quantization.double_quant else 0.5  # bits a weight, at most
    return int(linear * (quantization.bits + constants) / 8) + (total - linear) * dtype.itemsize


# ---------------------------------------------------------------- the stream


def _written_tensors(
    merge: Merge, skeleton: PreTrainedModel, digest: Digest, announce: Announce
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the merged model, in the form in which it is written."""
    spec, unpacked = merge.spec, merge.unpacked
    if merge.over == "original":
        spec, unpacked = replace(spec, quantization=Quantization(bits=16)), torch.float32
    stream = _with_copies(
        _checked(frozen_tensors(spec, skeleton, merge.device, digest, announce), merge, skeleton),
        untied_copies(merge.stored, skeleton),
    )
    if merge.is_merge_aware:
        stream = _as_trained(merge, stream)
    if not merge.requantize:
        merged = merged_tensors(stream, merge.stored, merge.dtype, unpacked)
        # A GGUF file is given the parameters under the names they have in the model.
        yield from merged if merge.file is not None else as_stored(merged, skeleton)
        return
    if merge.is_merge_aware:
        yield from with_kernels(_trained_tensors(merge, stream, skeleton), skeleton)
        return
    merged = merged_tensors(stream, merge.stored, torch.float32, unpacked)
    packed = packed_tensors(merged, skeleton, merge.spec.quantization, merge.dtype, merge.device)
    yield from with_kernels(packed, skeleton)


def _as_trained(
    merge: Merge, stream: Iterator[tuple[str, FrozenWeight | Tensor]]
) -> Iterator[tuple[str, FrozenWeight | Tensor]]:
    """Yield each parameter, the packed weights as merge-aware training multiplied by them."""
    for name, value in stream:
        if isinstance(value, FrozenWeight) and merge.stored.is_merged_into(value):
            path = name.removesuffix(".weight")
            yield name, merge.stored.trained_weight(path, value)
        else:
            yield name, value


def _trained_tensors(
    merge: Merge, stream: Iterator[tuple[str, FrozenWeight | Tensor]], skeleton: PreTrainedModel
) -> Iterator[tuple[str, Tensor]]:
    """Yield a model as a bitsandbytes checkpoint holds it, with the very codes of the stream."""
    packed = _packed_weights(skeleton)
    for name, value in stream:
        if name in packed and merge.stored.is_merged_into(value):
            yield from _packed_parts(name, value, merge.dtype)
        else:
            one = iter([(name, value)])
            yield from merged_tensors(one, merge.stored, merge.dtype, merge.unpacked)


def untied_copies(stored: StoredAdapter, skeleton: PreTrainedModel) -> dict[str, str]:
    """Return the tied parameters that differ once the adapter is merged, each with its original."""
    tied = skeleton.all_tied_weights_keys or {}
    return {copy: source for copy, source in tied.items() if stored.unties(copy, source)}


def _path(name: str) -> str:
    return name.removesuffix(".weight")


def _checked(
    stream: Iterator[tuple[str, FrozenWeight | Tensor]], merge: Merge, skeleton: PreTrainedModel
) -> Iterator[tuple[str, FrozenWeight | Tensor]]:
    """Yield each parameter; check those that the adapter has of its base too.

    Raises:
        AdapterError: the base has other values.
    """
    tied = skeleton.all_tied_weights_keys or {}
    stored = merge.stored
    for name, value in stream:
        for own, tensor in stored.of_base.items():
            if tied.get(own, own) == name and isinstance(value, Tensor):
                check_same(own, tensor, value, stored.folder)
        yield name, value


def _with_copies(
    stream: Iterator[tuple[str, FrozenWeight | Tensor]], copies: Mapping[str, str]
) -> Iterator[tuple[str, FrozenWeight | Tensor]]:
    """Yield each parameter, and after it the copies of it that have to be written as well."""
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
        dtype: dtype of the merged weights.
        unpacked: dtype that frozen weights are unpacked to, before the delta is added in fp32.

    Raises:
        ModelError: a merged value does not fit the dtype.
    """
    for name, value in stream:
        tensor = value.dequantize(unpacked) if isinstance(value, FrozenWeight) else value
        path = _path(name)
        if (replacement := stored.in_place_of(name, value)) is not None:
            tensor = replacement
        elif path in stored.tensors and not stored.is_merged_into(value):
            # A convolution, an embedding or a head is not packed, and training cast it to the same
            # dtype.
            tensor = stored.merged(path, tensor.to(unpacked))
        elif name in stored.added:
            tensor = stored.added[name].to(tensor.device) + tensor.float()
        yield name, _cast(name, tensor, dtype)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu().contiguous()  # the batches that a norm has seen are counted
    cast = tensor.to(dtype).cpu().contiguous()
    # The extremes of a tensor with a NaN are NaN. Checking them is twenty times as fast as checking
    # every value.
    if cast.numel() and not all(map(torch.isfinite, cast.aminmax())):
        raise ModelError(
            f"{name}: its largest value {float(tensor.abs().max()):.3g} does not fit "
            f"{dtype_name(dtype)}; pass --dtype bfloat16"
        )
    return cast


def _packed_weights(skeleton: PreTrainedModel) -> set[str]:
    """Return the names of the weights that a checkpoint of bitsandbytes holds packed."""
    config = skeleton.config
    return {each for each in projected_weights(skeleton) if not stays_unpacked(config, each)}


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
        skeleton: says which parameters are weights of linear layers.
        quantization: how the weights of linear layers are packed.
        dtype: dtype of all other parameters.
        device: the device on which each tensor is quantised.

    Raises:
        ModelError: a value does not fit the dtype or the quantisation.
    """
    linear = _packed_weights(skeleton)
    for name, tensor in tensors:
        if name not in linear:
            yield name, _cast(name, tensor, dtype)
            continue
        yield from _packed_parts(name, freeze(name, tensor, True, quantization, device), dtype)


def _packed_parts(
    name: str, weight: FrozenWeight | Tensor, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(weight, FrozenWeight)
    owner = name.removesuffix("weight")
    for part, value in bitsandbytes_parts(weight, dtype).items():
        # Copied, because all layers share one code book, and a file cannot hold a tensor twice.
        yield owner + part, value.to("cpu", copy=True).contiguous()

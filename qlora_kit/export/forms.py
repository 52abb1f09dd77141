"""A parameter in all the forms that a merge is judged by.

Takes a `Merge` and the folder of the merged model; returns `Forms`, module by module. They give a
weight as training had it, as the merge makes it, and as it was written. The base is read a second
time, and the written files are read for the first time: nothing that the merge held in memory is
trusted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.export.merge import BaseName, Merge, has_original
from qlora_kit.layers.projections import convolutions, projected_weights
from qlora_kit.layers.quantize import read_quantized
from qlora_kit.layers.weight import FrozenWeight, PlainWeight
from qlora_kit.model.checkpoint import TensorSource, open_checkpoint
from qlora_kit.model.class_head import fresh_value
from qlora_kit.model.convert import Assembly, assemble
from qlora_kit.model.encoder_decoder import stays_unpacked
from qlora_kit.model.load import freeze, open_tensors
from qlora_kit.model.start import Start
from qlora_kit.model.vocabulary import tables, with_row_count


class Variant(StrEnum):
    """A variant of the model, compared with the others; all of them compute in fp32."""

    BASE = "base"
    """the quantised base without the adapter"""
    ADAPTER = "adapter"
    """the adapter on the quantised base: the trained model, which all others are compared with"""
    QUANTIZED = "merged_over_quantized"
    """the delta added to the dequantised base, in fp32"""
    ORIGINAL = "merged_over_original"
    """the delta added to the weights of the checkpoint, in fp32"""
    REQUANTIZED = "requantized"
    """the merged weights, quantised again as the base was"""
    PEFT_FORM = "peft_form"
    """the rank-2R form of an adapter whose start changed its base, on the base as it is stored"""
    WRITTEN = "written"
    """the weights in the files of the export"""


Stored = FrozenWeight | Tensor
_ALL = slice(None)


@dataclass(frozen=True)
class Forms:
    """A parameter of the base, and what became of it.

    Attributes:
        name: the name of the parameter.
        merge: the merge.
        stored: the parameter as the checkpoint has it.
        frozen: the weight as training held it; None unless it is the weight of a linear layer.
        written: the parameter as the export has it; None for a tied copy, which is not written.
        stays_unpacked: whether no checkpoint of bitsandbytes packs it.
    """

    name: str
    merge: Merge
    stored: Stored
    frozen: FrozenWeight | None
    written: Stored | None
    stays_unpacked: bool = False

    @cached_property
    def saved(self) -> Tensor | None:
        """The tensor that the adapter replaces the parameter by, or rows of it; or None."""
        return self.merge.stored.in_place_of(self.name, self.stored)

    @property
    def added(self) -> Tensor | None:
        """What the adapter adds to the parameter, a bias, fp32, or None."""
        return self.merge.stored.added.get(self.name)

    @property
    def path(self) -> str:
        """The path of the module that the parameter belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def is_adapted(self) -> bool:
        """Whether the adapter has a delta for the parameter."""
        return self.name == f"{self.path}.weight" and self.path in self.merge.stored.tensors

    @property
    def is_trained_packed(self) -> bool:
        """Whether training multiplied by the weight with the delta in it, packed again."""
        return self.merge.stored.is_merged_into(self.frozen)

    @property
    def delta(self) -> Tensor | None:
        """The adapter's delta for the parameter, fp32, or None."""
        if not self.is_adapted:
            return None
        stored = self.merge.stored
        if self.path in stored.magnitudes:
            base = self.base(self.merge.over)
            return stored.merged(self.path, base).sub_(base)
        return stored.delta(self.path).to(self.merge.device)

    def base(self, over: BaseName = "quantized") -> Tensor:
        """Return the weight of the quantised or the original base, fp32."""
        if over == "original" or self.frozen is None:
            return _in_fp32(self.stored)
        return self.frozen.dequantize(self.merge.unpacked).float()

    def merged(self, over: BaseName) -> Tensor:
        """Return the weight of a base with the adapter merged into it, fp32."""
        if self.saved is not None:
            return _in_fp32(self.saved.to(self.merge.device))
        if self.is_trained_packed and over == "quantized":
            return self.packed_again.dequantize(self.merge.unpacked).float()
        weight = self.base(over)
        if self.added is not None:
            return weight.add_(self.added.to(weight.device))
        return self.merge.stored.merged(self.path, weight) if self.is_adapted else weight

    @cached_property
    def packed_again(self) -> FrozenWeight:
        """The merged weight of a layer, quantised again as the base was."""
        if self.is_trained_packed:
            assert self.frozen is not None
            return self.merge.stored.trained_weight(self.path, self.frozen)
        merged = self.merged(self.merge.over)
        packed = freeze(self.name, merged, True, self.merge.spec.quantization, merged.device)
        assert isinstance(packed, FrozenWeight)
        return packed

    def requantized(self) -> Tensor:
        """Return the merged weight of a layer, quantised again and unpacked, fp32.

        A weight that is never packed is as the merge made it.
        """
        if self.stays_unpacked:
            return self.merged(self.merge.over)
        return self.packed_again.dequantize(torch.float32)

    def on_original(self) -> Tensor:
        """Return the weight that PEFT multiplies with, fp32: see `lora.starts.form`."""
        start, delta = self.merge.spec.start, self.delta
        assert start is not None, "only such a merge has this variant"
        assert delta is not None, "only an adapted layer is asked"
        taken = start.taken(self.name).to(self.merge.device)
        original = self.base("original").add_(taken)
        frozen = freeze(self.name, original, True, self.merge.spec.quantization, original.device)
        assert isinstance(frozen, FrozenWeight)
        return delta.sub_(taken).add_(frozen.dequantize(self.merge.unpacked).float())

    def as_written(self) -> Tensor:
        """Return the weight in the files of the export, fp32."""
        assert self.written is not None
        return _in_fp32(self.written)

    def of(self, variant: Variant) -> Tensor:
        """Return the weight that a variant multiplies with, fp32.

        The low-rank term of the adapter is not in it: it is computed beside the weight, unless the
        weight `is_trained_packed`.
        """
        is_replaced = self.saved is not None or self.added is not None
        has_term = variant is Variant.ADAPTER and not self.is_trained_packed
        if variant is Variant.BASE or (has_term and not is_replaced):
            return self.base()
        if variant is Variant.ORIGINAL:
            return self.merged("original")
        if variant is Variant.REQUANTIZED and self.frozen is not None:
            return self.requantized()
        if variant is Variant.PEFT_FORM and self.is_adapted:
            return self.on_original()
        if variant is Variant.WRITTEN:
            return self.as_written()
        return self.merged("quantized")

    def plain(self, variant: Variant, rows: Tensor | slice = _ALL) -> Tensor:
        """Return a parameter of no linear layer, such as an embedding.

        It is as its file has it, or in fp32 with the adapter's delta.

        Args:
            variant: the variant of the model.
            rows: the rows that are returned, on the CPU.
        """
        whole = self.stored
        if variant is Variant.WRITTEN and self.written is not None:
            whole = self.written
        elif variant is not Variant.BASE and self.saved is not None:
            whole = self.saved
        elif variant is not Variant.BASE and self.added is not None:
            whole = self.merged("original")
        assert isinstance(whole, Tensor)
        found = whole[rows] if whole.dim() else whole
        if not self.is_adapted or variant in (Variant.BASE, Variant.WRITTEN):
            return found
        # Training held it in the dtype that it computed in.
        is_original = variant is Variant.ORIGINAL or self.merge.over == "original"
        dtype = torch.float32 if is_original else self.merge.unpacked
        return self.merge.stored.delta(self.path, rows).to(found.device).add_(found.to(dtype))


def _in_fp32(stored: Stored) -> Tensor:
    """Return a stored parameter in fp32, in memory of its own."""
    if isinstance(stored, FrozenWeight):
        return stored.dequantize(torch.float32)
    return stored.to(torch.float32, copy=True)


class Parameters:
    """The parameters of a base and of its merged model, by module.

    Args:
        merge: the merge.
        skeleton: the architecture of both models.
        folder: the folder of the merged model.

    Raises:
        ModelError: the files of the base or of the merged model are not readable.
    """

    def __init__(self, merge: Merge, skeleton: PreTrainedModel, folder: Path) -> None:
        self._merge = merge
        self._linear, self._config = projected_weights(skeleton), skeleton.config
        self._windows = convolutions(skeleton)
        resized = tables(skeleton) if merge.spec.vocabulary is not None else frozenset()
        source = open_tensors(merge.spec, skeleton, merge.device)
        self._base = _Reader(source, skeleton, resized, merge.spec.start)
        written = open_checkpoint(folder) if merge.file is None else merge.file.source(folder)
        self._written = _Reader(written, skeleton)
        self.has_original = has_original(merge.spec, skeleton)
        shapes = skeleton.state_dict()
        self._fresh = {
            name: fresh_value(name, shapes[name], is_linear=_is_linear(skeleton, name))
            for name in merge.spec.fresh
        }

    def missing_and_surplus(self, tied: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Return the parameters that were not written, and the written ones the base lacks.

        Args:
            tied: copies that may be written but need not be.
        """
        expected = (self._base.names | self._fresh.keys()) - tied.keys()
        found = self._written.names
        return sorted(expected - found), sorted(found - expected - tied.keys())

    def stored(self, name: str) -> Stored | None:
        """Return a parameter of the base as its file has it."""
        return dict(self._base.under(name.rpartition(".")[0], self._merge.device)).get(name)

    def written(self, name: str) -> Stored | None:
        """Return a parameter of the merged model as its file has it."""
        return dict(self._written.under(name.rpartition(".")[0], self._merge.device)).get(name)

    def under(self, path: str) -> Iterator[Forms]:
        """Yield the parameters of a module and of all modules inside it."""
        written = dict(self._written.under(path, self._merge.device))
        for name, stored in self._base.under(path, self._merge.device):
            frozen = self._frozen(name, stored)
            unpacked = name in self._windows or stays_unpacked(self._config, name)
            yield Forms(name, self._merge, stored, frozen, written.get(name), unpacked)
        for name, value in self._fresh.items():
            if name.startswith(f"{path}."):
                yield Forms(name, self._merge, value, self._frozen(name, value), written.get(name))

    def _frozen(self, name: str, stored: Stored) -> FrozenWeight | None:
        if isinstance(stored, FrozenWeight):
            return stored
        if name in self._windows:
            return PlainWeight(stored)
        if name not in self._linear:
            return None
        if not self.has_original:
            # In a checkpoint of bitsandbytes, weights that it left unquantised stay so.
            return PlainWeight(stored)
        frozen = freeze(name, stored, True, self._merge.spec.quantization, self._merge.device)
        assert isinstance(frozen, FrozenWeight)
        return frozen


def _is_linear(skeleton: nn.Module, name: str) -> bool:
    return isinstance(skeleton.get_submodule(name.rpartition(".")[0]), nn.Linear)


class _Reader:
    """The tensors of a checkpoint, read module by module.

    Some may be given another number of rows, and some be less a start.
    """

    def __init__(
        self,
        source: TensorSource,
        skeleton: PreTrainedModel,
        resized: Set[str] = frozenset(),
        start: Start | None = None,
    ) -> None:
        self._source, self._skeleton = source, skeleton
        self._resized, self._start = resized, start
        self._shapes = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
        self._by_path: dict[str, list[Assembly]] = defaultdict(list)
        for assembly in assemble(source.names, skeleton):
            self._by_path[assembly.target.rpartition(".")[0]].append(assembly)

    @property
    def names(self) -> set[str]:
        every = (each for assemblies in self._by_path.values() for each in assemblies)
        return {name for each in every for name in each.parameters}

    def under(self, path: str, device: torch.device) -> Iterator[tuple[str, Stored]]:
        for owner, assemblies in self._by_path.items():
            if owner == path or owner.startswith(f"{path}."):
                for assembly in assemblies:
                    yield from self._read(assembly, device)

    def _read(self, assembly: Assembly, device: torch.device) -> Iterator[tuple[str, Stored]]:
        if assembly.is_quantized:
            read = self._source.read
            parts = {name: part.to(device) for name, part in assembly.parts(read).items()}
            rows, columns = self._shapes[assembly.target]
            yield assembly.target, read_quantized(parts, (rows, columns))
            return
        for name, tensor in assembly.tensors(self._source.read, self._skeleton).items():
            if name in self._resized:
                tensor = with_row_count(tensor, self._shapes[name][0])
            moved = tensor.to(device)
            yield name, moved if self._start is None else self._start.less(name, moved)


def units_of(skeleton: nn.Module, head: nn.Module | None) -> dict[str, nn.Module]:
    """Return the units that a model is run in, by path: decoder layers and the modules beside them.

    Together they hold every parameter except those of the head.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    units: dict[str, nn.Module] = {}
    for path, module in skeleton.named_modules():
        if module is head or any(path.startswith(f"{unit}.") for unit in units):
            continue
        has_own = next(module.parameters(recurse=False), None) is not None
        if isinstance(module, GradientCheckpointingLayer) or has_own:
            units[path] = module
    return units

"""One parameter in all the forms a merge is judged by.

Takes what is merged into what and the folder it was written to; returns, module by module,
`Forms` that answer with the weight as it was trained on, as it is merged, and as it was
written. Reads the base a second time and the written files for the first: nothing that the
merge held in memory is trusted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.export.merge import BaseName, Merge, has_original
from qlora_kit.layers.projections import projected_weights
from qlora_kit.layers.quantize import read_quantized
from qlora_kit.layers.weight import FrozenWeight, PlainWeight
from qlora_kit.model.checkpoint import TensorSource, open_checkpoint
from qlora_kit.model.convert import Assembly, assemble
from qlora_kit.model.load import freeze, open_tensors


class Variant(StrEnum):
    """A model that is compared with the others; all of them compute in fp32."""

    BASE = "base"
    """the quantised base without the adapter"""
    ADAPTER = "adapter"
    """the adapter on the quantised base: what was trained, and what all else is held against"""
    QUANTIZED = "merged_over_quantized"
    """the delta added to the dequantised base, in fp32"""
    ORIGINAL = "merged_over_original"
    """the delta added to the weights of the checkpoint, in fp32"""
    REQUANTIZED = "requantized"
    """the merged weights, quantised again as the base was"""
    WRITTEN = "written"
    """what the files of the export hold"""


Stored = FrozenWeight | Tensor


@dataclass(frozen=True)
class Forms:
    """A parameter of the base and what became of it.

    Attributes:
        name: of the parameter.
        merge: what is merged into what.
        stored: as the checkpoint has it.
        frozen: as training held it; None for what is not the weight of a linear layer.
        written: as the export has it; None where it does not: a tied copy.
    """

    name: str
    merge: Merge
    stored: Stored
    frozen: FrozenWeight | None
    written: Stored | None

    @property
    def saved(self) -> Tensor | None:
        """What the adapter puts in its place as a whole, or None."""
        return self.merge.stored.saved.get(self.name)

    @property
    def path(self) -> str:
        """The module it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def is_adapted(self) -> bool:
        """Whether the adapter has a delta for it."""
        return self.name == f"{self.path}.weight" and self.path in self.merge.stored.tensors

    @property
    def delta(self) -> Tensor | None:
        """The delta of the adapter, fp32, or None."""
        if not self.is_adapted:
            return None
        return self.merge.stored.delta(self.path).to(self.merge.device)

    def base(self, over: BaseName = "quantized") -> Tensor:
        """Return the weight of a base, fp32."""
        if over == "original" or self.frozen is None:
            return _in_fp32(self.stored)
        return self.frozen.dequantize(self.merge.unpacked).float()

    def merged(self, over: BaseName) -> Tensor:
        """Return what the adapter makes of a base's weight, fp32."""
        if self.saved is not None:
            return _in_fp32(self.saved.to(self.merge.device))
        weight, delta = self.base(over), self.delta
        return weight if delta is None else delta.add_(weight)

    @cached_property
    def packed_again(self) -> FrozenWeight:
        """The merged weight of a layer, quantised again as the base was."""
        merged = self.merged(self.merge.over)
        packed = freeze(self.name, merged, True, self.merge.spec.quantization, merged.device)
        assert isinstance(packed, FrozenWeight)
        return packed

    def requantized(self) -> Tensor:
        """Return the merged weight of a layer, quantised again and unpacked, fp32."""
        return self.packed_again.dequantize(torch.float32)

    def as_written(self) -> Tensor:
        """Return what the files hold, fp32."""
        assert self.written is not None
        return _in_fp32(self.written)

    def of(self, variant: Variant) -> Tensor:
        """Return the weight that a variant multiplies with, fp32.

        The adapter's own term is no part of it: it is computed beside the weight.
        """
        if variant is Variant.BASE or (variant is Variant.ADAPTER and self.saved is None):
            return self.base()
        if variant is Variant.ORIGINAL:
            return self.merged("original")
        if variant is Variant.REQUANTIZED and self.frozen is not None:
            return self.requantized()
        if variant is Variant.WRITTEN:
            return self.as_written()
        return self.merged("quantized")

    def plain(self, variant: Variant) -> Tensor:
        """Return what is no linear layer's, such as an embedding, as it lies in its file."""
        whole = self.stored
        if variant is Variant.WRITTEN and self.written is not None:
            whole = self.written
        elif variant is not Variant.BASE and self.saved is not None:
            whole = self.saved
        assert isinstance(whole, Tensor)
        return whole


def _in_fp32(stored: Stored) -> Tensor:
    """Return a stored parameter in fp32, in memory of its own."""
    if isinstance(stored, FrozenWeight):
        return stored.dequantize(torch.float32)
    return stored.to(torch.float32, copy=True)


class Parameters:
    """The parameters of a base and of the model it was merged into, by module.

    Args:
        merge: what is merged into what.
        skeleton: the architecture of both.
        folder: where the merged model was written.

    Raises:
        ModelError: the files of one of them are not readable.
    """

    def __init__(self, merge: Merge, skeleton: PreTrainedModel, folder: Path) -> None:
        self._merge = merge
        self._linear = projected_weights(skeleton)
        self._base = _Reader(open_tensors(merge.spec, skeleton, merge.device), skeleton)
        self._written = _Reader(open_checkpoint(folder), skeleton)
        self.has_original = has_original(merge.spec, skeleton)

    def missing_and_surplus(self, tied: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Return the parameters that were not written, and those that the base does not have.

        Args:
            tied: copies that need not be written, but may.
        """
        expected, found = self._base.names - tied.keys(), self._written.names
        return sorted(expected - found), sorted(found - expected - tied.keys())

    def stored(self, name: str) -> Stored | None:
        """Return a parameter of the base as it lies in its file."""
        return dict(self._base.under(name.rpartition(".")[0], self._merge.device)).get(name)

    def written(self, name: str) -> Stored | None:
        """Return a parameter of the merged model as it lies in its file."""
        return dict(self._written.under(name.rpartition(".")[0], self._merge.device)).get(name)

    def under(self, path: str) -> Iterator[Forms]:
        """Yield the parameters of a module and of all modules in it."""
        written = dict(self._written.under(path, self._merge.device))
        for name, stored in self._base.under(path, self._merge.device):
            yield Forms(name, self._merge, stored, self._frozen(name, stored), written.get(name))

    def _frozen(self, name: str, stored: Stored) -> FrozenWeight | None:
        if isinstance(stored, FrozenWeight):
            return stored
        if name not in self._linear:
            return None
        if not self.has_original:
            # What bitsandbytes left unquantised in a checkpoint of its own stays so.
            return PlainWeight(stored)
        frozen = freeze(name, stored, True, self._merge.spec.quantization, self._merge.device)
        assert isinstance(frozen, FrozenWeight)
        return frozen


class _Reader:
    """The tensors of a checkpoint, read by the module they belong to."""

    def __init__(self, source: TensorSource, skeleton: PreTrainedModel) -> None:
        self._source, self._skeleton = source, skeleton
        self._shapes = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
        self._by_path: dict[str, list[Assembly]] = defaultdict(list)
        for assembly in assemble(source.names, skeleton):
            self._by_path[assembly.target.rpartition(".")[0]].append(assembly)

    @property
    def names(self) -> set[str]:
        return {a.target for assemblies in self._by_path.values() for a in assemblies}

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
            yield name, tensor.to(device)


def units_of(skeleton: nn.Module, head: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a model is run in, by path: decoder layers, and what is beside them.

    Together they hold every parameter but those of the head.
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

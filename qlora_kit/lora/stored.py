"""An adapter as it is stored: checked tensors by path, and what they do to the weights of a base.

`lora.reading` makes it of files. It is attached to no model; merges and verification ask it for
each parameter of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.layers.dora import row_norms
from qlora_kit.layers.merge_aware import packed_sum
from qlora_kit.layers.trained_rows import with_rows
from qlora_kit.layers.weight import FrozenWeight
from qlora_kit.lora.files import (
    BaseRecord,
)
from qlora_kit.lora.spec import LoraSpec


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it is stored on disk, checked but not attached.

    Attributes:
        folder: the folder of its files.
        spec: rank, alpha and patterns; its targets are the paths of the tensors.
        tensors: A (R, D) and B (K, R) by path, fp32; those of experts by the path of each.
        base: the base that `adapter_config.json` names.
        record: the content of `qlora_kit.json`; None for an adapter of another tool.
        saved: parameters that replace parameters of the base, by name (`modules_to_save`).
        targeted: names of layers that must have tensors: whole paths, or their last parts.
        stacked: number of experts of each stack that carries LoRA, by path.
        targeted_stacks: names of stacks that must have tensors, likewise.
        kernels: the shape of a row of A in the file, (C, k, k), of each convolution, by path.
        of_base: tensors of the base that the file has beside the LoRA on them, by their name in
            the base, which must have the same.
        rows: values (k, D), fp32, of the rows of tokens that `spec.token_rows` names, by path of
            their table.
        stays_tied: whether a head that is the embedding as well stays so (`ensure_weight_tying`).
        added: what is added to the biases of layers, (K,), by the name of the bias (`lora_bias`).
        biases: the names among `saved` that are biases alone, without their weight (`bias`).
        magnitudes: of DoRA, the length (K,) of the row of each output's weight, fp32, by path.
        start: A and B that training started from, by path, where its base is less them.
    """

    folder: Path
    spec: LoraSpec
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    base: str | None
    record: BaseRecord | None
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    targeted: tuple[str, ...] = ()
    stacked: Mapping[str, int] = field(default_factory=dict)
    targeted_stacks: tuple[str, ...] = ()
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    of_base: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    stays_tied: bool = False
    added: Mapping[str, Tensor] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    start: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def changes_nothing(self) -> bool:
        """Whether it leaves every weight of its base as it is."""
        pairs = self.tensors.values()
        replaces = bool(self.saved or self.rows)
        adds = any(bool(each.any()) for each in self.added.values())
        return not (replaces or adds) and not any(bool(a.any()) and bool(b.any()) for a, b in pairs)

    @property
    def whole(self) -> dict[str, Tensor]:
        """What it has beside LoRA, by the names of trained parameters, see `Adapter.fill`."""
        return {**self.saved, **{f"{path}.rows": each for path, each in self.rows.items()}}

    def in_place_of(self, name: str, value: FrozenWeight | Tensor) -> Tensor | None:
        """Return what takes the place of a parameter of the base; None if nothing does.

        Args:
            name: the name of the parameter.
            value: the parameter; with trained rows, its other rows are returned as they are.
        """
        if name in self.saved:
            return self.saved[name]
        path = name.removesuffix(".weight")
        if path == name or path not in self.rows or self.spec.token_rows is None:
            return None
        table = value if isinstance(value, Tensor) else value.dequantize(torch.float32)
        return with_rows(table, self.spec.token_rows.ids[path], self.rows[path], torch.float32)

    def unties(self, copy: str, source: str) -> bool:
        """Whether a parameter that is tied to another one of the base differs from it then."""
        if any(each.removesuffix(".weight") in self.tensors for each in (copy, source)):
            return True
        own, others = self.saved.get(copy), self.saved.get(source)
        if own is not None and others is not None:
            return own is not others and not torch.equal(own, others)
        if own is not None or others is not None:
            return True
        of_own, of_others = (self.rows.get(each.removesuffix(".weight")) for each in (copy, source))
        if of_own is None:
            return False
        return of_others is None or not torch.equal(of_own, of_others) or not self._same_rows

    @property
    def _same_rows(self) -> bool:
        assert self.spec.token_rows is not None
        return len(set(self.spec.token_rows.ids.values())) == 1

    def with_twins(self, skeleton: PreTrainedModel) -> StoredAdapter:
        """Return the adapter with both halves of a pair that stays tied, where it has one of them.

        Args:
            skeleton: of its base.
        """
        saved: dict[str, Tensor] = dict(self.saved)
        for copy, source in (skeleton.all_tied_weights_keys or {}).items():
            if self.stays_tied and len({copy, source} & saved.keys()) == 1:
                one = saved.get(copy, saved.get(source))
                assert one is not None
                saved |= {name: one.clone() for name in {copy, source} - saved.keys()}
        return replace(self, saved=saved)

    def delta(self, path: str, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return scaling · B A of the layer at `path`, (K, D), fp32, or some rows of it."""
        a, b = self.tensors[path]
        return (b[rows] @ a).mul_(self.scaling_of(path))

    def merged(self, path: str, weight: Tensor) -> Tensor:
        """Return W (K, D) of the layer at `path` with the adapter in it, fp32, where W is."""
        gain = self.gain(path, weight)
        # Added into the delta, because only the delta's memory is sure to be unshared.
        merged = self.delta(path).to(weight.device).add_(weight)
        return merged if gain is None else merged.mul_(gain.unsqueeze(1))

    def gain(self, path: str, weight: Tensor) -> Tensor | None:
        """Return what DoRA multiplies each output of a layer by, (K,), fp32; None without DoRA.

        Args:
            path: the path of the layer.
            weight: W (K, D) of the base there.
        """
        if path not in self.magnitudes:
            return None
        a, b = (each.to(weight.device) for each in self.tensors[path])
        norms = row_norms(weight, a, b, self.scaling_of(path))
        return self.magnitudes[path].to(weight.device) / norms

    def scaling_of(self, path: str) -> float:
        """Return the scaling of the layer, or of the expert, at `path`."""
        return self.spec.scaling_of(path.rpartition(".")[0] if self.is_of_expert(path) else path)

    def is_merged_into(self, weight: object) -> bool:
        """Whether training multiplied by this weight with the delta in it, packed again."""
        is_packed = isinstance(weight, FrozenWeight) and weight.bits != 16
        return self.spec.variant.merge_aware and is_packed

    def trained_weight(self, path: str, weight: FrozenWeight) -> FrozenWeight:
        """Return the weight that merge-aware training multiplied by, packed.

        Args:
            path: the path of a layer; without a delta its weight is that of the base.
            weight: the weight of the base, packed as in training.
        """
        if path not in self.tensors:
            return weight
        a, b = (each.to(weight.device) for each in self.tensors[path])
        return packed_sum(weight, a, b, self.scaling_of(path))

    def is_of_expert(self, path: str) -> bool:
        """Whether a path of `tensors` is that of an expert in a stack."""
        return path.rpartition(".")[0] in self.stacked

"""Put LoRA layers on a base, and take them off again.

Takes a loaded base and a `LoraSpec`; returns an `Adapter`, which knows the layers. Trains nothing,
and reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.errors import ConfigError
from qlora_kit.layers.experts import Stack
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.lora_embedding import LoRAEmbedding
from qlora_kit.layers.lora_experts import LoRAStack
from qlora_kit.layers.merge_aware import MergeAwareLinear
from qlora_kit.layers.projections import (
    by_lora_path,
    carriers,
    projections,
    stacks,
)
from qlora_kit.layers.trained import TrainedLayer
from qlora_kit.lora.forms import check_sites, count_form, layer_maker
from qlora_kit.lora.galore import train_by_galore
from qlora_kit.lora.merge_aware import check_merge_aware
from qlora_kit.lora.ranks import check_decided
from qlora_kit.lora.saved import Original, Unresized, put_back
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.targets import galore_paths, targeted_paths
from qlora_kit.lora.whole import count_whole, train_whole
from qlora_kit.model.load import Base
from qlora_kit.model.start import Pair


@dataclass(frozen=True)
class Adapter:
    """The trained part of a model.

    Attributes:
        base: the base that it is attached to.
        spec: the spec that it was attached by.
        layers: the LoRA layers by path.
        stacks: the stacks of experts that carry LoRA, by path.
        embeddings: the input embedding, if it carries LoRA, by path.
        start: A and B that training started from, by path, where the base is less them.
        whole: the layers of which all, or some rows, are trained in their places, by path.
        saved: parameters that replace parameters of the base, by name.
        added: what a stored adapter adds to the biases of layers, by name, see `lora.biases`.
        originals: the replaced parameters of the base, by name, see `lora.saved`.
        resized_from: the base as it was before it got rows for the adapter's tokens; None if it
            got none.
    """

    base: Base
    spec: LoraSpec
    layers: Mapping[str, LoRALinear]
    whole: Mapping[str, TrainedLayer] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    originals: Mapping[str, Original] = field(default_factory=dict)
    stacks: Mapping[str, LoRAStack] = field(default_factory=dict)
    embeddings: Mapping[str, LoRAEmbedding] = field(default_factory=dict)
    resized_from: Unresized | None = None
    start: Mapping[str, Pair] = field(default_factory=dict)

    @torch.no_grad()
    def fill(
        self,
        tensors: Mapping[str, tuple[Tensor, Tensor]],
        whole: Mapping[str, Tensor],
        magnitudes: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Set the values of the trained parameters.

        Args:
            tensors: A (R, D) and B (K, R) of each LoRA layer and of each expert, by path.
            whole: the parameters of the layers that are trained whole, by name.
            magnitudes: of DoRA, the lengths (K,) of the rows of each layer's weight, by path.

        Raises:
            ConfigError: A and B are composed of shared vectors, see `restore`.
        """
        if self.spec.variant.vblora:
            raise ConfigError(
                "the adapter composes A and B of shared vectors; expected an adapter with A and B "
                "of its own to fill; attach one without vblora"
            )
        for path, magnitude in (magnitudes or {}).items():
            self.layers[path].get_parameter("lora_magnitude_vector").copy_(magnitude)
        matrices = self._matrices()
        for path, pair in tensors.items():
            for own, given in zip(matrices[path], pair, strict=True):
                own.copy_(given)
        for name, parameter in self.whole_parameters().items():
            parameter.copy_(whole[name])
        self.renew()

    def renew(self) -> None:
        """Let the layers make anew what they keep of A and B, which have changed."""
        for layer in self.merge_aware.values():
            layer.renew()

    @property
    def merge_aware(self) -> dict[str, MergeAwareLinear]:
        """The layers that multiply by their merged weight, packed again, by path."""
        layers = self.layers.items()
        return {path: each for path, each in layers if isinstance(each, MergeAwareLinear)}

    def start_from(
        self,
        tensors: Mapping[str, tuple[Tensor, Tensor]],
        whole: Mapping[str, Tensor],
        magnitudes: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Set the values as `fill` does; parameters that are not given stay as they are."""
        own = {name: each.detach() for name, each in self.whole_parameters().items()}
        self.fill(tensors, {**own, **whole}, magnitudes)

    def _matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (R, D) and B (K, R) of each LoRA layer, embedding and expert, by path."""
        experts = {
            f"{path}.{number}": (stack.lora_A[number], stack.lora_B[number])
            for path, stack in self.stacks.items()
            for number in range(len(stack))
        }
        single: Mapping[str, LoRALinear | LoRAEmbedding] = {**self.layers, **self.embeddings}
        return {path: (each.lora_A, each.lora_B) for path, each in single.items()} | experts

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, in a stable order."""
        named: dict[nn.Parameter, str] = {}
        for path, layer in self.layers.items():
            for name, parameter in layer.trained().items():
                # Layers may share a parameter, which has the name that the first of them gives it.
                named.setdefault(parameter, f"{path}.{name}")
        for path, other in self.others().items():
            named |= {other.lora_A: f"{path}.lora_A", other.lora_B: f"{path}.lora_B"}
        return {**{name: each for each, name in named.items()}, **self.whole_parameters()}

    def others(self) -> dict[str, LoRAStack | LoRAEmbedding]:
        """Return what carries LoRA and is no layer, by path: stacks of experts, and embeddings."""
        return {**self.stacks, **self.embeddings}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the values of the trained parameters by name, on the CPU."""
        named = self.parameters().items()
        return {name: each.detach().cpu().contiguous() for name, each in named}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained parameters to the result of `trained_tensors`."""
        for name, parameter in self.parameters().items():
            parameter.copy_(tensors[name])
        self.renew()

    def whole_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the layers that are trained whole, by name."""
        return {
            f"{path}.{leaf}": parameter
            for path, layer in self.whole.items()
            for leaf, parameter in layer.named_parameters()
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the base compute without the adapter for the length of the block; copies nothing.

        Parameters that replace those of the base (`saved`) stay in place.
        """
        model = self.base.model
        for path, layer in {**self.layers, **self.embeddings}.items():
            model.set_submodule(path, layer.frozen)
        for path, trained in self.whole.items():
            model.set_submodule(path, trained.replaced)
        try:
            yield
        finally:
            for path, own in {**self.layers, **self.embeddings, **self.whole}.items():
                model.set_submodule(path, own)

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters().values())

    @property
    def expert_counts(self) -> dict[str, int]:
        """The number of experts of each stack of the base, by path; of other models none."""
        return {path: len(each) for path, each in stacks(self.base.model).items()}

    @property
    def untrained_experts(self) -> int:
        """Number of parameters that LoRA on the experts without it would train."""
        return sum(
            self.spec.rank_of(each.lora_path) * (each.in_features + each.out_features)
            for each in projections(self.base.model).values()
            if each.is_expert and each.lora_path not in self.stacks
        )


def count_trainable(skeleton: nn.Module, spec: LoraSpec) -> int:
    """Return the number of parameters that an adapter will have, before anything is loaded.

    Raises:
        ConfigError: a target or pattern names no layer, or one that the variant cannot have.
    """
    layers = by_lora_path(carriers(skeleton))
    sites = {path: layers[path] for path in targeted_paths(skeleton, spec)}
    check_sites(spec, sites)
    experts = [path for path, (first, *_) in sites.items() if first.is_expert]
    check_merge_aware(spec, 4, experts=experts)
    by_galore = (skeleton.get_submodule(path) for path in galore_paths(skeleton, spec))
    moved = sum(each.numel() for layer in by_galore for each in layer.parameters())
    return count_form(spec, sites) + count_whole(skeleton, spec) + moved


def attach(base: Base, spec: LoraSpec, seed: int = 42) -> Adapter:
    """Wrap the targeted layers of `base` in LoRA layers; its output does not change yet.

    With VB-LoRA it changes a little: its B does not start at zero.

    Args:
        base: a loaded base without an adapter, changed in place.
        spec: the layers to train, and how.
        seed: the seed that every A is drawn from.

    Raises:
        ConfigError: a target or pattern matches no layer, or one that the variant cannot have, or
            LoRA is attached already.
    """
    check_free(base)
    check_decided(spec)
    found = carriers(base.model)
    paths = targeted_paths(base.model, spec)
    generator = torch.Generator().manual_seed(seed)
    of_experts = stacks(base.model)
    by_path = by_lora_path(found)
    sites = {path: by_path[path] for path in paths}
    check_sites(spec, sites)
    experts = [path for path in paths if path in of_experts]
    is_shared = base.shards is not None
    check_merge_aware(spec, base.quantization.bits, is_shared=is_shared, experts=experts)
    make_layer = layer_maker(spec, sites, base.hardware, generator)
    layers: dict[str, LoRALinear] = {}
    stacked: dict[str, LoRAStack] = {}
    embeddings: dict[str, LoRAEmbedding] = {}
    for number, path in enumerate(paths):
        sizes: dict[str, Any] = {"rank": spec.rank_of(path), "scaling": spec.scaling_of(path)}
        if path in of_experts:
            stacked[path] = LoRAStack(of_experts[path], **sizes, generator=generator)
            base.model.set_submodule(path, stacked[path].train(of_experts[path].training))
            continue
        if isinstance(table := found[path].layer, nn.Embedding):
            sizes |= {"device": base.hardware.device, "generator": generator}
            embeddings[path] = LoRAEmbedding(table, **sizes).train(table.training)
            base.model.set_submodule(path, embeddings[path])
            continue
        layers[path] = make_layer(
            found[path].frozen,
            **sizes,
            dropout=spec.dropout,
            generator=generator,
            number=number,
            device=base.hardware.device,
        ).train(found[path].frozen.training)
        base.model.set_submodule(path, layers[path])
    whole = train_whole(base, spec, generator) | train_by_galore(base, spec)
    start, first = base.spec.start, {}
    if start is not None:
        _begin(layers, start.pairs)
        first = dict(start.pairs) if start.changes_base else {}
        start.forget()
    adapter = Adapter(base, spec, layers, whole, stacks=stacked, embeddings=embeddings, start=first)
    adapter.renew()
    return adapter


@torch.no_grad()
def _begin(layers: Mapping[str, LoRALinear], pairs: Mapping[str, Pair]) -> None:
    """Give A and B the values that they start from."""
    shapes = {path: (each.lora_A.shape, each.lora_B.shape) for path, each in layers.items()}
    if shapes != {path: (a.shape, b.shape) for path, (a, b) in pairs.items()}:
        raise ConfigError(
            "the base was loaded for a start of other layers or ranks; expected those; attach with "
            "its own spec, or load the base again"
        )
    for path, (a, b) in pairs.items():
        layers[path].lora_A.copy_(a)
        layers[path].lora_B.copy_(b)


def check_free(base: Base) -> None:
    """Check that `base` carries no adapter, neither a trained one nor one of several.

    Raises:
        ConfigError: it does.
    """
    if any(_carries_lora(module) for module in base.model.modules()):
        raise ConfigError("the base carries an adapter already; detach it first")


def _carries_lora(module: nn.Module) -> bool:
    wrapped = getattr(module, "frozen", None)
    return isinstance(module, LoRAStack) or isinstance(wrapped, FrozenLinear | nn.Embedding)


def detach(adapter: Adapter) -> Base:
    """Take the adapter off; the base is the same as before, bit for bit."""
    for path, layer in {**adapter.layers, **adapter.embeddings}.items():
        adapter.base.model.set_submodule(path, layer.frozen)
    for path, stack in adapter.stacks.items():
        adapter.base.model.set_submodule(path, stack.without_terms())
    for path, trained in adapter.whole.items():
        adapter.base.model.set_submodule(path, trained.replaced)
    put_back(adapter.base.model, adapter.originals)
    if adapter.resized_from is not None:
        return adapter.resized_from.put_back()
    return adapter.base


@torch.no_grad()
def merge(adapter: Adapter, dtype: torch.dtype = torch.float32) -> Base:
    """Fold each low-rank term into its weight, which is then held unquantised in `dtype`.

    Afterwards the layers are frozen layers again, as before `attach`, and compute the trained
    output. The weight is dequantised, the delta is added in fp32, and the sum is rounded once. The
    sum is never quantised again.

    Raises:
        ConfigError: several processes hold the base together.
    """
    if adapter.base.shards is not None:
        raise ConfigError(
            "the base is held by several processes together; expected all of it here; save the "
            "adapter, and merge it with qlora-kit export"
        )
    model = adapter.base.model
    for path, layer in adapter.layers.items():
        model.set_submodule(path, _holding(layer.frozen, layer.merged_weight(), dtype))
    for path, embedding in adapter.embeddings.items():
        table = embedding.frozen
        # A head that shared the table keeps the base's: PEFT adds nothing to it either.
        added = table.weight.to(dtype=torch.float32, copy=True)
        added += embedding.delta().to(added.device)
        put_back(model, {f"{path}.frozen.weight": added.to(dtype)})
        model.set_submodule(path, table)
    for path, stack in adapter.stacks.items():
        merged: list[nn.Module] = [
            _merged(stack.expert(number), stack.delta(number), dtype)
            for number in range(len(stack))
        ]
        model.set_submodule(path, Stack(merged, is_transposed=stack.is_transposed))
    for path, trained in adapter.whole.items():
        model.set_submodule(path, trained.merged(dtype))
    return adapter.base


def _merged(frozen: FrozenLinear, delta: Tensor, dtype: torch.dtype) -> FrozenLinear:
    return _holding(frozen, frozen.weight.dequantize(torch.float32) + delta, dtype)


def _holding(frozen: FrozenLinear, merged: Tensor, dtype: torch.dtype) -> FrozenLinear:
    return FrozenLinear.holding(merged.to(dtype), frozen.bias, frozen.window)

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
from qlora_kit.layers.lora_experts import LoRAStack
from qlora_kit.layers.merge_aware import MergeAwareLinear
from qlora_kit.layers.projections import (
    by_lora_path,
    projections,
    stacks,
)
from qlora_kit.layers.trained import TrainedLinear
from qlora_kit.lora.merge_aware import check_merge_aware
from qlora_kit.lora.saved import Original, put_back
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.lora.targets import targeted_paths
from qlora_kit.model.load import Base

# Of a fresh layer whose architecture does not say it.
_STD = 0.02


@dataclass(frozen=True)
class Adapter:
    """The trained part of a model.

    Attributes:
        base: the base that it is attached to.
        spec: the spec that it was attached by.
        layers: the LoRA layers by path.
        stacks: the stacks of experts that carry LoRA, by path.
        whole: the layers that are trained whole, by path.
        saved: parameters that replace parameters of the base, by name.
        originals: the replaced parameters of the base, by name, see `lora.saved`.
    """

    base: Base
    spec: LoraSpec
    layers: Mapping[str, LoRALinear]
    whole: Mapping[str, TrainedLinear] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    originals: Mapping[str, Original] = field(default_factory=dict)
    stacks: Mapping[str, LoRAStack] = field(default_factory=dict)

    @torch.no_grad()
    def fill(
        self, tensors: Mapping[str, tuple[Tensor, Tensor]], whole: Mapping[str, Tensor]
    ) -> None:
        """Set the values of the trained parameters.

        Args:
            tensors: A (R, D) and B (K, R) of each LoRA layer and of each expert, by path.
            whole: the parameters of the layers that are trained whole, by name.
        """
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

    def _matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (R, D) and B (K, R) of each LoRA layer and of each expert, by path."""
        experts = {
            f"{path}.{number}": (stack.lora_A[number], stack.lora_B[number])
            for path, stack in self.stacks.items()
            for number in range(len(stack))
        }
        return {path: (each.lora_A, each.lora_B) for path, each in self.layers.items()} | experts

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, in a stable order."""
        named = {}
        trained: Mapping[str, LoRALinear | LoRAStack] = {**self.layers, **self.stacks}
        for path, layer in trained.items():
            named[f"{path}.lora_A"] = layer.lora_A
            named[f"{path}.lora_B"] = layer.lora_B
        return {**named, **self.whole_parameters()}

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
        for path, layer in self.layers.items():
            model.set_submodule(path, layer.frozen)
        for path, trained in self.whole.items():
            model.set_submodule(path, trained.replaced)
        try:
            yield
        finally:
            for path, own in {**self.layers, **self.whole}.items():
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
        ConfigError: a target or pattern names no layer.
    """
    layers = by_lora_path(projections(skeleton))
    experts = [path for path in targeted_paths(skeleton, spec) if layers[path][0].is_expert]
    check_merge_aware(spec, 4, experts=experts)
    low_rank = sum(
        spec.rank_of(path) * (each.in_features + each.out_features)
        for path in targeted_paths(skeleton, spec)
        for each in layers[path]
    )
    whole = (skeleton.get_submodule(path).parameters() for path in spec.whole)
    return low_rank + sum(each.numel() for parameters in whole for each in parameters)


def attach(base: Base, spec: LoraSpec, seed: int = 42) -> Adapter:
    """Wrap the targeted layers of `base` in LoRA layers; its output does not change yet.

    Args:
        base: a loaded base without an adapter, changed in place.
        spec: the layers to train, and how.
        seed: the seed that every A is drawn from.

    Raises:
        ConfigError: a target or pattern matches no layer, or LoRA is attached already.
    """
    check_free(base)
    found = projections(base.model)
    paths = targeted_paths(base.model, spec)
    generator = torch.Generator().manual_seed(seed)
    of_experts = stacks(base.model)
    experts = [path for path in paths if path in of_experts]
    is_shared = base.shards is not None
    check_merge_aware(spec, base.quantization.bits, is_shared=is_shared, experts=experts)
    layers: dict[str, LoRALinear] = {}
    stacked: dict[str, LoRAStack] = {}
    for number, path in enumerate(paths):
        sizes: dict[str, Any] = {"rank": spec.rank_of(path), "scaling": spec.scaling_of(path)}
        if path in of_experts:
            stacked[path] = LoRAStack(of_experts[path], **sizes, generator=generator)
            base.model.set_submodule(path, stacked[path].train(of_experts[path].training))
            continue
        sizes |= {"dropout": spec.dropout, "generator": generator, "number": number}
        layers[path] = _layer(base, spec, found[path].frozen, sizes)
        base.model.set_submodule(path, layers[path])
    whole = _train_whole(base, spec, layers, generator)
    return Adapter(base, spec, layers, whole, stacks=stacked)


def _layer(
    base: Base, spec: LoraSpec, frozen: FrozenLinear, sizes: Mapping[str, Any]
) -> LoRALinear:
    """Return the LoRA layer of the variant; of a weight that is not packed, it is a plain one."""
    if spec.variant.merge_aware and frozen.weight.bits != 16:
        layer: LoRALinear = MergeAwareLinear(frozen, quantization=base.quantization, **sizes)
    else:
        layer = LoRALinear(frozen, **sizes)
    return layer.train(frozen.training)


def _train_whole(
    base: Base, spec: LoraSpec, layers: Mapping[str, LoRALinear], generator: torch.Generator
) -> dict[str, TrainedLinear]:
    whole = {}
    std = float(getattr(base.model.config, "initializer_range", _STD))
    for path in spec.whole:
        layer = base.model.get_submodule(path)
        if path in layers or not isinstance(layer, FrozenLinear):
            raise ConfigError(f"{path}: cannot be trained whole; expected a layer without LoRA")
        if layer is base.model.get_output_embeddings():
            raise ConfigError(
                f"{path}: the loss takes the output head for frozen; leave it out of what is "
                "trained whole"
            )
        whole[path] = TrainedLinear(layer)
        if f"{path}.weight" in base.fresh:
            # Drawn in host memory: the same values on every device.
            drawn = torch.empty(whole[path].weight.shape).normal_(0, std, generator=generator)
            whole[path].weight.data.copy_(drawn)
        base.model.set_submodule(path, whole[path])
    return whole


def check_free(base: Base) -> None:
    """Check that `base` carries no adapter, neither a trained one nor one of several.

    Raises:
        ConfigError: it does.
    """
    if any(_carries_lora(module) for module in base.model.modules()):
        raise ConfigError("the base carries an adapter already; detach it first")


def _carries_lora(module: nn.Module) -> bool:
    return isinstance(module, LoRAStack) or isinstance(getattr(module, "frozen", 0), FrozenLinear)


def detach(adapter: Adapter) -> Base:
    """Take the adapter off; the base is the same as before, bit for bit."""
    for path, layer in adapter.layers.items():
        adapter.base.model.set_submodule(path, layer.frozen)
    for path, stack in adapter.stacks.items():
        adapter.base.model.set_submodule(path, stack.without_terms())
    for path, trained in adapter.whole.items():
        adapter.base.model.set_submodule(path, trained.replaced)
    put_back(adapter.base.model, adapter.originals)
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
        model.set_submodule(path, _without_term(layer, dtype))
    for path, stack in adapter.stacks.items():
        merged: list[nn.Module] = [
            _merged(stack.expert(number), stack.delta(number), dtype)
            for number in range(len(stack))
        ]
        model.set_submodule(path, Stack(merged, is_transposed=stack.is_transposed))
    for path, trained in adapter.whole.items():
        bias = None if trained.bias is None else trained.bias.detach().to(dtype)
        model.set_submodule(path, FrozenLinear.holding(trained.weight.detach().to(dtype), bias))
    return adapter.base


def _without_term(layer: LoRALinear, dtype: torch.dtype) -> FrozenLinear:
    if isinstance(layer, MergeAwareLinear):
        trained = layer.merged.dequantize(torch.float32)
        return FrozenLinear.holding(trained.to(dtype), layer.frozen.bias)
    return _merged(layer.frozen, layer.delta(), dtype)


def _merged(frozen: FrozenLinear, delta: Tensor, dtype: torch.dtype) -> FrozenLinear:
    merged = frozen.weight.dequantize(torch.float32) + delta
    return FrozenLinear.holding(merged.to(dtype), frozen.bias, frozen.window)

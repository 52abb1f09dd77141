"""Put LoRA layers on a base, and take them off again.

Takes a loaded base and a `LoraSpec`; returns an `Adapter`, which knows the layers. The targets are
resolved from the paths of layers alone, so that a wrong name is found before any weight is read.
Trains nothing, and reads and writes no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from qlora_kit.config import LoraOptions
from qlora_kit.errors import ConfigError
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.projections import Group, Projection, projections, vocabulary_paths
from qlora_kit.layers.trained import TrainedLinear
from qlora_kit.lora.saved import Original, put_back
from qlora_kit.model.load import Base

ALL_LINEAR = "all-linear"
# PEFT's word for causal language modelling.
TASK_TYPE = "CAUSAL_LM"
# Of a fresh layer whose architecture does not say it.
_STD = 0.02
Number = TypeVar("Number", int, float)

_DEFAULTS = LoraOptions()
_GROUPS = get_args(Group)
_IS_PATTERN = re.compile(r"[\\*+?()\[\]|^$]")


@dataclass(frozen=True)
class LoraSpec:
    """The layers to train, and how.

    Attributes:
        rank: R of the layers that `rank_pattern` does not name.
        alpha: numerator of the scaling, for the layers that `alpha_pattern` does not name.
        dropout: probability that an input of A is zeroed in training.
        targets: groups, names or regular expressions, see `resolve_targets`.
        rslora: whether scaling is alpha / √rank instead of alpha / rank.
        rank_pattern: rank by the end of a path or by a regular expression, as in PEFT.
        alpha_pattern: alpha by the end of a path or by a regular expression, as in PEFT.
        whole: paths of linear layers that are trained whole; they get no LoRA, targeted or not.
        task_type: PEFT's name for the task that they are trained for.
    """

    rank: int = _DEFAULTS.rank
    alpha: float = _DEFAULTS.alpha
    dropout: float = _DEFAULTS.lora_dropout
    targets: tuple[str, ...] = _DEFAULTS.targets
    rslora: bool = _DEFAULTS.rslora
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    task_type: str = TASK_TYPE

    @classmethod
    def of(
        cls, options: LoraOptions, task_type: str = TASK_TYPE, whole: tuple[str, ...] = ()
    ) -> LoraSpec:
        """Return the spec that the options ask for, for a task that PEFT calls `task_type`."""
        return cls(
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.lora_dropout,
            targets=options.targets,
            rslora=options.rslora,
            rank_pattern=options.rank_pattern,
            alpha_pattern=options.alpha_pattern,
            whole=whole,
            task_type=task_type,
        )

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer at `path`."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> float:
        """Return the scaling of the layer at `path`."""
        rank = self.rank_of(path)
        alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    for pattern, value in patterns.items():
        if _names(pattern, path):
            return value
    return default


def _names(pattern: str, path: str) -> bool:
    """Whether a key of a rank or alpha pattern names a path, as in PEFT."""
    if not _IS_PATTERN.search(pattern):
        return path == pattern or path.endswith(f".{pattern}")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
    except re.error as error:
        raise ConfigError(f"pattern '{pattern}' is no regular expression ({error})") from error


@dataclass(frozen=True)
class Adapter:
    """The trained part of a model.

    Attributes:
        base: the base that it is attached to.
        spec: the spec that it was attached by.
        layers: the LoRA layers by path.
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

    @torch.no_grad()
    def fill(
        self, tensors: Mapping[str, tuple[Tensor, Tensor]], whole: Mapping[str, Tensor]
    ) -> None:
        """Set the values of the trained parameters.

        Args:
            tensors: A (R, D) and B (K, R) of each LoRA layer, by path.
            whole: the parameters of the layers that are trained whole, by name.
        """
        for path, (a, b) in tensors.items():
            self.layers[path].lora_A.copy_(a)
            self.layers[path].lora_B.copy_(b)
        for name, parameter in self.whole_parameters().items():
            parameter.copy_(whole[name])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, in a stable order."""
        named = {}
        for path, layer in self.layers.items():
            named[f"{path}.lora_A"] = layer.lora_A
            named[f"{path}.lora_B"] = layer.lora_B
        return {**named, **self.whole_parameters()}

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


def resolve_targets(
    found: Mapping[str, Projection], targets: Iterable[str], vocabulary: Iterable[str] = ()
) -> list[str]:
    """Return the paths of the projections that `targets` name, in the order of the model.

    Args:
        found: all projections of the model.
        targets: each is "attention", "mlp", "all-linear", the last part of a path (`q_proj`), a
            whole path, or a regular expression that matches whole paths.
        vocabulary: the paths of the input embedding and the head, which carry no LoRA here.

    Raises:
        ConfigError: a target matches no layer that can carry LoRA; the error lists those that can.
    """
    chosen: set[str] = set()
    faults = []
    vocabulary = list(vocabulary)
    open_to_lora = [path for path, each in found.items() if not each.is_expert]
    for target in targets:
        named = [path for path, each in found.items() if _matches(target, path, each.group)]
        matched = [path for path in named if not found[path].is_expert]
        if not matched:
            reason, remedy = "matches no linear layer", ""
            if named:
                reason = "names experts of a mixture, which carry no LoRA here yet"
                remedy = "; leave it out"
            if any(_matches(target, path) for path in vocabulary):
                reason = "names an embedding or the output head, which carry no LoRA here yet"
                remedy = "; leave it out"
            faults.append(
                f"--targets: '{target}' {reason}; expected attention, mlp, all-linear, or one of "
                f"{', '.join(_endings(open_to_lora))}{remedy}"
            )
        chosen.update(matched)
    if not chosen and not faults:
        faults.append("--targets: empty; expected attention, mlp, all-linear or names")
    if faults:
        raise ConfigError(*faults)
    return [path for path in found if path in chosen]


def _matches(target: str, path: str, group: str | None = None) -> bool:
    if target == ALL_LINEAR:
        return True
    if target in _GROUPS:
        return group == target
    if _IS_PATTERN.search(target):
        try:
            return re.fullmatch(target, path) is not None
        except re.error as error:
            raise ConfigError(
                f"--targets: '{target}' is no regular expression ({error})"
            ) from error
    return path == target or path.endswith(f".{target}")


def _endings(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def check_patterns(paths: Sequence[str], spec: LoraSpec) -> None:
    """Check that every rank and alpha pattern names a targeted layer.

    Raises:
        ConfigError: patterns name no targeted layer; the error has a line for each.
    """
    faults = [
        f"--{kind}-pattern: '{pattern}' names no targeted layer; expected one of "
        f"{', '.join(_endings(paths))}"
        for kind, patterns in (("rank", spec.rank_pattern), ("alpha", spec.alpha_pattern))
        for pattern in patterns
        if not any(_names(pattern, path) for path in paths)
    ]
    if faults:
        raise ConfigError(*faults)


def targeted_paths(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Return the paths of the layers of a model that get LoRA: those trained whole get none.

    Raises:
        ConfigError: a target or a pattern names no layer.
    """
    found = {path: each for path, each in projections(model).items() if path not in spec.whole}
    paths = resolve_targets(found, spec.targets, vocabulary_paths(model))
    check_patterns(paths, spec)
    return paths


def count_trainable(skeleton: nn.Module, spec: LoraSpec) -> int:
    """Return the number of parameters that an adapter will have, before anything is loaded.

    Raises:
        ConfigError: a target or pattern names no layer.
    """
    layers = projections(skeleton)
    low_rank = sum(
        spec.rank_of(path) * (layers[path].in_features + layers[path].out_features)
        for path in targeted_paths(skeleton, spec)
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
    layers = {}
    for number, path in enumerate(paths):
        layers[path] = LoRALinear(
            found[path].frozen,
            rank=spec.rank_of(path),
            scaling=spec.scaling_of(path),
            dropout=spec.dropout,
            generator=generator,
            number=number,
        ).train(found[path].frozen.training)
        base.model.set_submodule(path, layers[path])
    return Adapter(base, spec, layers, _train_whole(base, spec, layers, generator))


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
    if any(isinstance(getattr(m, "frozen", None), FrozenLinear) for m in base.model.modules()):
        raise ConfigError("the base carries an adapter already; detach it first")


def detach(adapter: Adapter) -> Base:
    """Take the adapter off; the base is the same as before, bit for bit."""
    for path, layer in adapter.layers.items():
        adapter.base.model.set_submodule(path, layer.frozen)
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
        merged = layer.frozen.weight.dequantize(torch.float32) + layer.delta()
        model.set_submodule(path, FrozenLinear.holding(merged.to(dtype), layer.frozen.bias))
    for path, trained in adapter.whole.items():
        bias = None if trained.bias is None else trained.bias.detach().to(dtype)
        model.set_submodule(path, FrozenLinear.holding(trained.weight.detach().to(dtype), bias))
    return adapter.base

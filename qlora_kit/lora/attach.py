"""Put LoRA layers on a base, and take them off again.

Takes a loaded base and a `LoraSpec`; returns an `Adapter`, which knows the layers. The targets are
resolved from the paths of layers alone, so that a wrong name is found before any weight is read.
Trains nothing, and reads and writes no files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from qlora_kit.config import LoraOptions
from qlora_kit.errors import ConfigError
from qlora_kit.layers.experts import Stack
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.lora_experts import LoRAStack
from qlora_kit.layers.projections import (
    Group,
    Projection,
    by_lora_path,
    projections,
    router_paths,
    stacks,
    vocabulary_paths,
)
from qlora_kit.layers.trained import TrainedLinear
from qlora_kit.layers.windows import Window
from qlora_kit.lora.saved import Original, put_back
from qlora_kit.model.load import Base

ALL_LINEAR = "all-linear"
ALL_CONV = "all-conv"
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


def resolve_targets(
    found: Mapping[str, Projection],
    targets: Iterable[str],
    vocabulary: Iterable[str] = (),
    routers: Iterable[str] = (),
) -> list[str]:
    """Return the paths that LoRA is put on, in the order of the model.

    The experts of a mixture have the path of their stack. "all-linear" names every layer but
    those: they are to be asked for.

    Args:
        found: all projections of the model.
        targets: each is "attention", "mlp", "experts", "all-linear", "all-conv", the last part of a
            path (`q_proj`), a whole path, or a regular expression that matches whole paths.
        vocabulary: the paths of the input embedding and the head, which carry no LoRA here.
        routers: the paths of what chooses experts, which stays frozen.

    Raises:
        ConfigError: a target matches nothing that can carry LoRA; the error lists what can.
    """
    sites = by_lora_path(found)
    groups = {path: each[0].group for path, each in sites.items()}
    windows = {path: each[0].window for path, each in sites.items() if each[0].window is not None}
    experts = Counter(each.lora_path for each in found.values() if each.is_expert)
    unfit = {
        "names an embedding or the output head, which carry no LoRA here yet": [*vocabulary],
        "names a router, which stays frozen": [*routers],
    }
    words = [group for group in _GROUPS if group in groups.values()]
    expected = ", ".join((*words, ALL_LINEAR, *((ALL_CONV,) if windows else ())))
    open_to_lora = [path for path in groups if _may_carry(windows.get(path))]
    chosen: set[str] = set()
    faults = []
    for target in targets:
        named = [
            path
            for path, group in groups.items()
            if _matches(target, path, group) and _of_kind(target, windows.get(path))
        ]
        matched = [path for path in named if _may_carry(windows.get(path))]
        if not matched:
            reason, remedy = "matches no linear layer", ""
            if named:
                reason = f"names {named[0]}, {windows[named[0]].why_no_lora}"
                remedy = "; leave it out"
            if one := _of_one_expert(target, experts):
                reason = f"names an expert of {one}, whose {experts[one]} are trained together"
                remedy = "; name the stack"
            for why, paths in unfit.items():
                if any(_matches(target, path) for path in paths):
                    reason, remedy = why, "; leave it out"
            faults.append(
                f"--targets: '{target}' {reason}; expected {expected}, or one of "
                f"{', '.join(_endings(open_to_lora))}{remedy}"
            )
        chosen.update(matched)
    if not chosen and not faults:
        faults.append(f"--targets: empty; expected {expected} or names")
    if faults:
        raise ConfigError(*faults)
    return [path for path in groups if path in chosen]


def _of_one_expert(target: str, experts: Iterable[str]) -> str | None:
    """Return the stack of which a target names an expert by number, there or not."""
    stack, _, number = target.rpartition(".")
    named = (path for path in experts if number.isdigit() and _matches(stack, path))
    return next(named, None)


def _may_carry(window: Window | None) -> bool:
    return window is None or window.why_no_lora is None


def _of_kind(target: str, window: Window | None) -> bool:
    """Whether a target that names a kind of layers means this kind: a convolution has a window."""
    if target == ALL_CONV:
        return window is not None
    return window is None or target not in (ALL_LINEAR, *_GROUPS)


def _matches(target: str, path: str, group: str | None = None) -> bool:
    if target == ALL_LINEAR:
        return group != "experts"
    if target == ALL_CONV:
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
    """Return the paths of a model that get LoRA: layers, and stacks of experts.

    Layers that are trained whole get none.

    Raises:
        ConfigError: a target or a pattern names no layer; or experts would have dropout.
    """
    found = {path: each for path, each in projections(model).items() if path not in spec.whole}
    paths = resolve_targets(found, spec.targets, vocabulary_paths(model), router_paths(model))
    check_patterns(paths, spec)
    experts = stacks(model).keys() & set(paths)
    if spec.dropout and experts:
        raise ConfigError(
            f"--lora-dropout: {spec.dropout:g}, and --targets names experts ({min(experts)}), "
            "which PEFT opens without dropout only; expected 0; leave it out"
        )
    return paths


def count_trainable(skeleton: nn.Module, spec: LoraSpec) -> int:
    """Return the number of parameters that an adapter will have, before anything is loaded.

    Raises:
        ConfigError: a target or pattern names no layer.
    """
    layers = by_lora_path(projections(skeleton))
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
    layers: dict[str, LoRALinear] = {}
    stacked: dict[str, LoRAStack] = {}
    for number, path in enumerate(paths):
        sizes: dict[str, Any] = {"rank": spec.rank_of(path), "scaling": spec.scaling_of(path)}
        if path in of_experts:
            stacked[path] = LoRAStack(of_experts[path], **sizes, generator=generator)
            base.model.set_submodule(path, stacked[path].train(of_experts[path].training))
            continue
        layers[path] = LoRALinear(
            found[path].frozen,
            **sizes,
            dropout=spec.dropout,
            generator=generator,
            number=number,
        ).train(found[path].frozen.training)
        base.model.set_submodule(path, layers[path])
    whole = _train_whole(base, spec, layers, generator)
    return Adapter(base, spec, layers, whole, stacks=stacked)


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
        model.set_submodule(path, _merged(layer.frozen, layer.delta(), dtype))
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


def _merged(frozen: FrozenLinear, delta: Tensor, dtype: torch.dtype) -> FrozenLinear:
    merged = frozen.weight.dequantize(torch.float32) + delta
    return FrozenLinear.holding(merged.to(dtype), frozen.bias, frozen.window)

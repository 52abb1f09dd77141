"""The layers of the variants that change how a layer computes, such as DoRA or VB-LoRA.

Takes a `LoraSpec` and the layers that it means; returns what makes their LoRA layers, and counts
what they will train. Each variant has its mathematics in a file of `layers/`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qlora_kit.errors import ConfigError
from qlora_kit.layers.dora import DoRALinear
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.learned_scale import LearnedScaleLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.merge_aware import MergeAwareLinear
from qlora_kit.layers.projections import Projection
from qlora_kit.layers.vector_bank import TOP, VectorBankLinear, new_bank
from qlora_kit.lora.spec import LoraSpec
from qlora_kit.model.hardware import Hardware

# Of PEFT and the paper.
_MOST_VECTORS = _LONGEST_VECTOR = 256
# Shorter vectors cost more logits than A and B have numbers, and share nothing.
_SHORTEST_VECTOR = 4

Sites = Mapping[str, Sequence[Projection]]
"""the projections that each path of LoRA stands for: one layer, or the experts of a stack"""


def check_sites(spec: LoraSpec, sites: Sites) -> None:
    """Check that the variants can be had on the targeted layers.

    Raises:
        ConfigError: a layer is one of experts or a convolution, which PEFT or the kit has not in
            this variant; or VB-LoRA finds no vector that divides all layers.
    """
    variant = spec.variant
    plain = ("--dora", variant.dora), ("--vblora", variant.vblora)
    for_layers = (*plain, ("--learned-scale", variant.learned_scale))
    for_linear = (*for_layers, ("--freeze-a", variant.freeze_a))
    for path, (first, *_) in sites.items():
        refusing = for_linear if first.is_expert else plain if first.window is not None else ()
        if flag := next((flag for flag, is_asked in refusing if is_asked), None):
            what = "a stack of experts" if first.is_expert else "a convolution"
            raise ConfigError(
                f"{flag}: --targets names {path}, {what}, which has plain LoRA only; expected "
                f"linear layers; name other --targets, or leave {flag} out"
            )
    if variant.vblora and sites:
        bank_shape(sites)


def bank_shape(sites: Sites) -> tuple[int, int]:
    """Return how many vectors VB-LoRA has, and how long they are.

    They are as long as divides the inputs and outputs of every layer, up to 256 numbers; and there
    are as many vectors as numbers in one, so that the logits are no more than A and B would be.

    Raises:
        ConfigError: nothing of a useful length divides all of them.
    """
    sizes = {size for each, *_ in sites.values() for size in (each.in_features, each.out_features)}
    common = math.gcd(*sizes)
    lengths = range(min(common, _LONGEST_VECTOR), _SHORTEST_VECTOR - 1, -1)
    length = next((each for each in lengths if common % each == 0), None)
    if length is None:
        raise ConfigError(
            f"--vblora: the targeted layers have {', '.join(map(str, sorted(sizes)))} inputs and "
            f"outputs, which no vector of {_SHORTEST_VECTOR} numbers or more divides; expected "
            "sizes with a common divisor; name other --targets"
        )
    return max(TOP, min(length, _MOST_VECTORS)), length


def count_form(spec: LoraSpec, sites: Sites) -> int:
    """Return the number of parameters that the LoRA layers of `sites` will train."""
    variant = spec.variant
    shape = bank_shape(sites) if variant.vblora and sites else None
    total = 0 if shape is None else math.prod(shape)
    for path, projections in sites.items():
        for each in projections:
            numbers = each.out_features
            if not variant.freeze_a:
                numbers += each.in_features
            total += spec.rank_of(path) * (numbers if shape is None else _logits(each, shape))
            total += each.out_features if variant.dora else 0
            total += 1 if variant.learned_scale else 0
    return total


def _logits(each: Projection, shape: tuple[int, int]) -> int:
    vectors, length = shape
    return (each.in_features + each.out_features) // length * vectors


def layer_maker(
    spec: LoraSpec,
    sites: Sites,
    hardware: Hardware,
    generator: torch.Generator,
) -> Callable[..., LoRALinear]:
    """Return what makes the LoRA layer of a frozen layer, called as `LoRALinear` is.

    Args:
        spec: the variant, among other things.
        sites: the targeted layers.
        hardware: its dtype is that of the products, its device that of what layers share.
        generator: draws what layers share.
    """
    variant = spec.variant
    if variant.vblora:
        bank = new_bank(*bank_shape(sites), hardware.device, generator)

        def of_bank(*given: object, scaling: float, **options: object) -> LoRALinear:
            return VectorBankLinear(*given, bank=bank, scaling=1.0, **options)  # type: ignore[arg-type]

        return of_bank
    if variant.dora:
        return functools.partial(DoRALinear, dtype=hardware.dtype, freeze_a=variant.freeze_a)
    if variant.learned_scale:
        return functools.partial(LearnedScaleLinear, freeze_a=variant.freeze_a)
    if variant.merge_aware:
        return functools.partial(_merge_aware, freeze_a=variant.freeze_a)
    if variant.freeze_a:
        return functools.partial(LoRALinear, freeze_a=True)
    return LoRALinear


def _merge_aware(frozen: FrozenLinear, **sizes: Any) -> LoRALinear:
    """Return a merge-aware layer; of a weight that is not packed, a plain one."""
    if frozen.weight.bits == 16:
        return LoRALinear(frozen, **sizes)
    return MergeAwareLinear(frozen, **sizes)

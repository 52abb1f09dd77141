"""Weights that stay unpacked between the products of a step, and between steps.

A packed weight is unpacked for each product: two or three times a micro-batch. Where memory is left
over, layers can keep what they unpacked. The products are of the same numbers, so no bit changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.layers.merge_aware import MergeAwareLinear
from qlora_kit.layers.weight import FrozenWeight, PlainWeight


def packed_weights(layer: nn.Module) -> Iterator[FrozenWeight]:
    """Yield the weights of a layer that are unpacked for a product."""
    modules = list(layer.modules())
    merged = [each for each in modules if isinstance(each, MergeAwareLinear)]
    yield from (each.merged for each in merged)
    idle = {each.frozen.weight for each in merged}
    for module in modules:
        is_packed = isinstance(module, FrozenWeight) and not isinstance(module, PlainWeight)
        # Of a weight that processes hold together, what is gathered must not stay.
        if is_packed and module.shards is None and module not in idle:
            yield module


def unpacked_bytes(weights: Iterable[FrozenWeight], dtype: torch.dtype) -> int:
    """Return the bytes of weights in the dtype of the products."""
    return sum(math.prod(weight.shape) for weight in weights) * dtype.itemsize


def set_unpacked(model: nn.Module, count: int, dtype: torch.dtype) -> int:
    """Let the last layers of a model keep their weights unpacked, and no others.

    Args:
        model: changed in place.
        count: number of the layers.
        dtype: the dtype of the products.

    Returns:
        The number of weights that stay unpacked.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    first, kept = max(0, len(layers) - count), 0
    for index, layer in enumerate(layers):
        for weight in packed_weights(layer):
            weight.keep_unpacked(dtype if index >= first else None)
            kept += index >= first
    return kept

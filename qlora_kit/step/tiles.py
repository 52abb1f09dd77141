"""Lets the MLPs of a model work in tiles of tokens.

A gated MLP is recognised by its parts, and its own forward must agree with that of `TiledMLP`. All
other MLPs are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_kit.layers.mlp import Parts, TiledMLP
from qlora_kit.layers.weight import gathered

_PROBE_TOKENS = 3


def set_mlp_tiles(model: nn.Module, tile_tokens: int, dtype: torch.dtype) -> int:
    """Let the gated MLPs of a model work in tiles, or on all tokens again.

    Args:
        model: a loaded model, changed in place.
        tile_tokens: tokens of a tile; 0 gives the model its own MLPs back.
        dtype: the compute dtype of the model.

    Returns:
        The number of MLPs that work in tiles now.
    """
    served = 0
    is_gated: dict[Any, bool] = {}
    for path, module in _own_mlps(model):
        if tile_tokens and _is_gated(module, dtype, is_gated):
            model.set_submodule(path, TiledMLP(module, tile_tokens))
            served += 1
    return served


def _own_mlps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Put the model's own MLPs back in their places; return those with a gated MLP's parts."""
    for path, module in list(model.named_modules()):
        if isinstance(module, TiledMLP):
            module.replaced.train(module.training)
            model.set_submodule(path, module.replaced)
    return [(path, module) for path, module in model.named_modules() if Parts.of(module)]


def _is_gated(module: nn.Module, dtype: torch.dtype, known: dict[Any, bool]) -> bool:
    parts = Parts.of(module)
    assert parts is not None
    kind = (type(module), type(parts.act), *_numbers(module))
    if kind not in known:
        known[kind] = _computes_the_same(module, parts, dtype)
    return known[kind]


def _numbers(module: nn.Module) -> list[tuple[str, Any]]:
    # Two modules of a class may still differ in a number, such as that of a sparse activation.
    plain = (bool, int, float, str)
    return sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain))


@torch.no_grad()
def _computes_the_same(module: nn.Module, parts: Parts, dtype: torch.dtype) -> bool:
    """Whether a module's own forward and the forward in tiles agree on random tokens."""
    frozen = parts.frozen[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PROBE_TOKENS, frozen.in_features, generator=generator)
    x = x.to(frozen.weight.device, dtype)
    was_training = module.training
    module.eval()  # in training mode, the dropout masks of the two forwards would differ
    try:
        with gathered(module):
            own, found = module(x).float(), TiledMLP(module, _PROBE_TOKENS - 1)(x).float()
    finally:
        module.train(was_training)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return bool((found - own).norm() <= tolerance * own.norm() + 1e-12)

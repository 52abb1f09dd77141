"""Which MLPs of a model work in tiles of tokens.

Found by their parts, then held against their own forward. All others are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_kit.layers.mlp import Parts, TiledMLP

_PROBE_TOKENS = 3


def set_mlp_tiles(model: nn.Module, tile_tokens: int, dtype: torch.dtype) -> int:
    """Let the gated MLPs of a model work on so many tokens at a time, or as before if 0.

    Args:
        model: loaded; changed in place.
        tile_tokens: tokens of a tile.
        dtype: that the model computes in.

    Returns:
        How many MLPs work so now.
    """
    served = 0
    is_gated: dict[Any, bool] = {}
    for path, module in _own_mlps(model):
        if tile_tokens and _is_gated(module, dtype, is_gated):
            model.set_submodule(path, TiledMLP(module, tile_tokens))
            served += 1
    return served


def _own_mlps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Put the model's own MLPs back in their places and return what looks gated, by path."""
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
    # Two modules of a class may still differ in a number, such as one of a sparse activation.
    plain = (bool, int, float, str)
    return sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain))


@torch.no_grad()
def _computes_the_same(module: nn.Module, parts: Parts, dtype: torch.dtype) -> bool:
    """Whether a module's own forward and that of tiles agree on random tokens."""
    frozen = parts.frozen[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PROBE_TOKENS, frozen.in_features, generator=generator)
    x = x.to(frozen.weight.device, dtype)
    was_training = module.training
    module.eval()  # two draws of dropout would differ
    try:
        own, found = module(x).float(), TiledMLP(module, _PROBE_TOKENS - 1)(x).float()
    finally:
        module.train(was_training)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return bool((found - own).norm() <= tolerance * own.norm() + 1e-12)

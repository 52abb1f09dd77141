"""Lets the RMSNorms of a model be computed by one kernel.

A norm is recognised by its parts: one weight, one ε and no children. Its own forward must agree
with a formula of `FusedNorm` on random numbers. They are computed on the CPU, in a copy of the
module, so a plan on tensors without values recognises the same norms as a run. All other norms are
left as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers.kernels.norm import FusedNorm, rms_norm
from qlora_kit.private_torch import outside_of_modes, own_parameters

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Formula:
    """The formula of a norm.

    Attributes:
        eps: its ε.
        adds_one: whether it multiplies by 1 + w instead of w.
    """

    eps: float
    adds_one: bool


def set_norms(model: nn.Module, fused: bool, dtype: torch.dtype) -> int:
    """Let the RMSNorms of a model ask for the kernel, or be the model's own again.

    Args:
        model: a loaded model, changed in place.
        fused: whether they ask for the kernel.
        dtype: the compute dtype of the model.

    Returns:
        The number of norms that ask for the kernel now.
    """
    served = 0
    known: dict[Any, Formula | None] = {}
    for path, module in _own_norms(model):
        if fused and (formula := _formula(module, dtype, known)):
            replacement = FusedNorm(module, formula.eps, adds_one=formula.adds_one)
            model.set_submodule(path, replacement)
            served += 1
    return served


def _own_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Put the model's own norms back in their places; return all that may be RMSNorms."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FusedNorm):
            module.replaced.train(module.training)
            model.set_submodule(path, module.replaced)
    return [(path, module) for path, module in model.named_modules() if _has_the_parts(module)]


def _has_the_parts(module: nn.Module) -> bool:
    held = {name: each for name, each in own_parameters(module).items() if each is not None}
    return (
        held.keys() == {"weight"}
        and held["weight"].ndim == 1
        and not held["weight"].requires_grad
        and next(module.children(), None) is None
        and next(module.buffers(), None) is None
        and len(_floats(module)) == 1
        and len(inspect.signature(module.forward).parameters) == 1
    )


def _floats(module: nn.Module) -> list[float]:
    return [value for value in vars(module).values() if isinstance(value, float)]


def _formula(
    module: nn.Module, dtype: torch.dtype, known: dict[Any, Formula | None]
) -> Formula | None:
    weight = own_parameters(module)["weight"]
    assert weight is not None
    kind = (type(module), len(weight), weight.dtype, *_floats(module))
    if kind not in known:
        with outside_of_modes(), torch.no_grad():
            known[kind] = next(_agreeing(module, len(weight), weight.dtype, dtype), None)
    return known[kind]


def _agreeing(
    module: nn.Module, width: int, weight_dtype: torch.dtype, dtype: torch.dtype
) -> Iterator[Formula]:
    """Yield the formulas that agree with a module's own forward."""
    generator = torch.Generator().manual_seed(0)
    (eps,) = _floats(module)
    values = torch.randn(width, generator=generator)
    # In the second row the mean of the squares is as small as ε, so that ε matters.
    x = torch.randn(2, width, generator=generator) * torch.tensor([[1.0], [eps**0.5]])
    try:
        own = _copy_with(module, values)(x)
        stored = _copy_with(module, values.to(weight_dtype))(x.to(dtype))
    except Exception:
        return  # the parts are those of a norm, and the module is something else
    if stored.dtype != dtype:
        return  # the kernel returns the dtype of x
    for adds_one in (False, True):
        found = rms_norm(x, values + adds_one, eps)
        if _agree(found, own):
            yield Formula(eps, adds_one)


def _copy_with(module: nn.Module, weight: Tensor) -> nn.Module:
    """Return a shallow copy of a module with another weight."""
    other = copy.copy(module)
    other._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    return other


def _agree(found: Tensor, own: Tensor) -> bool:
    off = (found - own).norm(dim=-1) <= _TOLERANCE * own.norm(dim=-1)
    return own.shape == found.shape and bool(off.all())

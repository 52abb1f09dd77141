"""Lets the attention of a model rotate queries and keys by one kernel.

Every file of transformers' models has a function for it, and most of them compute the same. One
that does is replaced, in that file, by a `Rotation`, which calls the kernel where it serves and its
arguments are of the usual form. A function is held against the formula on random numbers on the
CPU, so a plan recognises the same functions as a run.

Source: RoFormer (arXiv:2104.09864), section 3.2.2, with the halves of a head as its pairs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers.kernels import serves
from qlora_kit.private_torch import outside_of_modes
from qlora_kit.private_transformers import rotary_functions, rotate_by

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes q (B, H, T, d), k (B, G, T, d), cos and sin (B or 1, T, d); returns q and k rotated."""

_KERNEL = "qlora_kit.layers.kernels.rotary"
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rotation:
    """What stands in for a model's function.

    Attributes:
        replaced: the model's own function.
        takes_part: whether it rotates the first numbers of a head where cos is narrower than that.
    """

    replaced: Callable[..., Any]
    takes_part: bool

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any
    ) -> Any:
        """Rotate queries and keys; see `Rotate` for the usual form of the arguments."""
        if not rest and more in ({}, {"unsqueeze_dim": 1}) and self._serves(q, k, cos, sin):
            return _kernel()(q, k, cos, sin)
        return self.replaced(q, k, cos, sin, *rest, **more)

    def _serves(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        width, rotated = q.shape[-1], cos.shape[-1]
        return (
            serves("rotary", q)
            and q.ndim == k.ndim == 4
            and cos.ndim == 3
            and cos.shape == sin.shape
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.shape[2] == k.shape[2] == cos.shape[1]
            and k.shape[-1] == width
            and (rotated == width or (self.takes_part and rotated < width))
        )


def set_rotary(model: nn.Module, fused: bool) -> list[Rotation]:
    """Let the attention of a model ask for the kernel, or call the model's own function again.

    All models of the same files of transformers do it from then on.

    Args:
        model: a loaded model.
        fused: whether its attention asks for the kernel.

    Returns:
        What stands in for the functions of the model now.
    """
    placed = []
    for file, function in rotary_functions(model).items():
        own = function.replaced if isinstance(function, Rotation) else function
        found = own
        if fused and _computes_the_same(own, part=1):
            found = Rotation(own, takes_part=_computes_the_same(own, part=2))
            placed.append(found)
        rotate_by(file, found)
    return placed


def has_kernel() -> bool:
    """Whether the kernel is a part of this kit."""
    return importlib.util.find_spec(_KERNEL) is not None


def _kernel() -> Rotate:
    # Only a GPU has what the kernel's file imports.
    rotate: Rotate = importlib.import_module(_KERNEL).rotate
    return rotate


def _computes_the_same(function: Callable[..., Any], part: int) -> bool:
    """Whether a function agrees with the formula where 1/`part` of a head is rotated."""
    generator = torch.Generator().manual_seed(0)
    with outside_of_modes(), torch.no_grad():
        q, k = (torch.randn(1, heads, 3, 16, generator=generator) for heads in (4, 2))
        angles = torch.randn(1, 3, 8 // part, generator=generator).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        try:
            found = function(q=q, k=k, cos=cos, sin=sin)
        except Exception:
            return False  # it takes other arguments, or cannot rotate a part
        return len(found) == 2 and all(
            _agree(own, _rotated(x, cos, sin)) for own, x in zip(found, (q, k), strict=True)
        )


def _agree(own: Tensor, found: Tensor) -> bool:
    return own.shape == found.shape and bool((own - found).norm() <= _TOLERANCE * found.norm())


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, H, T, d) with its first numbers, as many as cos (1, T, r) is wide, rotated."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-high, low], dim=-1) * sin, kept], dim=-1)

"""A weight less its start, computed alike on every device, and A and B brought to their rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Numbers of a slice in fp64: 32 MiB for the product, as much for the weight.
_SLICE = 1 << 22


def taken_by(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return scaling · B A, (K, D), fp32; see `less`."""
    return less(torch.zeros(len(b), a.shape[1], device=a.device), a, b, -scaling)


def less(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return W − scaling · B A, (K, D), fp32, in memory of its own.

    It is summed in fp64 and rounded once, slice by slice of the rows. So its bits do not depend on
    the order in which a device sums, and the codes that it is quantised to are the same anywhere.

    Args:
        weight: W (K, D), in any floating dtype.
        a: A (R, D), fp32, on any device.
        b: B (K, R), fp32, on any device.
        scaling: factor of the low-rank term.
    """
    wide_a = a.to(weight.device, torch.float64)
    found = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = max(1, _SLICE // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        product = b[part].to(weight.device, torch.float64) @ wide_a
        found[part] = weight[part].to(torch.float64).sub_(product.mul_(scaling))
    return found


def widened(a: Tensor, b: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A and B with R rows and columns, where a layer is too small to give as many.

    Those that are missing start as in plain LoRA: rows of A are drawn, and columns of B are zero.
    So they change nothing at first, and learn.

    Args:
        a: A (r, D), r at most R.
        b: B (K, r).
        rank: R.
        seed: the rows of A are drawn from.
    """
    missing = rank - len(a)
    if missing <= 0:
        return a.contiguous(), b.contiguous()
    bound = 1 / math.sqrt(a.shape[1])
    drawn = torch.empty(missing, a.shape[1], device="cpu")
    drawn.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return torch.cat([a, drawn.to(a.device)]), torch.cat([b, b.new_zeros(len(b), missing)], dim=1)

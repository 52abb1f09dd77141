"""PiSSA: A and B begin as the largest part of the weight, and the rest is frozen.

Source: PiSSA (arXiv:2404.02948), section 3, equations 2 to 4; scaling as in PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B with scaling · B A = the best approximation of W of rank R.

    With W = U S Vᵀ they are A = √(S/scaling) Vᵀ and B = U √(S/scaling), of the R largest values.

    Args:
        weight: W (K, D), fp32.
        rank: R. Where K or D is smaller, so many values are there, and A and B have as many.
        scaling: factor of the low-rank term.
    """
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:rank] / scaling).sqrt()
    return roots[:, None] * v[:rank], u[:, :rank] * roots

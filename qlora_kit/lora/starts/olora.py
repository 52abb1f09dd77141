"""OLoRA: B begins with orthonormal columns that span the first columns of the weight.

Source: OLoRA (arXiv:2406.01775), section 3, algorithm 1; the base is less scaling · B A as in PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A = the first R rows of the triangle, and B = the first R columns of Q, of W = Q R.

    Args:
        weight: W (K, D), fp32.
        rank: R. Where K or D is smaller, A and B have as many rows and columns.
    """
    q, triangle = torch.linalg.qr(weight)
    return triangle[:rank].clone(), q[:, :rank].clone()

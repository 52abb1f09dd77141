"""LoRA-GA: A and B begin along the gradient of the weight, and the base is less scaling · B A.

The first step of A and B then goes where full fine-tuning would go. Of the gradient G = U S Vᵀ, A
takes the first R rows of Vᵀ and B the next R columns of U S, times K^¼ / √γ. So PEFT has it
("ArB2r", "stable"); the paper scales A by the same factor and leaves S out, which takes far more
from the base than 4 bits bear.

Source: LoRA-GA (arXiv:2407.05000), section 3.3, theorem 3.1, and section 3.4 for the scale.
"""

from __future__ import annotations

import math

from torch import Tensor

_GAMMA = 16


def lora_ga(u: Tensor, sizes: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (r, D) and B (K, r) from the largest parts of a gradient.

    Args:
        u: (K, n), orthonormal columns.
        sizes: (n,), largest first.
        v: (n, D), orthonormal rows.
        rank: R; r is smaller where there are fewer than 2R parts.
    """
    count = min(rank, len(sizes) // 2)
    other = slice(count, 2 * count)
    factor = len(u) ** 0.25 / math.sqrt(_GAMMA)
    return v[:count], u[:, other] * sizes[other] * factor

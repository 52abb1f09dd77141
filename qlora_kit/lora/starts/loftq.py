"""LoftQ: A and B begin with the largest part of what quantising lost; the base stays as it is.

One step (T = 1): A and B are fitted to the weight as it was quantised, and it is not quantised
again after that. So the base is the same as in plain QLoRA, and the adapter is a plain one.

Source: LoftQ (arXiv:2310.08659), section 3, algorithm 1 with T = 1. PEFT's
`replace_lora_weights_loftq` does the same for a scaling of 1, and leaves other scalings out.
"""

from __future__ import annotations

from torch import Tensor

from qlora_kit.lora.starts.pissa import pissa


def loftq(weight: Tensor, quantized: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B with scaling · B A = the best approximation of W − Q of rank R.

    Args:
        weight: W (K, D).
        quantized: Q (K, D), fp32: the weight after quantising, unpacked.
        rank: R, see `pissa`.
        scaling: factor of the low-rank term.
    """
    return pissa(weight.float() - quantized, rank, scaling)

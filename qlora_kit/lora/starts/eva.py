"""EVA: A begins as the directions in which the inputs of a layer vary most, and B as zero.

The directions are those of a principal component analysis that takes one batch after another, and
holds no batch. Each layer keeps its rank: that is the paper's ρ = 1, without redistribution.

Source: EVA (arXiv:2410.07170), section 3.2 and algorithm 1; the incremental analysis is that of
Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 3.1. The sizes of the
randomised decomposition and its seed are those of PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A direction that turns by less between two batches has settled; PEFT's `tau`.
_SETTLED = 0.99
_ITERATIONS = 4
_SEED = 42


class PrincipalInputs:
    """The principal components of the inputs of a layer, after any number of batches.

    Attributes:
        components: (n, D), orthonormal rows, the one of most variance first; None at first.
        similarity: (n,), how alike the last two batches left each; None before two batches.

    Args:
        count: n.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.components: Tensor | None = None
        self.similarity: Tensor | None = None
        self._sizes: Tensor | None = None
        self._mean: Tensor | None = None
        self._seen = 0

    @property
    def has_settled(self) -> bool:
        """Whether the last batch has turned no direction."""
        return self.similarity is not None and bool((self.similarity >= _SETTLED).all())

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in a batch of inputs (N, D); one of fewer inputs than n says too little."""
        if len(x) < self.count:
            return
        before, total = self.components, self._seen + len(x)
        mean = x.mean(0, dtype=torch.float64)
        joined = x.float() - mean.float()
        overall = mean
        if before is not None and self._sizes is not None and self._mean is not None:
            # The mean has moved as well: one more row says by how much.
            moved = (self._mean - mean) * (self._seen * len(x) / total) ** 0.5
            # In fp64, as in PEFT: so the same numbers are drawn for the decomposition.
            joined = torch.cat([self._sizes[:, None] * before, joined, moved[None]])
            overall = (self._mean * self._seen + mean * len(x)) / total
        _, sizes, directions = _decomposed(joined, min(2 * self.count, *joined.shape))
        self.components, self._sizes = directions[: self.count], sizes[: self.count]
        self._mean, self._seen = overall, total
        if before is not None:
            self.similarity = torch.cosine_similarity(self.components, before.to(joined.dtype))


def _decomposed(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and Vᵀ of x, each row of Vᵀ with its largest number positive."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        u, sizes, v = torch.svd_lowrank(x, q=count, niter=_ITERATIONS)
    directions = v.mT
    largest = directions.abs().argmax(1, keepdim=True)
    return u, sizes, directions * directions.gather(1, largest).sign()


def eva(components: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """Return A = the components (R, D), and B = 0 (K, R)."""
    return components.float(), torch.zeros(out_features, len(components), device=components.device)

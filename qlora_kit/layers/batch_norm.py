"""A batch norm that is a part of a frozen base: it computes with the statistics it has learnt.

In training an `nn.BatchNorm2d` would normalise by the statistics of the batch and change its own.
Then a base would not be frozen, and the output of a row would depend on the rows beside it.
"""

from __future__ import annotations

from typing import Self

from torch import nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode, whatever mode its model is put in."""

    @classmethod
    def like(cls, norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
        """Return an empty one, on the meta device, in place of a norm of a skeleton."""
        return cls(
            norm.num_features,
            eps=norm.eps,
            momentum=norm.momentum,
            affine=norm.affine,
            track_running_stats=norm.track_running_stats,
            device="meta",
        ).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(mode=False)

"""A linear layer that is trained whole, such as a classifier's head: y = x Wᵀ + b.

For layers that a base does not have weights for, or that LoRA would not do for. Its own gradient
and optimiser state are as large as W, so it is for small layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear


class TrainedLinear(nn.Module):
    """A linear layer with a gradient, fp32, in place of a frozen one.

    Args:
        replaced: whose weights it starts with, unpacked; kept to be put back.
    """

    bias: nn.Parameter | None

    def __init__(self, replaced: FrozenLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        # A copy: a plain weight in fp32 would be trained itself.
        weight = replaced.weight.dequantize(torch.float32).clone()
        self.weight = nn.Parameter(weight)
        bias = replaced.bias
        self.bias = None if bias is None else nn.Parameter(bias.float().clone())
        # In a tuple: its packed weight is no part of this module.
        self._replaced = (replaced,)

    @property
    def replaced(self) -> FrozenLinear:
        """The frozen layer that was here."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K), computed in fp32, in the dtype of x."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

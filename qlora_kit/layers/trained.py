"""A linear layer that is trained whole, such as a classifier's head: y = x Wᵀ + b.

It is for layers whose weights the base does not have, or for which LoRA is not enough. It needs a
gradient as large as W, and optimiser state for all of W, so only small layers are trained whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head_terms import WholeTerm, whole_head


class TrainedLinear(nn.Module):
    """A linear layer with fp32 weights and a gradient, in place of a frozen layer.

    Args:
        replaced: the frozen layer; its unpacked weights are the first values, and it is kept so
            that it can be put back.
    """

    bias: nn.Parameter | None

    def __init__(self, replaced: FrozenLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        # A copy, because a plain weight in fp32 is returned as it is, and would itself be trained.
        weight = replaced.weight.dequantize(torch.float32).clone()
        self.weight = nn.Parameter(weight)
        bias = replaced.bias
        self.bias = None if bias is None else nn.Parameter(bias.float().clone())
        # A tuple keeps it from being a child: its packed weight is no part of this module.
        self._replaced = (replaced,)

    @property
    def replaced(self) -> FrozenLinear:
        """The frozen layer that this layer replaced."""
        return self._replaced[0]

    def head_parts(self) -> tuple[FrozenLinear, WholeTerm]:
        """See `TrainedHead`: where the layer is a head, of which the loss knows the formula."""
        return whole_head(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K): computed in fp32, returned in the dtype of x."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

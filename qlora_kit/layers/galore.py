"""A large linear layer that is trained whole by gradients of low rank: y = x Wᵀ + b.

W is fp32, and is multiplied in the dtype of x, as the frozen layers around it are. So on a GPU a
layer of this kind is as fast as a frozen one of 16 bits. `train.galore` moves W.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qlora_kit.layers.trained import TrainedLinear


class GaLoreLinear(TrainedLinear):
    """A trained linear layer whose W (K, D) the optimiser moves in a subspace of its gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K), in the dtype of x; the gradient of W is fp32."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

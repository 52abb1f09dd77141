"""The frozen linear layer: y = x Wᵀ + b, with W stored packed.

Takes x and a `FrozenWeight`; returns y. One autograd function serves 4, 8 and 16 bits. It saves no
tensor at all: a frozen weight has no gradient, so x is not needed, and backward unpacks the weight
again. So the recomputation of a layer stops before its last product, which backward does not need.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers.weight import FrozenWeight, PlainWeight
from qlora_kit.layers.windows import Window, window_of


class TransposedLinear(nn.Linear):
    """A skeleton's linear layer whose checkpoint holds Wᵀ (D, K), such as GPT-2's `Conv1D`."""


class FrozenLinear(nn.Module):
    """A linear layer whose weight never changes. The weight is set after construction.

    Args:
        in_features: D.
        out_features: K.
        bias: whether a bias (K,) will be set too.
        is_transposed: whether the checkpoint holds Wᵀ (D, K). The layer itself holds W (K, D).
        window: the window that it moves over its input; None of a layer that is no convolution.
    """

    weight: FrozenWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        is_transposed: bool = False,
        window: Window | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.is_transposed = is_transposed
        self.window = window
        placeholder = torch.empty(out_features, device="meta") if bias else None
        self.register_buffer("bias", placeholder)
        self.bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear) -> FrozenLinear:
        """Return an empty frozen layer of the shape of `linear`."""
        return cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            is_transposed=isinstance(linear, TransposedLinear),
            window=window_of(linear),
        )

    @classmethod
    def holding(
        cls, weight: Tensor, bias: Tensor | None, window: Window | None = None
    ) -> FrozenLinear:
        """Return a frozen layer with an unquantised weight (K, D), a bias (K,) and a window."""
        layer = cls(weight.shape[1], weight.shape[0], bias=bias is not None, window=window)
        layer.weight, layer.bias = PlainWeight(weight), bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K) in the dtype of x; of a convolution (B, C, …) to (B, K, …)."""
        if self.window is None:
            return frozen_product(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.window.product(x, self.weight.unpacked(x.dtype), bias)

    def extra_repr(self) -> str:
        """Show shape and bits when the model is printed."""
        bits = self.weight.bits if "weight" in self._modules else "empty"
        return f"{self.in_features}, {self.out_features}, bits={bits}"


def frozen_product(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b (..., K) of x (..., D), differentiable in x; the graph keeps no tensor."""
    if not torch.is_grad_enabled():
        # A function of autograd costs as much as a small product, and answers are small products.
        return weight.product(x, bias)
    y: Tensor = _FrozenProduct.apply(x, bias, weight)
    return y


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        return weight.product(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.weight.product_back(grads[0]), None, None

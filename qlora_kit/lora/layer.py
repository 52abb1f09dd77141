"""The LoRA layer: y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ, with W frozen and packed.

One autograd function for 4, 8 and 16 bits. It saves x and the small h = dropout(x) Aᵀ; backward
asks W to be unpacked again, so no unpacked weight outlives its product.

Source: LoRA (arXiv:2106.09685), section 4.1; QLoRA (arXiv:2305.14314), equation 5; rsLoRA
(arXiv:2312.03732) for scaling = alpha / √rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.model.linear import FrozenLinear
from qlora_kit.model.quantize import FrozenWeight


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank term.

    A (R, D) starts Kaiming-uniform and B (K, R) at zero, so a fresh layer equals the frozen
    one. Both are fp32 (or wider, with a wider input); their product is cast once, when it is
    added to the frozen product.

    Args:
        frozen: the layer it wraps.
        rank: R.
        scaling: factor of the low-rank term.
        dropout: probability that an input of A is zeroed in training.
        generator: draws A; the global one if None.
    """

    def __init__(
        self,
        frozen: FrozenLinear,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.rank = rank
        self.scaling = scaling
        self.dropout = dropout
        device = frozen.weight.device
        # Drawn on the CPU: the same seed gives the same A on every device.
        a = torch.empty(rank, frozen.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K) in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        kept = self._draw_kept(rows)
        y: Tensor = _LoRAMatmul.apply(
            rows,
            self.lora_A,
            self.lora_B,
            kept,
            self.frozen.bias,
            self.frozen.weight,
            self.scaling,
            1.0 if kept is None else 1 - self.dropout,
        )
        return y.view(*x.shape[:-1], -1)

    def _draw_kept(self, rows: Tensor) -> Tensor | None:
        """Draw which inputs of A are kept: bool (N, D), or None without dropout."""
        if not self.training or self.dropout == 0:
            return None
        return torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - self.dropout)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return what the low-rank term adds to the weight: scaling · B A, (K, D), fp32."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """Show rank and scaling when the model is printed."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class _LoRAMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        kept: Tensor | None,
        bias: Tensor | None,
        weight: FrozenWeight,
        scaling: float,
        keep_probability: float,
    ) -> Tensor:
        ctx.weight, ctx.scaling, ctx.keep_probability = weight, scaling, keep_probability
        h = _masked(x, kept).to(a.dtype) @ a.T / keep_probability
        y = F.linear(x, weight.dequantize(x.dtype), _cast(bias, x.dtype))
        _add_product(y, h, b.T, scaling)
        ctx.save_for_backward(x, a, b, kept, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, a, b, kept, h = ctx.saved_tensors
        grad_y_wide = grad_y.to(a.dtype)
        grad_h = (grad_y_wide @ b).mul_(ctx.scaling)
        grad_b = (grad_y_wide.T @ h).mul_(ctx.scaling)
        del grad_y_wide
        grad_h /= ctx.keep_probability
        grad_a = grad_h.T @ _masked(x, kept).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.weight.dequantize(grad_y.dtype)
            if kept is None:
                _add_product(grad_x, grad_h, a, 1.0)
            else:
                grad_x += _masked(grad_h @ a, kept)
        return (grad_x, grad_a, grad_b, *(None for _ in range(5)))


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    # Exact in any dtype; the division by the probability is left to the small products.
    return x if kept is None else x * kept


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _add_product(y: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Add factor · left right to y in place, in the wider dtype, rounded once."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=factor)
    else:
        y.add_(left @ right, alpha=factor)

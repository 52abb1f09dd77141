"""DoRA: LoRA turns each row of a weight, and the length of the row is trained apart from it.

    y = (m / ‖W + scaling · B A‖) ∘ (x Wᵀ + scaling · x Aᵀ Bᵀ) + b

The norm is that of each row of the matrix, one an output, and backward takes it for a constant. m
starts at the norms of the frozen W. So a fresh layer computes the same as the frozen layer, bit for
bit. The norms are measured once after each change of A and B, not in every call.

With dropout d, as PEFT has it: y = x Wᵀ + b + (c - 1) ∘ d(x) Wᵀ + c ∘ scaling · d(x) Aᵀ Bᵀ, where
c = m / ‖W + scaling · B A‖. That is a second product with W.

Shapes: N tokens, D in, K out, R rank.

Source: DoRA (arXiv:2402.09353), equation 5, and section 4.3 for the constant norm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear, frozen_product
from qlora_kit.layers.lora import LoRALinear, products_of
from qlora_kit.layers.weight import FrozenWeight, gathered
from qlora_kit.private_torch import version_of

# A weight is measured in so many parts: the fp32 copy of one is small beside the unpacked weight.
_PARTS = 8


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ‖W + scaling · B A‖ of each row, (K,), fp32.

    Args:
        weight: W (K, D), in any dtype.
        a: A (R, D), fp32.
        b: B (K, R), fp32.
        scaling: factor of B A.
    """
    norms = b.new_empty(len(weight))
    each = math.ceil(len(weight) / _PARTS)
    for start in range(0, len(weight), each):
        rows = slice(start, start + each)
        turned = torch.addmm(weight[rows].to(a.dtype), b[rows], a, alpha=scaling)
        norms[rows] = torch.linalg.vector_norm(turned, dim=1)
    # A row of zeros has no direction: its gain is 0, and not 0 / 0.
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


class DoRALinear(LoRALinear):
    """A LoRA layer that also trains m (K,), the lengths of the rows of its weight; see above.

    Args:
        frozen: the layer that this layer wraps.
        dtype: the dtype that its weight is unpacked to, to be measured: that of the products.
        options: the others of `LoRALinear`.
    """

    is_sum = False

    def __init__(self, frozen: FrozenLinear, *, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(frozen, **options)
        self._dtype = dtype
        self._measured: tuple[FrozenWeight, tuple[int, ...], Tensor] | None = None
        self.lora_magnitude_vector = nn.Parameter(self._norms().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K) in the dtype of x."""
        gain = self.lora_magnitude_vector / self._norms()
        if self.drops_out:
            return self._with_dropout(x, gain)
        (z,) = products_of(x, (self,))
        return rescaled(z, gain, self.frozen.bias)

    def _with_dropout(self, x: Tensor, gain: Tensor) -> Tensor:
        kept = self.draw_kept(x)
        assert kept is not None
        dropped = x * kept.view(x.shape) / (1 - self.dropout)
        a, b = self.matrices()
        term = self.scaling * F.linear(F.linear(dropped.to(a.dtype), a), b)
        turned = (gain - 1) * frozen_product(dropped, self.frozen.weight) + gain * term
        y: Tensor = self.frozen(x) + turned.to(x.dtype)
        return y

    def _norms(self) -> Tensor:
        """Return ‖W + scaling · B A‖ of each row as A and B are now, (K,)."""
        weight = self.frozen.weight
        versions = tuple(map(version_of, self.made_of()))
        if self._measured is None or self._measured[:2] != (weight, versions):
            with gathered(self.frozen), torch.no_grad():
                norms = row_norms(weight.unpacked(self._dtype), *self.matrices(), self.scaling)
            self._measured = weight, versions, norms
        return self._measured[2]

    def trained(self) -> dict[str, nn.Parameter]:
        """See `LoRALinear`."""
        return {**super().trained(), "lora_magnitude_vector": self.lora_magnitude_vector}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """See `LoRALinear`."""
        turned = super().merged_weight()
        return turned.mul_((self.lora_magnitude_vector / self._norms()).unsqueeze(1))


def rescaled(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return c ∘ (z - b) + b: a product z (..., K), which has its bias b (K,), scaled by c (K,)."""
    y: Tensor = _Rescaled.apply(z, gain, bias)
    return y


class _Rescaled(torch.autograd.Function):
    # z = x Wᵀ + b + … is a product that has its bias already:
    #   y = c ∘ (z - b) + b = c ∘ z + (b - c ∘ b)         where c = 1, that is z bit for bit
    #   dz = c ∘ dy                                       dc = Σ dy ∘ (z - b) over the tokens

    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, gain, bias)
        # Computed in fp32 and rounded once, without a copy of z in fp32.
        y = torch.empty_like(z)
        if bias is None:
            return torch.mul(z, gain, out=y)
        return torch.addcmul(bias.float() * (1 - gain), z, gain, out=y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        z, gain, bias = ctx.saved_tensors
        grad_z = torch.mul(grad_y, gain, out=torch.empty_like(grad_y))
        grad_gain = _summed(grad_y * z)
        if bias is not None:
            grad_gain -= bias.float() * _summed(grad_y)
        return grad_z, grad_gain, None


def _summed(values: Tensor) -> Tensor:
    """Return the sum over all tokens (K,) of values (..., K), in fp32."""
    return values.flatten(0, -2).sum(0, dtype=torch.float32)

"""The LoRA layer that multiplies by its merged weight, packed again: y = x Ŵᵀ + b.

    Ŵ = Q(W + scaling · B A)

W is the frozen weight, unpacked; Q packs as W is packed. So the codes that an export packs again
are those that were trained. Backward takes Q for the identity (the straight-through estimator): A
and B get the gradients of plain LoRA, and x gets dy Ŵ. Ŵ is packed, and is renewed when A or B have
changed; no dense gradient and no unpacked weight is kept.

Shapes: K out, D in, R rank.

Source: the straight-through estimator (arXiv:1308.3432), section 4; LoRA (arXiv:2106.09685),
section 4.1; QLoRA (arXiv:2305.14314), section 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_kit.errors import ModelError
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.layers.low_rank import LowRank, SplitLowRank
from qlora_kit.layers.purpose import MERGED, UNPACKED, announce, purpose
from qlora_kit.layers.quantize import Quantization
from qlora_kit.layers.weight import BLOCK_SIZE, FrozenWeight


class _InWeight:
    """A term that the weight holds already: it has gradients, and adds nothing."""

    def add_to(self, y: Tensor, h: Tensor, layer: int = 0) -> None:
        """Leave y as it is."""

    def add_input_gradient(self, grad_x: Tensor, grad_inner: Tensor) -> None:
        """Leave the gradient of x as it is."""


class _MergedTerm(_InWeight, LowRank):
    pass


class _SplitMergedTerm(_InWeight, SplitLowRank):
    pass


class MergeAwareLinear(LoRALinear):
    """A LoRA layer that multiplies by its merged weight, packed as the frozen weight is.

    Whoever changes A or B calls `renew` before the next product.

    Args:
        frozen: the layer that this layer wraps, in 4 or 8 bits.
        quantization: how its weight is packed.
        sizes: the other arguments of `LoRALinear`; there is no dropout.

    Raises:
        ModelError: the weight is packed in blocks of another size than the kit packs.
    """

    def __init__(self, frozen: FrozenLinear, *, quantization: Quantization, **sizes: Any) -> None:
        super().__init__(frozen, **sizes)
        size = getattr(frozen.weight, "block_size", BLOCK_SIZE)
        if size != BLOCK_SIZE:
            raise ModelError(
                f"--merge-aware: the base is packed in blocks of {size}; expected {BLOCK_SIZE}; "
                "train on the unquantised model"
            )
        self._quantization = quantization
        like = FrozenLinear(
            frozen.in_features, frozen.out_features, bias=False, is_transposed=frozen.is_transposed
        )
        like.bias = frozen.bias
        # A tuple keeps it from being a child: it is no layer of the model, and nothing to save.
        self._merged = (like,)
        like.weight = self._packed()

    @property
    def multiplied(self) -> FrozenLinear:
        """The layer with the merged weight."""
        return self._merged[0]

    @property
    def merged(self) -> FrozenWeight:
        """The merged weight Ŵ, packed."""
        return self.multiplied.weight

    def as_trained(self, term: LowRank) -> LowRank:
        """Return the term of a call as one that the weight holds."""
        kind = _SplitMergedTerm if isinstance(term, SplitLowRank) else _MergedTerm
        return kind(term.a, term.b, term.kept, *term.factors)

    def renew(self) -> None:
        """Make the merged weight anew, of the frozen weight and of A and B as they are."""
        weight = self._packed()
        weight.keep_unpacked(self.merged.kept_dtype)
        for _, tensor in weight.stored():
            announce(tensor, MERGED)
        self.multiplied.weight = weight

    def _packed(self) -> FrozenWeight:
        return packed_sum(
            self.frozen.weight, self.lora_A, self.lora_B, self.scaling, self._quantization
        )


@torch.no_grad()
def packed_sum(
    frozen: FrozenWeight, a: Tensor, b: Tensor, scaling: float, quantization: Quantization
) -> FrozenWeight:
    """Return Ŵ = Q(W + scaling · B A), (K, D), on the device of W.

    Training and export both call this, so they have the same bits on the same kind of device.

    Args:
        frozen: W, packed.
        a: A (R, D), fp32.
        b: B (K, R), fp32.
        scaling: factor of the product.
        quantization: how W is packed, and Ŵ will be.
    """
    with purpose(UNPACKED):
        values = frozen.dequantize(torch.float32)
        return quantization.freeze(torch.addmm(values, b, a, alpha=scaling, out=values))


def hash_of_all(hashes: Mapping[str, str]) -> str:
    """Return the SHA-256 of the packed weights of many layers, given the hash of each by path."""
    lines = "\n".join(f"{path} {each}" for path, each in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_of_codes(weight: FrozenWeight) -> str:
    """Return the SHA-256 of a packed weight: of its codes, its absmax and their second level."""
    found = hashlib.sha256()
    for _, tensor in sorted(weight.stored(), key=lambda part: part[0]):
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()

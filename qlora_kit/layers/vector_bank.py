"""VB-LoRA: A and B are composed of a few vectors, which all layers share.

A row of A, and a column of B, is cut into parts as long as a vector. Each part is a mixture of the
`TOP` vectors whose logits are highest, by the softmax of these logits. The vectors and the logits
are trained.

Neither A nor B starts at zero: the paper starts at small vectors instead, so a fresh layer computes
nearly the same as the frozen layer. The paper trains logits ten times as fast as vectors. An
optimiser moves every number alike, so the logits are kept in units of ten.

Shapes: D in, K out, R rank, V vectors of length L.

Source: VB-LoRA (arXiv:2405.15179), section 3.2 and appendix A.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import LoRALinear

TOP = 2
"""vectors that a part is mixed of"""
_UNIT = 10.0
# Of PEFT and the paper.
_LARGEST_START = 0.02
_LOGIT_SPREAD = 0.1


def new_bank(
    count: int, length: int, device: torch.device, generator: torch.Generator | None
) -> nn.Parameter:
    """Return V vectors of length L, drawn on the CPU: (V, L), fp32."""
    drawn = torch.empty(count, length).uniform_(
        -_LARGEST_START, _LARGEST_START, generator=generator
    )
    return nn.Parameter(drawn.to(device))


def mixed(logits: Tensor, bank: Tensor, top: int = TOP) -> Tensor:
    """Return the mixture of vectors of each part, (..., L).

    Args:
        logits: (..., V), of which the `top` highest count.
        bank: (V, L).
        top: number of vectors of a mixture.
    """
    highest, which = logits.topk(top, dim=-1)
    # Most weights are zero. The product is small all the same, and keeps no copy of the vectors.
    weights = torch.zeros_like(logits).scatter(-1, which, highest.softmax(-1))
    return weights @ bank


def composed(
    logits_a: Tensor, logits_b: Tensor, bank: Tensor, top: int = TOP
) -> tuple[Tensor, Tensor]:
    """Return A (R, D) and B (K, R).

    Args:
        logits_a: (R, D / L, V).
        logits_b: (K / L, R, V).
        bank: (V, L).
        top: number of vectors of a mixture.
    """
    a = mixed(logits_a, bank, top).flatten(1)
    b = mixed(logits_b, bank, top).transpose(1, 2).flatten(0, 1)
    return a, b


class VectorBankLinear(LoRALinear):
    """A LoRA layer whose A and B are composed of shared vectors; its scaling is 1.

    Args:
        frozen: the layer that this layer wraps.
        bank: the vectors (V, L), which all layers share; L divides D and K.
        options: the others of `LoRALinear`.

    Attributes:
        logits_a, logits_b: see `composed`, in units of ten.
    """

    def __init__(
        self,
        frozen: FrozenLinear,
        *,
        bank: nn.Parameter,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(frozen, **options)
        vectors, length = bank.shape
        parts_in, parts_out = frozen.in_features // length, frozen.out_features // length
        self.vector_bank = bank
        self.logits_a = _new_logits((self.rank, parts_in, vectors), bank.device, generator)
        self.logits_b = _new_logits((parts_out, self.rank, vectors), bank.device, generator)

    def _draw(self, generator: torch.Generator | None) -> None:
        """Make nothing: there is no A and no B besides the composed ones."""

    def matrices(self) -> tuple[Tensor, Tensor]:
        """See `LoRALinear`."""
        return composed(_UNIT * self.logits_a, _UNIT * self.logits_b, self.vector_bank)

    @torch.no_grad()
    def filed(self) -> tuple[Tensor, Tensor]:
        """See `LoRALinear`."""
        return self.matrices()

    @torch.no_grad()
    def logits(self) -> tuple[Tensor, Tensor]:
        """Return the logits themselves, as `composed` takes them."""
        return _UNIT * self.logits_a, _UNIT * self.logits_b

    def trained(self) -> dict[str, nn.Parameter]:
        """See `LoRALinear`."""
        names = ("logits_a", "logits_b", "vector_bank")
        return {name: getattr(self, name) for name in names}

    def made_of(self) -> tuple[Tensor, ...]:
        """See `LoRALinear`."""
        return self.logits_a, self.logits_b, self.vector_bank

    @property
    def kind(self) -> tuple[object, ...]:
        """See `LoRALinear`."""
        return self.logits_a.shape, self.logits_a.dtype, self.scaling

    @property
    def first_moved(self) -> nn.Parameter:
        """See `LoRALinear`."""
        return self.logits_b


def _new_logits(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> nn.Parameter:
    drawn = torch.empty(shape).normal_(0, _LOGIT_SPREAD / _UNIT, generator=generator)
    return nn.Parameter(drawn.to(device))

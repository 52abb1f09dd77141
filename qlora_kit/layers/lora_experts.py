"""LoRA on the experts of a mixture: a stack of frozen layers, each with a low-rank term of its own.

    y = x W_eᵀ + b_e + scaling · x A_eᵀ B_eᵀ                  for the tokens that chose expert e

A and B of all experts are one parameter each, so an expert that no token chose has a gradient of
zeros: the optimiser treats it as it treats the others, and as PEFT's does. The product of an expert
is that of a `LoRALinear`. Dropout is left out, because PEFT has none on stacked weights.

Shapes: N tokens, E experts, D in, K out, R rank. Gate and up of an expert are one layer with one
term, as they are one weight.

Source: LoRA (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora_kit.layers.experts import Stack
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.lora import as_served, products_with_term
from qlora_kit.layers.low_rank import LowRank


class LoRAStack(Stack):
    """The frozen layers of a stack, with trained low-rank terms; the layers keep their paths.

    A (E, R, D) starts Kaiming-uniform and B (E, K, R) at zero; both are fp32.

    Args:
        frozen: the stack that this stack takes the place of, its layers loaded.
        rank: R.
        scaling: factor of the low-rank terms.
        generator: draws A; None takes torch's global generator.
    """

    def __init__(
        self,
        frozen: Stack,
        *,
        rank: int,
        scaling: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__([*frozen], is_transposed=frozen.is_transposed)
        self.rank = rank
        self.scaling = scaling
        first = self.expert(0)
        # A is drawn on the CPU: the same seed gives the same A on every device.
        a = torch.empty(len(self) * rank, first.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(len(self), first.out_features, rank, device=first.weight.device)
        self.lora_A = nn.Parameter(a.view(len(self), rank, -1).to(first.weight.device))
        self.lora_B = nn.Parameter(b)

    def expert(self, number: int) -> FrozenLinear:
        """Return the frozen layer of an expert."""
        layer = self[number]
        assert isinstance(layer, FrozenLinear), "LoRA is attached to a loaded base"
        return layer

    def without_terms(self) -> Stack:
        """Return the stack of the same layers without their terms."""
        return Stack([*self], is_transposed=self.is_transposed)

    def trained(self) -> tuple[Tensor, ...]:
        """Return A (E, R, D) and B (E, K, R)."""
        return self.lora_A, self.lora_B

    def product(self, number: int, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Map the rows x (n, D) of an expert to (n, K); see `Stack`."""
        a, b = matrices
        with torch.no_grad():
            term = as_served(LowRank((a,), (b,), scaling=self.scaling), x)
        (y,) = products_with_term(x, [self.expert(number)], term, matrices)
        return y

    @torch.no_grad()
    def delta(self, number: int) -> Tensor:
        """Return the matrix that an expert's term adds to its W: scaling · B A, (K, D), fp32."""
        return self.scaling * (self.lora_B[number] @ self.lora_A[number])

"""LoRA with a learned scale: y = x Wᵀ + b + g · x Aᵀ Bᵀ, where the number g is trained too.

g starts at the scaling of the layer. It is the factor s of the scaled addition in "Towards a
Unified View of Parameter-Efficient Transfer Learning" (arXiv:2110.04366), which is chosen by hand
there. Here each layer learns its own. A file needs no g: it is folded into B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_kit.layers.lora import LoRALinear


class LearnedScaleLinear(LoRALinear):
    """A LoRA layer whose scaling is trained; A, B and g multiply as A and g · B.

    Attributes:
        lora_scale: g, (1,), fp32.
    """

    def _draw(self, generator: torch.Generator | None) -> None:
        super()._draw(generator)
        self._first_scale, self.scaling = self.scaling, 1.0
        self.lora_scale = nn.Parameter(torch.full_like(self.lora_B[0, :1], self._first_scale))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """See `LoRALinear`."""
        return self.lora_A, self.lora_scale * self.lora_B

    def filed(self) -> tuple[Tensor, Tensor]:
        """See `LoRALinear`."""
        ratio = self.lora_scale.detach() / self._first_scale
        return self.lora_A.detach(), ratio * self.lora_B.detach()

    def trained(self) -> dict[str, nn.Parameter]:
        """See `LoRALinear`."""
        return {**super().trained(), "lora_scale": self.lora_scale}

    def made_of(self) -> tuple[Tensor, ...]:
        """See `LoRALinear`."""
        return *super().made_of(), self.lora_scale

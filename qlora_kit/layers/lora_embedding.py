"""LoRA on the input embedding: y = E[ids] + scaling · B[ids] A, with the table E frozen.

PEFT's names are turned: its lora_embedding_A (R, V) is B transposed here, and its lora_embedding_B
(D, R) is A transposed. So the rows that are looked up lie together, scaling · B A has the shape of
the table, and B starts at zero as that of every layer. `lora.vocabulary` turns them for files.

Shapes: V vocabulary, D hidden size, R rank.

Source: LoRA (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAEmbedding(nn.Module):
    """A frozen embedding with a trained low-rank term.

    A (R, D) starts normal and B (V, R) at zero, as in PEFT, so a fresh layer looks up the same rows
    as the frozen one. The row of a padding token gets no gradient, as in torch.

    Args:
        frozen: the table that this layer wraps, wherever it is; its hooks bring its rows to
            `device`.
        rank: R.
        scaling: factor of the low-rank term.
        device: the device that the layers compute on.
        generator: draws A; None takes torch's global generator.
    """

    def __init__(
        self,
        frozen: nn.Embedding,
        *,
        rank: int,
        scaling: float,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.rank = rank
        self.scaling = scaling
        # Drawn on the CPU: the same seed gives the same A on every device.
        a = torch.empty(rank, frozen.embedding_dim).normal_(generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.num_embeddings, rank, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, T) to (B, T, D), in the dtype of the layers."""
        rows: Tensor = self.frozen(ids)
        inner = F.embedding(ids.to(self.lora_B.device), self.lora_B, self.frozen.padding_idx)
        return (rows + self.factor * (inner @ self.lora_A)).to(rows.dtype)

    @property
    def factor(self) -> float:
        """The scaling, times the factor that some models (Gemma 3) give the rows of their table."""
        return self.scaling * scale_of(self.frozen)

    @property
    def weight(self) -> Tensor:
        """The frozen table (V, D), for callers that ask an embedding for its size or dtype."""
        return self.frozen.weight

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the matrix that the term adds to the table: scaling · B A, (V, D), fp32."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """Show rank and scaling when the model is printed."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


def scale_of(table: Any) -> float:
    """Return the factor by which an embedding multiplies the rows of its table: 1 of most."""
    # Gemma's holds it as a buffer as well, of which a simulation knows no value.
    return float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))

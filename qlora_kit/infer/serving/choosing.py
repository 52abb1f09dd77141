"""The next token of each row, by the settings of its own request.

Takes logits; returns ids. What a row gets does not depend on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_kit.infer.generate import Sampling


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        sampling: temperature, share of the probability, and seed.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def sampled(self, logits: Tensor) -> int:
        """Draw a token.

        Args:
            logits: (V,), fp32, on the CPU.
        """
        # Shifted first: a tiny temperature would take the logits themselves beyond all numbers.
        shifted = (logits.double() - logits.max()) / self.sampling.temperature
        probabilities = torch.softmax(shifted, dim=-1)
        if self.sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            # The most likely tokens that together reach the share, the one that passes it included.
            kept = ordered.cumsum(-1) - ordered < self.sampling.top_p
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered * kept)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def next_tokens(logits: Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """Return the next token of each row; None where its logits are no numbers.

    Args:
        logits: (B, V).
        choosers: one for each row.
    """
    logits = logits.float()
    found: list[int | None] = list(logits.argmax(dim=-1).tolist())
    # The largest of a row with NaN is NaN; infinities below it only mask tokens.
    usable = logits.amax(dim=-1).isfinite().tolist()
    for row, chooser in enumerate(choosers):
        if not usable[row]:
            found[row] = None
        elif chooser.sampling.temperature > 0:
            found[row] = chooser.sampled(logits[row].cpu())
    return found

"""What a head in fewer bits does to the loss of a model.

Takes a loaded base whose head is as stored, and token rows; measures both heads on them and
leaves the base as it was. The one reducer that is not exact need so never be used unmeasured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from qlora_kit.infer.evaluate import evaluate
from qlora_kit.layers.head import quantize_head
from qlora_kit.model.load import Base


@dataclass(frozen=True)
class HeadLoss:
    """The loss of the same rows through both heads, nats per supervised token.

    Attributes:
        bits: of the quantised head.
        stored: with the head as stored.
        quantised: with the quantised one.
        stored_bytes: that the head as stored takes.
        quantised_bytes: that the quantised one takes.
    """

    bits: int
    stored: float
    quantised: float
    stored_bytes: int
    quantised_bytes: int

    @property
    def change(self) -> float:
        """What quantising adds to the loss."""
        return self.quantised - self.stored


@torch.no_grad()
def measure_head(
    base: Base, rows: Sequence[dict[str, Any]], bits: Literal[4, 8], **options: Any
) -> HeadLoss:
    """Measure the rows with the head as stored and with one in `bits`.

    Args:
        base: with the adapter it may carry.
        rows: token rows, as for `evaluate`.
        bits: of the quantised head.
        options: of `evaluate`, such as `batch_size` and `pad_token_id`.
    """
    model: Any = base.model
    stored = model.get_output_embeddings()
    head = quantize_head(stored, replace(base.quantization, bits=bits), base.hardware.device)
    before = evaluate(base, rows, **options).loss
    model.set_output_embeddings(head)
    try:
        after = evaluate(base, rows, **options).loss
    finally:
        model.set_output_embeddings(stored)
    return HeadLoss(bits, before, after, stored.weight.stored_bytes, head.weight.stored_bytes)

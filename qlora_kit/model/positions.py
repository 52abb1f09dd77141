"""How many tokens of a row a model has positions for.

Takes an architecture; returns numbers. Never reads weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Models whose first position is the one behind the number of their padding token.
_COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm")


def positions_of(architecture: PreTrainedConfig) -> int | None:
    """Return how many tokens of a row a model has positions for; None if it does not say."""
    text = architecture.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and text.model_type in _COUNTED_FROM_PADDING:
        return int(positions) - (text.pad_token_id or 0) - 1
    return positions

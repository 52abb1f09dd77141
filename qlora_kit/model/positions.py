"""How many tokens of a row a model has positions for, and how it is given more.

Takes an architecture; returns numbers, and a line for its config.json. Never reads weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Models whose first position is the one behind the number of their padding token.
_COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm")
# Scalings that multiply the positions a model was trained with. In configurations of others, llama3
# and longrope, `max_position_embeddings` is what they reach. The frequencies of dynamic scaling
# depend on the longest row that the model has seen before, so it is not relied on in training.
_MULTIPLIES = ("linear", "yarn")
# Scalings of which the frequencies depend on the longest row of a batch.
_CHANGE_WITH_LENGTH = ("dynamic", "longrope")
_KEPT = ("rope_theta", "partial_rotary_factor")


def positions_of(architecture: PreTrainedConfig) -> int | None:
    """Return how many tokens of a row a model has positions for; None if it does not say.

    Rotary scaling by a factor counts: it multiplies the positions that the model had before.
    """
    text = architecture.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    if text.model_type in _COUNTED_FROM_PADDING:
        return int(positions) - (text.pad_token_id or 0) - 1
    rope = _rotary(text)
    if rope.get("rope_type") not in _MULTIPLIES or not rope.get("factor"):
        return int(positions)
    return max(int(positions), int(rope["factor"] * _unscaled(text)))


def scaling_for(architecture: PreTrainedConfig, tokens: int) -> str | None:
    """Return the rotary scaling that gives a model positions for rows of `tokens`, as JSON.

    Returns:
        An entry of config.json; None where the model's positions are not rotary, or are scaled
        for each kind of layer by itself.
    """
    text = architecture.get_text_config()
    if not _rotary(text).get("rope_type"):
        return None
    unscaled = _unscaled(text)
    # The entry takes the place of all that the file says of rotary positions, so it repeats these.
    kept = {name: value for name, value in _rotary(text).items() if name in _KEPT}
    scaling = {
        "rope_type": "yarn",
        "factor": float(math.ceil(tokens / unscaled)),
        "original_max_position_embeddings": unscaled,
        **kept,
    }
    return f'"rope_scaling": {json.dumps(scaling)}'


def _rotary(text: PreTrainedConfig) -> Mapping[str, Any]:
    return getattr(text, "rope_parameters", None) or {}


def _unscaled(text: PreTrainedConfig) -> int:
    """Return the positions that a rotary model had before they were scaled."""
    return int(
        _rotary(text).get("original_max_position_embeddings") or text.max_position_embeddings
    )


def alike_positions(architecture: PreTrainedConfig, positions: int | None) -> int | None:
    """Return up to how many tokens a row has the same rotary positions beside a longer one.

    Some scalings give all rows of a batch other frequencies once one of them is longer than what
    the model was trained with before.

    Args:
        architecture: the model.
        positions: tokens that it has positions for, see `positions_of`.
    """
    text = architecture.get_text_config()
    if _rotary(text).get("rope_type") not in _CHANGE_WITH_LENGTH or positions is None:
        return positions
    return min(positions, _unscaled(text))

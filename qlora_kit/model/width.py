"""How many tokens wide a batch is, for the length of its longest row.

A CPU computes what is there. A GPU computes in few widths: its kernels are chosen, and some of
them built, for each new shape.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

# cuDNN's attention, which torch prefers on Hopper, builds a plan for every new (B, T), and others
# report half a second each, forward and backward. With multiples of 64 an epoch of rows of up to
# 2,048 tokens has 32 widths at most; half of 64 tokens a batch is what that costs.
_MULTIPLE = 64


def batch_width(tokens: int, architecture: PreTrainedConfig, device: torch.device) -> int:
    """Return T of a batch whose longest row has so many tokens.

    Never so large that the model would compute anything differently for the longer batch.

    Args:
        tokens: of the longest row.
        architecture: of the model.
        device: where it runs; `meta` stands in for a GPU.
    """
    if device.type == "cpu":
        return tokens
    multiple = -(-tokens // _MULTIPLE) * _MULTIPLE
    bounds = [bound for bound in _bounds(architecture) if bound >= tokens]
    return min([multiple, *bounds])


def _bounds(architecture: PreTrainedConfig) -> Iterator[int]:
    """Yield the largest lengths before a model computes something else."""
    text = architecture.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    # Behind its positions a model knows none, or scales its frequencies; behind the original ones
    # some take other frequencies; from its window on attention needs a mask.
    lengths = (
        getattr(text, "max_position_embeddings", None),
        getattr(text, "original_max_position_embeddings", None),
        rope.get("original_max_position_embeddings"),
        (getattr(text, "sliding_window", None) or 0) - 1,
    )
    yield from (length for length in lengths if length is not None)

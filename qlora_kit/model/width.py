"""The width of a batch in tokens, for the length of its longest row.

On a CPU a batch is as wide as its longest row. On a GPU the width is rounded up, so that there are
few widths: kernels are chosen, and some of them built, for each new shape.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

# cuDNN's attention, which torch prefers on Hopper, builds a plan for every new (B, T); others
# report half a second for each, forward and backward. With multiples of 64, an epoch of rows of up
# to 2,048 tokens has at most 32 widths. The price is half of 64 tokens a batch, on average.
_MULTIPLE = 64


def batch_width(tokens: int, architecture: PreTrainedConfig, device: torch.device) -> int:
    """Return the width T of a batch, given its longest row.

    T is never so large that the model would compute anything differently for the wider batch.

    Args:
        tokens: tokens of the longest row.
        architecture: the architecture of the model.
        device: the device that it runs on; `meta` stands in for a GPU.
    """
    if device.type == "cpu":
        return tokens
    multiple = -(-tokens // _MULTIPLE) * _MULTIPLE
    bounds = [bound for bound in _bounds(architecture) if bound >= tokens]
    return min([multiple, *bounds])


def _bounds(architecture: PreTrainedConfig) -> Iterator[int]:
    """Yield the lengths beyond which a model computes something else."""
    text = architecture.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    # Beyond its positions a model has no more of them, or scales its frequencies. Beyond the
    # original positions some models use other frequencies. From its window on, attention needs a
    # mask.
    lengths = (
        getattr(text, "max_position_embeddings", None),
        getattr(text, "original_max_position_embeddings", None),
        rope.get("original_max_position_embeddings"),
        (getattr(text, "sliding_window", None) or 0) - 1,
    )
    yield from (length for length in lengths if length is not None)

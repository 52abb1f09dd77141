"""Attention among the tokens of one sample each, in a row that holds several samples.

Takes queries, keys and values of a packed row, and the lengths of its segments; computes each
segment by the model's own attention, as if it were alone. So no matrix of T × T exists, and no
sample sees another.

Shapes: T tokens of the row, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

Segments: TypeAlias = tuple[int, ...]
"""Tokens of each segment of a row, one after the other; together they are all T."""

Attention: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
"""Attention as transformers calls it: (module, query, key, value, mask, **options)."""

ARGUMENT = "segments_of_row"
"""The name under which a model passes the segments on to its attention."""


def slices_of(segments: Segments) -> Iterator[slice]:
    """Yield the place of each segment in its row."""
    for end, length in zip(accumulate(segments), segments, strict=True):
        yield slice(end - length, end)


def positions_within(segments: Segments) -> Tensor:
    """Return the position of each token in its segment, (1, T) int64."""
    return torch.cat([torch.arange(length) for length in segments]).unsqueeze(0)


def by_segments(attention: Attention) -> Attention:
    """Return an attention that computes segment by segment where it is given segments."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        segments: Segments | None = options.pop(ARGUMENT, None)
        if segments is None:
            return attention(module, query, key, value, attention_mask, **options)
        window = options.get("sliding_window")
        outputs = [
            attention(
                module,
                *(part[:, :, tokens] for part in (query, key, value)),
                _window_mask(tokens.stop - tokens.start, window, query.device),
                **options,
            )[0]
            for tokens in slices_of(segments)
        ]
        return torch.cat(outputs, dim=1), None

    return attend


def _window_mask(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys each query sees, (1, 1, tokens, tokens) bool; None: all before it.

    Args:
        tokens: tokens of the segment.
        window: a query sees so many keys, its own among them; None: it sees all before it.
        device: the device of the mask.
    """
    if window is None or tokens <= window:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril_()
    return seen.triu_(1 - window).view(1, 1, tokens, tokens)

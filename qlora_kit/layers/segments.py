"""Attention among the tokens of one sample each, in a row that holds several samples.

Takes queries, keys and values of a packed row, and its segments. One kernel of a GPU computes all
of them; elsewhere each segment is computed by the model's own attention, as if it were alone. So no
matrix of T × T exists, and no sample sees another.

Shapes: T tokens of the row, N segments, H heads, d width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

if TYPE_CHECKING:
    from qlora_kit.private_transformers import Attention

ARGUMENT = "segments_of_row"
"""The name under which a model passes the segments on to its attention."""

# What the flash kernels of torch compute (FlashAttention-2, arXiv:2307.08691).
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_WIDTH, _FLASH_WIDTHS_BY = 256, 8
_FLASH_CAPABILITY = (8, 0)
# Whether torch wants to be told of grouped heads; 2.11 takes them without.
_ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


@dataclass(frozen=True)
class Segments:
    """The segments of a row.

    Attributes:
        lengths: tokens of each, one after the other; together they are all T.
        bounds: where each begins, and T: (N + 1,) int32, on the device of the row.
    """

    lengths: tuple[int, ...]
    bounds: Tensor

    @staticmethod
    def of(lengths: tuple[int, ...], device: torch.device) -> Segments:
        """Return the segments of these lengths for a row on a device."""
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        return Segments(lengths, bounds.to(device, non_blocking=True))


def slices_of(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield the place of each segment in its row."""
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        yield slice(end - length, end)


def positions_within(lengths: Sequence[int]) -> Tensor:
    """Return the position of each token in its segment, (1, T) int64."""
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


def by_segments(attention: Attention, *, needs_masks: bool = False) -> Attention:
    """Return an attention that computes the segments by themselves where it is given any.

    Args:
        attention: torch's attention, or a formula of a model's own.
        needs_masks: whether it is such a formula, which lets a query see the keys after it unless
            a mask says otherwise.
    """

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
        if not needs_masks and _flash_computes(module, query, options):
            return _attend_all(query, key, value, segments, options), None
        window = options.get("sliding_window")
        mask_of = _added_mask if needs_masks else _window_mask
        outputs = [
            attention(
                module,
                *(part[:, :, tokens] for part in (query, key, value)),
                mask_of(query[:, :, tokens], window),
                **options,
            )[0]
            for tokens in slices_of(segments.lengths)
        ]
        return torch.cat(outputs, dim=1), None

    return attend


def _flash_computes(module: Any, query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether one kernel computes all segments; `meta` stands in for a GPU that has it."""
    if query.is_cuda:
        has_kernel = torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    else:
        has_kernel = query.is_meta
    width = query.shape[-1]
    fits = width <= _FLASH_WIDTH and width % _FLASH_WIDTHS_BY == 0
    is_plain = not options.get("dropout") and getattr(module, "is_causal", True)
    return has_kernel and fits and is_plain and query.dtype in _FLASH_DTYPES


def _attend_all(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Mapping[str, Any]
) -> Tensor:
    """Compute all segments by one kernel.

    Args:
        query: (1, H, T, d).
        key: (1, key heads, T, d).
        value: likewise.
        segments: those of the row.
        options: the scale of the scores, and how many keys a query sees.

    Returns:
        (1, T, H, d).
    """
    window, longest = options.get("sliding_window"), max(segments.lengths)
    told: dict[str, Any] = {
        "scale": options.get("scaling"),
        "window_size": (-1 if window is None else window - 1, 0),
    }
    if query.shape[1] != key.shape[1] and _ASKS_FOR_GROUPS:
        told["enable_gqa"] = True
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    bounds = segments.bounds
    out = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, **told)
    assert isinstance(out, Tensor), "nothing but the output was asked for"
    return out.unsqueeze(0)


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Return which keys each query of a segment sees; None where that is all before it.

    Args:
        query: (1, H, tokens, d).
        window: a query sees so many keys, its own among them; None: it sees all before it.

    Returns:
        (1, 1, tokens, tokens) bool.
    """
    if window is None or query.shape[2] <= window:
        return None
    return _seen(query, window)


def _added_mask(query: Tensor, window: int | None) -> Tensor:
    """Return what is added to the scores of a segment so that a query sees no other key.

    Takes what `_window_mask` takes; returns (1, 1, tokens, tokens) in the dtype of the queries.
    """
    hidden = torch.finfo(query.dtype).min
    return query.new_zeros(()).masked_fill(~_seen(query, window), hidden)


def _seen(query: Tensor, window: int | None) -> Tensor:
    tokens = query.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril_()
    if window is not None:
        seen = seen.triu_(1 - window)
    return seen.view(1, 1, tokens, tokens)

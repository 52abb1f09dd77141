"""Attention among segments: the kernel of a GPU is asked for what the plain path computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor
from torch.nn.attention import varlen
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_kit.layers import segments
from qlora_kit.layers.segments import ARGUMENT, Segments, by_segments

LENGTHS = (5, 1, 9, 3)
CPU = torch.device("cpu")


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch's documentation of `varlen_attn` says, by one matrix with a mask."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    lengths = bounds.diff()
    assert torch.equal(bounds, key_bounds)
    assert longest == longest_keys == int(lengths.max())
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(len(segment))
    left, right = window_size
    ahead = place[None] - place[:, None]
    seen = (segment[:, None] == segment[None]) & (ahead <= right)
    if left >= 0:
        seen &= ahead >= -left
    groups = query.shape[1] // key.shape[1]
    keys, values = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def attend(inputs: list[Tensor], window: int | None) -> tuple[Tensor, list[Tensor]]:
    groups = inputs[0].shape[1] // inputs[1].shape[1]
    module: Any = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=groups)
    leaves = [each.clone().requires_grad_() for each in inputs]
    out, _ = by_segments(sdpa_attention_forward)(
        module, *leaves, None, scaling=0.3, sliding_window=window,
        **{ARGUMENT: Segments.of(LENGTHS, CPU)},
    )  # fmt: skip
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_one_kernel_computes_what_the_segments_alone_do(
    monkeypatch: pytest.MonkeyPatch, window: int | None, key_heads: int
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, key_heads, key_heads)]
    alone, grads_alone = attend(inputs, window)
    monkeypatch.setattr(segments, "_flash_computes", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", formula)
    together, grads = attend(inputs, window)
    assert relative_error(together, alone) <= 1e-5
    for grad, other in zip(grads, grads_alone, strict=True):
        assert relative_error(grad, other) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "width", "options", "expected"),
    [
        (torch.bfloat16, 64, {}, True),
        (torch.float16, 128, {"dropout": 0.0}, True),
        (torch.float32, 64, {}, False),
        (torch.bfloat16, 60, {}, False),
        (torch.bfloat16, 264, {}, False),
        (torch.bfloat16, 64, {"dropout": 0.1}, False),
    ],
)
def test_the_kernel_serves_what_it_computes(
    dtype: torch.dtype, width: int, options: dict[str, float], expected: bool
) -> None:
    module: Any = SimpleNamespace(is_causal=True)
    query = torch.empty(1, 4, 9, width, dtype=dtype, device="meta")
    assert segments._flash_computes(module, query, options) is expected
    assert not segments._flash_computes(module, torch.empty_like(query, device="cpu"), options)


def test_torchs_own_op_takes_what_it_is_given() -> None:
    """On the device that stands in for a GPU, forward and backward; its values need a GPU."""
    module: Any = SimpleNamespace(is_causal=True)
    query, key, value = (
        torch.empty(1, heads, 18, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads in (8, 2, 2)
    )
    out, _ = by_segments(sdpa_attention_forward)(
        module, query, key, value, None, scaling=0.3, sliding_window=4,
        **{ARGUMENT: Segments.of(LENGTHS, torch.device("meta"))},
    )  # fmt: skip
    assert (out.shape, out.dtype) == ((1, 18, 8, 16), torch.bfloat16)
    out.sum().backward()
    shapes = [each.grad.shape for each in (query, key, value) if each.grad is not None]
    assert shapes == [query.shape, key.shape, value.shape]

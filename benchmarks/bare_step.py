"""The work that no step can leave out, alone: its products, its attention, its unpacking.

A step that recomputes every layer multiplies by each frozen weight three times (forward,
recomputation, gradient of the input), by the last one of a layer twice, because recomputation stops
before it, and by the head twice. It computes attention twice and its gradient once, and unpacks a
weight for each product. Here the same calls are made on tensors of the same sizes, and nothing
else: no LoRA, norm, rotation, gate, loss or optimiser. So their time is a limit of every step that
uses these libraries, too high by the one gradient that the first layer does not need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import our_stack
from clocks import Clock, timed

Run = dict[str, Any]

_LAYER = re.compile(r".*?\.\d+\.")
# The head computes as many tokens at a time, which is faster than all at once.
_HEAD_TOKENS = 256


def bare_seconds(
    run: Run, rows: int, tokens: int, clock: Clock, *, recompute: bool = True, rounds: int = 3
) -> dict[str, float]:
    """Return the seconds of each part of a bare step, the best of some rounds.

    Args:
        run: `model`, `scaled`, `weights`, `bits` and `dtype`; see `speed_sides`.
        rows: rows of the batch.
        tokens: tokens of each row.
        clock: a clock for the device.
        recompute: whether the layers compute twice.
        rounds: number of times that each part is computed.
    """
    import torch

    skeleton = our_stack.spec_of(run).skeleton()
    text: Any = skeleton.config.get_text_config()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, run.get("dtype", "bfloat16"))

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=dtype)

    passes = 1 + int(recompute)
    linears = _linears_of(skeleton, passes)
    parts: dict[str, Callable[[], Iterator[Callable[[], Any]]]] = {
        "linear products": lambda: _linears(linears, rows * tokens, drawn),
        "head products": lambda: _head(text, rows * tokens, drawn),
        "attention": lambda: _attention(text, rows, tokens, passes, drawn),
        "unpacking": lambda: _unpacking(linears, run["bits"], drawn),
    }
    with torch.no_grad():
        # The tensors of a part are made for it, and go before the next one begins.
        return {name: _best(list(calls()), clock, rounds) for name, calls in parts.items()}


def _best(calls: list[Callable[[], Any]], clock: Clock, rounds: int) -> float:
    return min(timed(clock, lambda: _all(calls)) for _ in range(rounds))


def _all(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()


class _Linear(NamedTuple):
    """A frozen linear layer, and how often a step computes it forward."""

    outputs: int
    inputs: int
    forward: int


def _linears_of(skeleton: Any, passes: int) -> list[_Linear]:
    """Return every frozen linear layer, in the order of the model."""
    from qlora_kit.layers.projections import projections

    found = projections(skeleton)
    layers = [layer and layer[0] for layer in map(_LAYER.match, found)]
    is_last = [layer != behind for layer, behind in pairwise([*layers, None])]
    return [
        _Linear(module.out_features, module.in_features, max(1, passes - last))
        for module, last in zip(found.values(), is_last, strict=True)
    ]


def _linears(
    linears: list[_Linear], tokens: int, drawn: Callable[..., Any]
) -> Iterator[Callable[[], Any]]:
    """Yield the products of all linear layers; each has a weight of its own, as in a model."""
    widths = {width for each in linears for width in (each.outputs, each.inputs)}
    values = {width: drawn(tokens, width) for width in widths}
    for each in linears:
        weight = drawn(each.outputs, each.inputs)
        for _ in range(each.forward):
            yield lambda w=weight, x=values[each.inputs]: x @ w.T
        yield lambda w=weight, grad=values[each.outputs]: grad @ w


def _head(text: Any, tokens: int, drawn: Callable[..., Any]) -> Iterator[Callable[[], Any]]:
    import torch

    weight = drawn(text.vocab_size, text.hidden_size)
    for begin in range(0, tokens, _HEAD_TOKENS):
        count = min(_HEAD_TOKENS, tokens - begin)
        x, logits = drawn(count, text.hidden_size), drawn(count, text.vocab_size)
        yield lambda x=x, out=logits: torch.mm(x, weight.T, out=out)
        yield lambda grad=logits: grad @ weight


def _attention(
    text: Any, rows: int, tokens: int, passes: int, drawn: Callable[..., Any]
) -> Iterator[Callable[[], Any]]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    q, k, v = (drawn(rows, heads, tokens, size) for _ in range(3))
    grad = drawn(rows, heads, tokens, size)

    def both_ways() -> None:
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in (q, k, v)]
            torch.autograd.grad(attend(*leaves, is_causal=True), leaves, grad)

    for _ in range(text.num_hidden_layers):
        for _ in range(passes - 1):
            yield lambda: attend(q, k, v, is_causal=True)
        yield both_ways


def _unpacking(
    linears: list[_Linear], bits: int, drawn: Callable[..., Any]
) -> Iterator[Callable[[], Any]]:
    """Yield bitsandbytes' unpacking of every weight, as often as it is multiplied by."""
    import bitsandbytes.functional as bnb

    for each in linears:
        weight = drawn(each.outputs, each.inputs)
        if bits == 4:
            packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            call = lambda p=packed, s=state: bnb.dequantize_4bit(p, s)  # noqa: E731
        else:
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            call = lambda c=codes, s=scales: bnb.int8_vectorwise_dequant(c, s)  # noqa: E731
        for _ in range(each.forward + 1):
            yield call

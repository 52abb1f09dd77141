"""The experts of a mixture: a stacked weight (E, K, D) as E ordinary linear layers.

Takes hidden states and the router's choice; returns the mixture of the experts' outputs. The
experts run one after the other, each on the tokens that chose it, so one weight at a time is
unpacked. Never decides which expert a token takes.

Shapes: N tokens, E experts, k experts of a token, D in, K out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.private_torch import FakeTensor
from qlora_kit.private_transformers import gated

STACKED = ("gate_up_proj", "up_proj", "down_proj")
"""names of the stacked weights, in the order in which transformers registers them"""


class Stack(nn.ModuleList):
    """The layers whose weights a checkpoint holds as one tensor (E, K, D), biases as (E, K).

    Args:
        layers: one layer for each expert, with a weight (K, D).
        is_transposed: whether the checkpoint holds the weights as (E, D, K).
    """

    def __init__(self, layers: list[nn.Module], *, is_transposed: bool) -> None:
        super().__init__(layers)
        self.is_transposed = is_transposed

    @classmethod
    def like(cls, weight: Tensor, bias: Tensor | None, *, is_transposed: bool) -> Stack:
        """Return empty layers on the meta device, shaped as a skeleton's stacked weight and bias.

        Args:
            weight: (E, K, D), or (E, D, K) where `is_transposed`.
            bias: (E, K), or None.
            is_transposed: whether the checkpoint holds the weights as (E, D, K).
        """
        out, into = (2, 1) if is_transposed else (1, 2)
        shape: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
        layers: list[nn.Module] = [
            _EmptyLinear(weight.shape[into], weight.shape[out], bias=bias is not None, **shape)
            for _ in range(len(weight))
        ]
        return cls(layers, is_transposed=is_transposed)

    def of_each(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return what maps the rows (N, D) of each expert to (N, K), for one pass over them."""
        return [*self]

    def apart(self, path: str, name: str, stacked: Tensor) -> dict[str, Tensor]:
        """Split a stored tensor; return the tensors of the layers by their names.

        Args:
            path: path of this stack.
            name: name of the stored tensor: `path` for the weights, `{path}_bias` for the biases.
            stacked: weights (E, K, D), or (E, D, K) where `is_transposed`; biases (E, K).
        """
        if name != path:
            return {f"{path}.{number}.bias": bias for number, bias in enumerate(stacked)}
        weights = stacked.transpose(1, 2) if self.is_transposed else stacked
        return {f"{path}.{number}.weight": weight for number, weight in enumerate(weights)}

    def together(self, layers: list[Tensor]) -> Tensor:
        """Stack the weights (K, D), or biases (K,), of all layers as the checkpoint holds them."""
        stacked = torch.stack(layers)
        return stacked.transpose(1, 2) if self.is_transposed and stacked.dim() > 2 else stacked


class _EmptyLinear(nn.Linear):
    """A skeleton's linear layer, made without drawing values: a mixture has thousands of them."""

    def reset_parameters(self) -> None:
        """Draw nothing: a skeleton has no values."""


def run_experts(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the mixture of the chosen experts' outputs, (N, D).

    Args:
        experts: transformers' module of experts, its projections replaced by `Stack`s.
        hidden: (N, D); the mixture is returned in its dtype.
        top_k_index: numbers of the experts that each token chose, (N, k), int64.
        top_k_weights: the shares of these experts in the mixture, (N, k).
    """
    count = top_k_index.shape[1]
    chosen, order = torch.sort(top_k_index.flatten(), stable=True)
    rows = hidden[order // count]
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    parts = rows.split(_tokens_of_each(chosen, experts))
    outputs = [
        _expert(experts, up, down, part)
        for up, down, part in zip(first.of_each(), experts.down_proj.of_each(), parts, strict=True)
        if len(part)
    ]
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order].unsqueeze(1)
    # The k outputs of a token are summed in a fixed order; index_add_ on a GPU has no fixed order.
    return weighted[order.argsort()].view(len(hidden), count, -1).sum(1).to(hidden.dtype)


def _expert(
    experts: Any,
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
    rows: Tensor,
) -> Tensor:
    inner = gated(experts, up(rows)) if experts.has_gate else experts.act_fn(up(rows))
    output = down(inner)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _tokens_of_each(chosen: Tensor, experts: Any) -> list[int]:
    """Return the number of rows of each expert; on fake tensors, rows divided evenly."""
    number: int = experts.num_experts
    if isinstance(chosen, FakeTensor):
        each, more = divmod(len(chosen), number)
        return [each + (expert < more) for expert in range(number)]
    counts: list[int] = torch.bincount(chosen, minlength=number).tolist()
    return counts

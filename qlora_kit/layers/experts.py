"""Experts of a mixture: a stacked weight (E, K, D) as E linear layers like all others.

Takes hidden states and the router's choice; returns their mixture. Every expert runs on the tokens
that chose it, one expert after the other, so one weight at a time is unpacked. Never decides which
expert a token takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.private_torch import FakeTensor
from qlora_kit.private_transformers import gated


class Stack(nn.ModuleList):
    """The layers that a checkpoint holds as one tensor (E, K, D), and their biases as (E, K).

    Args:
        layers: of the experts, each with a weight (K, D).
        is_transposed: whether the checkpoint holds (E, D, K).
    """

    def __init__(self, layers: list[nn.Module], *, is_transposed: bool) -> None:
        super().__init__(layers)
        self.is_transposed = is_transposed

    @classmethod
    def like(cls, weight: Tensor, bias: Tensor | None, *, is_transposed: bool) -> Stack:
        """Return empty layers on the meta device for a stacked weight, and bias, of a skeleton."""
        out, into = (2, 1) if is_transposed else (1, 2)
        shape: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
        layers: list[nn.Module] = [
            nn.Linear(weight.shape[into], weight.shape[out], bias=bias is not None, **shape)
            for _ in range(len(weight))
        ]
        return cls(layers, is_transposed=is_transposed)

    def apart(self, path: str, name: str, stacked: Tensor) -> dict[str, Tensor]:
        """Return what is stored at `name` by the names of its layers.

        Args:
            path: of this stack; `name` is it for the weights, and `{path}_bias` for the biases.
            name: of the stored tensor.
            stacked: (E, K, D), or (E, D, K) where it is stored transposed; biases (E, K).
        """
        if name != path:
            return {f"{path}.{number}.bias": bias for number, bias in enumerate(stacked)}
        weights = stacked.transpose(1, 2) if self.is_transposed else stacked
        return {f"{path}.{number}.weight": weight for number, weight in enumerate(weights)}

    def together(self, layers: list[Tensor]) -> Tensor:
        """Return the weights (K, D), or biases (K,), of all layers as the checkpoint holds them."""
        stacked = torch.stack(layers)
        return stacked.transpose(1, 2) if self.is_transposed and stacked.dim() > 2 else stacked


def run_experts(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the mixture of the chosen experts' outputs, (N, D).

    Args:
        experts: transformers' module; its projections are `Stack`s.
        hidden: (N, D).
        top_k_index: chosen experts of each token, (N, k).
        top_k_weights: their shares, (N, k).
    """
    count = top_k_index.shape[1]
    chosen, order = torch.sort(top_k_index.flatten(), stable=True)
    rows = hidden[order // count]
    parts = zip(experts.down_proj, rows.split(_tokens_of_each(chosen, experts)), strict=True)
    outputs = [
        _expert(experts, number, down, part)
        for number, (down, part) in enumerate(parts)
        if len(part)
    ]
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order].unsqueeze(1)
    # A sum over the k of each token in their order: index_add_ on a GPU has none.
    return weighted[order.argsort()].view(len(hidden), count, -1).sum(1).to(hidden.dtype)


def _expert(experts: Any, number: int, down: nn.Module, rows: Tensor) -> Tensor:
    if experts.has_gate:
        inner = gated(experts, experts.gate_up_proj[number](rows))
    else:
        inner = experts.act_fn(experts.up_proj[number](rows))
    output: Tensor = down(inner)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _tokens_of_each(chosen: Tensor, experts: Any) -> list[int]:
    """Return how many rows each expert has; evenly many where nothing is computed."""
    number: int = experts.num_experts
    if isinstance(chosen, FakeTensor):
        each, more = divmod(len(chosen), number)
        return [each + (expert < more) for expert in range(number)]
    counts: list[int] = torch.bincount(chosen, minlength=number).tolist()
    return counts

"""The experts of a mixture: a stacked weight (E, K, D) as E ordinary linear layers.

Takes hidden states and the router's choice; returns the mixture of the experts' outputs. The
experts run one after the other, each on the tokens that chose it, so one weight at a time is
unpacked. Nothing of an expert is kept for backward, which runs each of them again: so one expert's
activations are there at a time, however many tokens and experts there are. Never decides which
expert a token takes.

Shapes: N tokens, E experts, k experts of a token, n tokens of one expert, D in, K out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_kit.layers.alike import standing_for
from qlora_kit.layers.save_first import save_first
from qlora_kit.private_torch import FakeTensor
from qlora_kit.private_transformers import gated

STACKED = ("gate_up_proj", "up_proj", "down_proj")
"""names of the stacked weights, in the order in which transformers registers them"""

# Fewer tokens at a time would unpack the weight of a busy expert too often.
_LEAST_TILE = 256


class Stack(nn.ModuleList):
    """The layers whose weights a checkpoint holds as one tensor (E, K, D), biases as (E, K).

    Args:
        layers: one layer for each expert, with a weight (K, D).
        is_transposed: whether the checkpoint holds the weights as (E, D, K).
    """

    def __init__(self, layers: Sequence[nn.Module], *, is_transposed: bool) -> None:
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

    def trained(self) -> tuple[Tensor, ...]:
        """Return the trained matrices of all experts, (E, …) each; a frozen stack has none."""
        return ()

    def product(self, number: int, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Map the rows x (n, D) of an expert to (n, K).

        Args:
            number: the number of the expert.
            x: its rows.
            matrices: the expert's part of each of the trained matrices.
        """
        y: Tensor = self[number](x)
        return y

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
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    stacks = (first, experts.down_proj)
    chosen, order = torch.sort(top_k_index.flatten(), stable=True)
    call = _Call(experts, stacks, _tokens_of_each(chosen, experts))
    parameters = [matrix for stack in stacks for matrix in stack.trained()]
    saved = save_first(hidden, hidden, top_k_weights, order, *parameters)
    mixed: Tensor = _Mixture.apply(hidden, top_k_weights, order, call, *saved, *parameters)
    return mixed


class _Call(NamedTuple):
    """A call of the experts.

    Attributes:
        experts: transformers' module.
        stacks: their first and their last stack.
        counts: the number of tokens of each expert.
    """

    experts: Any
    stacks: tuple[Stack, Stack]
    counts: list[int]

    def output(self, number: int, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Return the output (n, D) of an expert for its rows x (n, D)."""
        first, last = self.stacks
        own = len(first.trained())
        up = first.product(number, x, matrices[:own])
        inner = gated(self.experts, up) if self.experts.has_gate else self.experts.act_fn(up)
        output = last.product(number, inner, matrices[own:])
        has_norm = self.experts.has_post_expert_norm
        return self.experts.post_expert_norm(output) if has_norm else output

    def parts(self, order: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield each expert that has tokens, the number it stands for, and its part of `order`.

        A part has no more tokens than there would be if all experts had equally many, or than
        `_LEAST_TILE`: so the memory does not depend on the router's choice. In a simulation one
        expert stands for all that have equally many.
        """
        is_simulated = isinstance(order, FakeTensor)
        tile = max(_LEAST_TILE, -(-len(order) // len(self.counts)))
        seen: set[int] = set()
        for number, tokens in enumerate(order.split(self.counts)):
            count = self.counts[number]
            if count and count not in seen:
                times = self.counts.count(count) if is_simulated else 1
                yield from ((number, times, part) for part in tokens.split(tile))
            if is_simulated:
                seen.add(count)


class _Mixture(torch.autograd.Function):
    # With s for the share of expert e in token t, f for what the expert computes, and f* for its
    # backward, summed over the experts of the token:
    #   out = Σ s f(x)              ds = dout · f(x)              dx = Σ f*(s dout)
    # A token chooses an expert once, so no row is added to twice in one addition: the order of the
    # sums is that of the experts, on a GPU too. Sums are fp32 or wider.

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        shares: Tensor,
        order: Tensor,
        call: _Call,
        token: Tensor,
        node: Any,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.call, ctx.node = call, node
        total = _zeros_for_sums(hidden)
        for number, times, part in call.parts(order):
            with standing_for(times):
                _add_output(total, call, number, part, hidden, shares, parameters)
        return total.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, shares, order, *parameters = ctx.node.saved_tensors
        call: _Call = ctx.call
        grad_hidden, grad_shares = _zeros_for_sums(hidden), torch.zeros_like(shares)
        found = [torch.zeros_like(each) for each in parameters]
        for number, times, part in call.parts(order):
            with standing_for(times):
                tokens = part // shares.shape[1]
                share = shares.flatten()[part].unsqueeze(1)
                matrices = [each[number] for each in parameters]
                grad_x, grad_share, *own = _gradients(
                    call, number, hidden[tokens], share, grads[0][tokens], matrices
                )
                grad_hidden.index_add_(0, tokens, grad_x.to(grad_hidden.dtype))
                grad_shares.view(-1)[part] = grad_share
                for place, whole in enumerate(found):
                    whole[number] += own[place]
                # Nothing of an expert may lie beside the next.
                del tokens, share, matrices, grad_x, grad_share, own
        return (grad_hidden.to(hidden.dtype), grad_shares, *(None,) * 4, *found)


def _add_output(
    total: Tensor,
    call: _Call,
    number: int,
    part: Tensor,
    hidden: Tensor,
    shares: Tensor,
    parameters: Sequence[Tensor],
) -> None:
    """Add what an expert computes for its tokens to the mixture (N, D)."""
    tokens = part // shares.shape[1]
    output = call.output(number, hidden[tokens], [each[number] for each in parameters])
    share = shares.flatten()[part].unsqueeze(1)
    total.index_add_(0, tokens, (output * share).to(total.dtype))


def _gradients(
    call: _Call, number: int, x: Tensor, share: Tensor, grad: Tensor, matrices: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run an expert again; return the gradients of its rows x (n, D), its shares and matrices.

    Args:
        call: the call of the experts.
        number: the number of the expert.
        x: its rows.
        share: its share in the mixture of each row, (n, 1).
        grad: gradient of the mixture, (n, D).
        matrices: its trained matrices.
    """
    inputs = [each.detach().requires_grad_() for each in (x, *matrices)]
    with torch.enable_grad():
        output = call.output(number, inputs[0], inputs[1:])
    grad_share = (grad * output.detach()).sum(1).to(share.dtype)
    grad_x, *own = torch.autograd.grad(output, inputs, (grad * share).to(output.dtype))
    return grad_x, grad_share, *own


def _zeros_for_sums(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _tokens_of_each(chosen: Tensor, experts: Any) -> list[int]:
    """Return the number of rows of each expert; on fake tensors, rows divided evenly."""
    number: int = experts.num_experts
    if isinstance(chosen, FakeTensor):
        each, more = divmod(len(chosen), number)
        return [each + (expert < more) for expert in range(number)]
    counts: list[int] = torch.bincount(chosen, minlength=number).tolist()
    return counts

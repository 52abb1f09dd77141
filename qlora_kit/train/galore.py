"""GaLore: AdamW whose moments live in a subspace of the gradients of a weight.

The gradient G of W is projected to rank R, Adam moves in the small space, and its step is taken
back. The subspace, R leading singular vectors of G, is renewed every 200 steps. So the moments of a
W (K, D) take R (K or D, the longer) numbers each, instead of K D. They are fp32, whatever
`--optimizer` holds the moments of LoRA in.

Shapes: m the shorter and n the longer side of W, R rank.

Source: GaLore (arXiv:2403.03507), algorithm 2, with its scale 0.25 and frequency 200.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PROJECTED = "projected_rank"
"""the entry of a group of weights with the rank that their gradients are projected to"""

_SCALE = 0.25
_RENEWED_EVERY = 200


def fresh_state(weight: Tensor, rank: int) -> dict[str, Any]:
    """Return the state of a weight before its first step: a projection, moments, and a count."""
    short, long = sorted(weight.shape)
    rank = min(rank, short)
    return {
        "step": 0,
        "projection": weight.new_zeros(short, rank),
        "exp_avg": weight.new_zeros(rank, long),
        "exp_avg_sq": weight.new_zeros(rank, long),
    }


def with_projections(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return a kind of optimiser that moves the groups with `PROJECTED` by GaLore."""

    class GaLore(kind):  # type: ignore[misc, valid-type]
        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            if not _overflowed(self):
                for group in self.param_groups:
                    if PROJECTED in group:
                        _move(self.state, group)
            # The weights of GaLore have no gradient any more, so the optimiser itself skips them.
            return super().step(closure)

    return GaLore


def _overflowed(optimizer: Any) -> bool:
    """Whether a loss scaler told a fused optimiser, which decides for itself, to skip the step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _move(states: Mapping[nn.Parameter, dict[str, Any]], group: Mapping[str, Any]) -> None:
    for weight in group["params"]:
        if weight.grad is not None:
            step_back = _moved(weight.grad, states[weight], group)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(step_back, alpha=-group["lr"] * _SCALE)
            weight.grad = None  # a large one: it goes before the next weight is moved


def _moved(gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Return P N, the step of Adam in the subspace taken back to the shape of the weight."""
    is_tall = gradient.shape[0] > gradient.shape[1]
    wide = gradient.T if is_tall else gradient
    projection: Tensor = state["projection"]
    if state["step"] % _RENEWED_EVERY == 0:
        projection.copy_(torch.linalg.svd(wide, full_matrices=False)[0][:, : projection.shape[1]])
    state["step"] += 1
    small = projection.T @ wide
    (first, second), step = group["betas"], state["step"]
    state["exp_avg"].mul_(first).add_(small, alpha=1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(small, small, value=1 - second)
    root = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
    back: Tensor = projection @ (state["exp_avg"] / (1 - first**step)).div_(root)
    return back.T if is_tall else back

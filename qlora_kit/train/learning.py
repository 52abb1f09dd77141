"""Checks that the adapter learns at all: each B gets a gradient, and moves.

A run that trains nothing looks like a run that trains: the loss is finite, and a file is written.
Takes an adapter between backward and the optimiser; raises an error, or returns nothing. Never
changes the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora_kit.errors import LearningError
from qlora_kit.lora.attach import Adapter
from qlora_kit.private_torch import largest_magnitudes

# AdamW moves a weight by about the learning rate in its first step, so a few steps show movement.
STEPS_TO_MOVE = 10
_MOST_NAMED = 5


def check_gradients(adapter: Adapter) -> None:
    """Check, after the first backward pass, that every B has a gradient that is not zero.

    Layers that are trained whole are checked too. The gradient of A is zero then, because B starts
    at zero.

    Raises:
        LearningError: a gradient is missing or zero; the error names the layers.
    """
    gradients = {path: parameter.grad for path, parameter in _first_moved(adapter).items()}
    # Rows of tokens that the first rows of the data lack have no gradient yet.
    whole = adapter.whole_parameters().items()
    gradients |= {
        name.removesuffix(".weight"): each.grad for name, each in whole if name.endswith(".weight")
    }
    if dead := _all_zero(gradients):
        raise LearningError(
            f"after the first step {_named(dead)} got no gradient, so nothing is learnt there; "
            "expected a gradient in every B; name --targets that the loss depends on, or check "
            "that answers are supervised"
        )


def check_movement(adapter: Adapter, steps: int) -> None:
    """Check, after some steps, that every B has left zero, where it started.

    Args:
        adapter: the adapter that is trained.
        steps: number of steps done.

    Raises:
        LearningError: a B is still zero; the error names the layers.
    """
    values = {path: parameter.detach() for path, parameter in _first_moved(adapter).items()}
    if still := _all_zero(values):
        raise LearningError(
            f"after {steps} steps {_named(still)} did not move; expected every B to have left "
            "zero; raise --learning-rate"
        )


def _first_moved(adapter: Adapter) -> Mapping[str, nn.Parameter]:
    """Return each B, or what B is composed of; of a stack, a token chooses some expert at least."""
    of_layers = {path: layer.first_moved for path, layer in adapter.layers.items()}
    return of_layers | {path: each.lora_B for path, each in adapter.others().items()}


def _all_zero(tensors: Mapping[str, Tensor | None]) -> list[str]:
    missing = [path for path, tensor in tensors.items() if tensor is None]
    there = {path: tensor for path, tensor in tensors.items() if tensor is not None}
    # One transfer from the device for all layers.
    largest = largest_magnitudes([*there.values()]) if there else []
    norms = torch.stack(list(largest)).tolist() if there else []
    return missing + [path for path, norm in zip(there, norms, strict=True) if norm == 0]


def _named(paths: list[str]) -> str:
    rest = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return f"{', '.join(paths[:_MOST_NAMED])}{rest}"

"""Recomputation: a decoder layer keeps its input only, and runs again in backward.

Also known as gradient checkpointing. Uses the non-reentrant form, which stops recomputing
as soon as backward has what it needs and works where no input requires a gradient.

Source: Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.errors import ModelError


def set_recompute(model: nn.Module, enabled: bool) -> None:
    """Switch recomputation of every decoder layer on or off; it acts in training mode only.

    Raises:
        ModelError: the architecture has no layers that can be recomputed.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if enabled and not layers:
        raise ModelError("the model has no layers that can be recomputed; pass --no-recompute")
    for layer in layers:
        layer.gradient_checkpointing = enabled
        layer._gradient_checkpointing_func = _recomputed  # type: ignore[assignment]


def _recomputed(forward: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False)

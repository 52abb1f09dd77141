"""Recomputation: a decoder layer keeps its input only, and runs again in backward.

Also known as gradient checkpointing. Uses the non-reentrant form, which stops recomputing
as soon as backward has what it needs and works where no input requires a gradient.

Source: Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.errors import ModelError
from qlora_kit.layers.purpose import LAYER_CHECKPOINTS, announce
from qlora_kit.private_transformers import recompute_by
from qlora_kit.step.offload import Offload


def set_recompute(
    model: nn.Module, enabled: bool, offload: Offload | None = None, keep_layers: int = 0
) -> None:
    """Switch recomputation of the decoder layers on or off; it acts in training mode only.

    Args:
        model: changed in place.
        enabled: whether layers run again in backward.
        offload: holds the inputs of the layers meanwhile; they stay on the device if None.
        keep_layers: layers that keep their activations instead. The last ones: backward begins
            with them, so what they kept is free again when the others are recomputed.

    Raises:
        ModelError: the architecture has no layers that can be recomputed.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if enabled and not layers:
        raise ModelError("the model has no layers that can be recomputed; pass --no-recompute")
    run = _recomputed if offload is None else partial(_offloaded, offload)
    recomputed = max(0, len(layers) - keep_layers) if enabled else 0
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < recomputed
        recompute_by(layer, run)


def _recomputed(forward: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(partial(_announced, forward), *inputs, use_reentrant=False)


def _announced(forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer, now or again in backward, and say what its input is for."""
    # transformers binds what it passed by name to the forward.
    hidden = inputs[0] if inputs else forward.keywords["hidden_states"]  # type: ignore[attr-defined]
    announce(hidden, LAYER_CHECKPOINTS)
    return forward(*inputs)


def _offloaded(offload: Offload, forward: Callable[..., Any], *inputs: Any) -> Any:
    # Inside the layer the checkpoint's own hooks are in force: these see its inputs alone.
    with saved_tensors_hooks(offload.pack, offload.unpack):
        return _recomputed(forward, *inputs)

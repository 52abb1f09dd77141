"""Recomputation: a decoder layer keeps its input only, and runs again in backward.

Also known as gradient checkpointing. It is the non-reentrant form, which stops as soon as the last
tensor that backward needs is there, and which works even if no input requires a gradient.

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
from qlora_kit.layers.projections import takes_pixels
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
        offload: holds the inputs of the layers in between; None leaves them on the device.
        keep_layers: number of layers that keep their activations instead. They are the last
            layers: backward begins with them, so their activations are free again when the other
            layers are recomputed.

    Raises:
        ModelError: the architecture has no layers that can be recomputed. A convolutional network
            of images keeps all activations instead.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if enabled and not layers and not takes_pixels(model):
        raise ModelError("the model has no layers that can be recomputed; pass --no-recompute")
    run = _recomputed if offload is None else partial(_offloaded, offload)
    recomputed = max(0, len(layers) - keep_layers) if enabled else 0
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < recomputed
        recompute_by(layer, run)


def _recomputed(forward: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(partial(_announced, forward), *inputs, use_reentrant=False)


def _announced(forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer, in forward or again in backward, and announce the purpose of its input."""
    # transformers binds the arguments that it passes by name to the forward.
    hidden = inputs[0] if inputs else forward.keywords["hidden_states"]  # type: ignore[attr-defined]
    announce(hidden, LAYER_CHECKPOINTS)
    return forward(*inputs)


def _offloaded(offload: Offload, forward: Callable[..., Any], *inputs: Any) -> Any:
    # Inside the layer the checkpoint's own hooks are in force, so these hooks see its inputs only.
    with saved_tensors_hooks(offload.pack, offload.unpack):
        return _recomputed(forward, *inputs)

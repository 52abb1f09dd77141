"""The output head: how a model turns its last hidden state into logits.

The loss computes logits chunk by chunk and so needs to know the formula:
logits = cap · tanh((h Wᵀ + b) · scale / cap). `verify_head` holds it against the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora_kit.errors import ModelError
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.linear import FrozenLinear

_PROBE_TOKENS = 2


@dataclass(frozen=True)
class Head:
    """The formula of the logits.

    Attributes:
        linear: W (V, D) and b (V,) or None.
        scale: factor of the logits.
        softcap: bound of the logits, or None.
    """

    linear: FrozenLinear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return fp32 logits (N, V) of hidden states (N, D); `weight` is W unpacked.

        The caller unpacks W once for all chunks. Differentiable in `hidden`.
        """
        logits = (hidden @ weight.T).float()
        if self.linear.bias is not None:
            logits = logits + self.linear.bias.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def head_of(model: PreTrainedModel) -> Head:
    """Read the head and the formula of its logits from a loaded model."""
    linear = model.get_output_embeddings()
    assert isinstance(linear, FrozenLinear)
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:  # Granite
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    return Head(linear, scale, softcap)


@torch.no_grad()
def verify_head(model: PreTrainedModel, hardware: Hardware) -> None:
    """Compare `head_of` with the model's own logits on a random hidden state.

    Only the model's last lines run: its layers are stood in for by the hidden state.

    Raises:
        ModelError: they differ; training on another formula would be silently wrong.
    """
    head = head_of(model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, head.linear.in_features, generator=generator)
    hidden = hidden.to(hardware.device, hardware.dtype)
    layers: Any = model.base_model
    layers.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=hardware.device)
        theirs = model(input_ids=ids).logits[0].float()
    finally:
        del layers.forward
    ours = head.logits(hidden[0], head.linear.weight.dequantize(hidden.dtype))
    tolerance = 1e-5 if hardware.dtype == torch.float32 else 2e-2
    if ours.shape != theirs.shape or (ours - theirs).norm() > tolerance * theirs.norm() + 1e-12:
        raise ModelError(
            f"{model.config.model_type}: computes its logits in a way the kit does not know; "
            "choose another model"
        )

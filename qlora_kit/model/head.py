"""The formula of a model's logits, read from its configuration and checked against the model.

Takes a loaded model; returns its `Head`, or refuses the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora_kit.errors import ModelError
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import Head
from qlora_kit.layers.head_terms import HeadTerm, TrainedHead
from qlora_kit.layers.lora import LoRALinear
from qlora_kit.model.encoder_decoder import is_encoder_decoder
from qlora_kit.model.faults import model_errors
from qlora_kit.model.hardware import Hardware

_PROBE_TOKENS = 2


def head_of(model: PreTrainedModel) -> Head:
    """Read the head and the formula of its logits from a loaded model."""
    linear, term = _parts(model.get_output_embeddings())
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "scale_decoder_outputs", False):  # T5, but not T5 v1.1
        scale = float(config.d_model) ** -0.5
    elif getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:  # Granite
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    return Head(linear, scale, softcap, term)


def _parts(module: nn.Module) -> tuple[FrozenLinear, HeadTerm | None]:
    if isinstance(module, TrainedHead):
        return module.head_parts()
    assert isinstance(module, FrozenLinear)
    return module, None


def kept_by_head(model: PreTrainedModel, states: Tensor) -> Tensor | None:
    """Draw the mask of the inputs that dropout keeps in LoRA on the head, bool (B · T, D).

    Args:
        model: with or without LoRA on its head.
        states: (B, T, D), all that the head could be given.

    Returns:
        None without dropout.
    """
    head = model.get_output_embeddings()
    return head.draw_kept(states) if isinstance(head, LoRALinear) else None


class _Hidden(BaseModelOutputWithPast):  # type: ignore[misc]
    """What the layers of a model return: a hidden state, and nothing of what else they may."""

    def __getattr__(self, name: str) -> None:
        """Return nothing; only names that are not there come here."""


@torch.no_grad()
def verify_head(model: PreTrainedModel, hardware: Hardware) -> None:
    """Compare the logits of `head_of` with the model's own, on a random hidden state.

    Only the last lines of the model run: the hidden state takes the place of its layers.

    Raises:
        ModelError: the logits differ; training with another formula would be silently wrong.
    """
    # A config.json may have numbers that fit the tensors and still cannot be computed with.
    with model_errors(model.config.model_type, "a model that computes; check its config.json"):
        head = head_of(model)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, _PROBE_TOKENS, head.linear.in_features, generator=generator)
        hidden = hidden.to(hardware.device, hardware.dtype)
        # An encoder-decoder is given what its encoder read, and runs the decoder alone.
        reads_apart = is_encoder_decoder(model.config)
        layers: Any = model.get_decoder() if reads_apart else model.base_model
        layers.forward = lambda *args, **kwargs: _Hidden(last_hidden_state=hidden)
        try:
            ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=hardware.device)
            read = {"decoder_input_ids": ids, "encoder_outputs": (hidden,)}
            given = read if reads_apart else {"input_ids": ids}
            theirs = model(**given).logits[0].float()
        finally:
            del layers.forward
    ours = torch.empty_like(theirs)
    if ours.shape[1] == head.linear.out_features:
        head.fill_logits(hidden[0], head.weight(hidden.dtype), out=ours)
    tolerance = 1e-5 if hardware.dtype == torch.float32 else 2e-2
    if not (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12:
        raise ModelError(
            f"{model.config.model_type}: computes its logits in a way the kit does not know; "
            "choose another model"
        )

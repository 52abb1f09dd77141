"""The output head: how a model turns its last hidden state into logits.

The loss computes logits chunk by chunk and so needs to know the formula:
logits = cap · tanh((h Wᵀ + b) · scale / cap). `verify_head` holds it against the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora_kit.errors import ModelError
from qlora_kit.model.faults import model_errors
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.linear import FrozenLinear
from qlora_kit.model.quantize import PlainWeight

_PROBE_TOKENS = 2
_CAST_ROWS = 8192


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

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return W (V, D) for hidden states of `dtype`: unpacked, but never upcast as a whole.

        A head stored in 16 bits stays so even where the layers compute in fp32; `fill_logits`
        and `back_project` cast a slice of the vocabulary at a time.
        """
        stored = self.linear.weight
        return stored.values if isinstance(stored, PlainWeight) else stored.dequantize(dtype)

    def fill_logits(
        self, hidden: Tensor, weight: Tensor, out: Tensor, capped: Tensor | None = None
    ) -> None:
        """Write the logits of hidden states (n, D) into `out` (n, V), fp32.

        Args:
            hidden: in the compute dtype.
            weight: what `weight` returned.
            out: overwritten.
            capped: (n, V), fp32; receives tanh(…), which the gradient of a softcap needs.
        """
        for columns, part in _slices(weight, hidden.dtype):
            if part.dtype == out.dtype and part is weight:
                torch.mm(hidden, part.T, out=out)
            else:
                out[:, columns] = hidden @ part.T
        if self.linear.bias is not None:
            out += self.linear.bias
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap is not None:
            capped = torch.empty_like(out) if capped is None else capped
            torch.div(out, self.softcap, out=capped).tanh_()
            torch.mul(capped, self.softcap, out=out)

    def back_project(self, grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `grad` (n, V) times W, (n, D), computed in `dtype`."""
        products = (grad[:, c].to(dtype) @ part for c, part in _slices(weight, dtype))
        total = next(products)
        for product in products:
            total += product
        return total

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (n, V) of hidden states (n, D), differentiable in `hidden`.

        The formula of `fill_logits` for a caller who brings a loss of his own.
        """
        weight = self.weight(hidden.dtype)
        parts = [hidden @ part.T for _, part in _slices(weight, hidden.dtype)]
        logits = torch.cat(parts, dim=1).float() if len(parts) > 1 else parts[0].float()
        if self.linear.bias is not None:
            logits = logits + self.linear.bias.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield W whole where it is in `dtype`, else in slices of the vocabulary that are cast."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    for start in range(0, len(weight), _CAST_ROWS):
        rows = slice(start, min(start + _CAST_ROWS, len(weight)))
        yield rows, weight[rows].to(dtype)


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
    # The numbers of a config.json that fit its tensors may still be none to compute with.
    with model_errors(model.config.model_type, "a model that computes; check its config.json"):
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
    ours = torch.empty_like(theirs)
    if ours.shape[1] == head.linear.out_features:
        head.fill_logits(hidden[0], head.weight(hidden.dtype), out=ours)
    tolerance = 1e-5 if hardware.dtype == torch.float32 else 2e-2
    if not (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12:
        raise ModelError(
            f"{model.config.model_type}: computes its logits in a way the kit does not know; "
            "choose another model"
        )

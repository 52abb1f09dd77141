"""Runs a model on a row that holds several samples, as if each were alone.

Says of which models that can be said, by their configuration and by a trial; runs the others never.
"""

from __future__ import annotations

import functools
import inspect
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.layers.segments import ARGUMENT, Segments, by_segments, positions_within
from qlora_kit.private_transformers import (
    attend_by,
    attention_of,
    has_known_attention,
    without_masks,
)

_KINDS_OF_ATTENTION = {"full_attention", "sliding_attention"}
# Their frequencies follow from the longest row of a batch, so samples would depend on each other.
_ROTARY_BY_LENGTH = {"dynamic", "longrope"}
_TRIED = (5, 3)
_TOLERANCE, _TOLERANCE_OF_16_BITS = 1e-4, 2e-2


def run_in_segments(model: PreTrainedModel, lengths: tuple[int, ...], **inputs: Any) -> Any:
    """Run the layers of a model on a row of segments, each with positions from 0.

    Args:
        model: a model of which `why_not_packed` has nothing to say.
        lengths: tokens of each segment.
        inputs: other inputs, `input_ids` (1, T) among them; no mask.
    """
    _install()
    device = _device_of_layers(model)
    positions = positions_within(lengths).to(device, non_blocking=True)
    named = {ARGUMENT: Segments.of(lengths, device), "position_ids": positions}
    with without_masks(model):
        return model.base_model(**inputs, **named)


def _device_of_layers(model: PreTrainedModel) -> torch.device:
    """Return the device that a model makes its own positions on: the embedding may be elsewhere."""
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    first: Tensor = next(chain(layer.parameters(), layer.buffers()))
    return first.device


@functools.cache
def _install() -> None:
    attend_by(by_segments, partial(by_segments, needs_masks=True))


def why_not_packed(model: PreTrainedModel, tokens: int) -> str | None:
    """Return why the samples of a row would not be as if alone; None: they would be.

    Args:
        model: loaded, or a skeleton.
        tokens: tokens of the longest sample.
    """
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "the model counts positions itself"
    if not has_known_attention(model):
        return f"its attention, {attention_of(model)}, is not known to keep them apart"
    other = set(getattr(config, "layer_types", None) or ()) - _KINDS_OF_ATTENTION
    if other:
        return f"the model has layers of {', '.join(sorted(other))}"
    if _changes_with_length(config, tokens):
        return f"its positions are scaled by the longest row beyond {_original(config):,} tokens"
    return None


def _original(config: PreTrainedConfig) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    most = rope.get("original_max_position_embeddings")
    return int(
        most
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


def _changes_with_length(config: PreTrainedConfig, tokens: int) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") in _ROTARY_BY_LENGTH and tokens > _original(config)


@torch.no_grad()
def agrees_packed(model: PreTrainedModel) -> bool:
    """Whether two samples of a few tokens have the same hidden states packed and alone."""
    was_training = model.training
    model.eval()
    try:
        alone, packed = _alone_and_packed(model)
    finally:
        model.train(was_training)
    # In 16 bits the sums of other shapes are rounded elsewhere.
    tolerance = _TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_OF_16_BITS
    return bool((alone - packed).norm() <= tolerance * alone.norm())


def _alone_and_packed(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = torch.arange(sum(_TRIED)).remainder(model.config.get_text_config().vocab_size)[None]
    plain = {"attention_mask": None, "use_cache": False}
    each = [
        model.base_model(input_ids=part, **plain).last_hidden_state
        for part in torch.split(ids, list(_TRIED), dim=1)
    ]
    found = run_in_segments(model, _TRIED, input_ids=ids, **plain).last_hidden_state
    return torch.cat(each, dim=1).float(), found.float()

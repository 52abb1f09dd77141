"""Generates text with a loaded model, with or without an adapter.

Takes prompts as token ids, so that the caller renders them exactly as training did; returns the new
text only. Never applies a chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.config import GenerateConfig
from qlora_kit.data.template import end_token_ids
from qlora_kit.lora.several import PerRow
from qlora_kit.model.architecture import read_generation_config
from qlora_kit.model.halving import batches_that_fit
from qlora_kit.model.load import Base

_DEFAULTS = GenerateConfig()


@dataclass(frozen=True)
class Sampling:
    """The settings by which the next token is chosen.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_p: share of the probability that is kept when sampling.
        seed: seed of the sampling.
    """

    max_new_tokens: int = _DEFAULTS.max_new_tokens
    temperature: float = _DEFAULTS.temperature
    top_p: float = _DEFAULTS.top_p
    seed: int = _DEFAULTS.seed


@torch.no_grad()
def generate(
    base: Base,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    batch_size: int = 32,
    per_row: PerRow | None = None,
) -> Iterator[str]:
    """Yield the continuation of each prompt, in order, up to its end token.

    Args:
        base: the model, with the adapter it may carry.
        tokenizer: the model's tokenizer.
        prompts: token ids of each prompt, with BOS if the model wants one.
        sampling: the settings of sampling; None: the most likely tokens.
        batch_size: prompts that are continued together; halved when memory runs out.
        per_row: the adapter of each prompt, if several adapters are on the base.

    Raises:
        OutOfMemory: even one prompt does not fit.
        Stopped: a signal came.
    """
    chosen = sampling or Sampling()
    torch.manual_seed(chosen.seed)

    def continued(indices: Sequence[int]) -> list[str]:
        if per_row is not None:
            per_row.choose(indices)
        return _generate_batch(base, tokenizer, [prompts[i] for i in indices], chosen)

    def line_of(index: int) -> str:
        return (
            f"out of memory in generation after a prompt of {len(prompts[index])} tokens; expected "
            "it to fit; pass a smaller --max-new-tokens, or fewer --bits"
        )

    order, device = range(len(prompts)), base.hardware.device
    with base.in_evaluation():
        for _, texts in batches_that_fit(order, batch_size, continued, device, line_of=line_of):
            yield from texts


def _generate_batch(
    base: Base, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[str]:
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id
    # Prompts are padded on the left, so that every continuation starts in the same column.
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model: Any = base.model
    chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    output = model.generate(
        input_ids=ids.to(base.hardware.device),
        attention_mask=mask.to(base.hardware.device),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=end_token_ids(tokenizer, _configured_ends(base)),
        use_cache=True,
        **chosen,
    )
    return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in output]


def _configured_ends(base: Base) -> list[int]:
    """Return the end tokens that `config.json` and `generation_config.json` name."""
    model: Any = base.model
    configured = [model.config.get_text_config().eos_token_id]
    settings = read_generation_config(base.spec.folder) if base.spec.folder else None
    if settings is not None:
        configured.append(settings.eos_token_id)
    flat = [e if isinstance(e, list) else [e] for e in configured]
    return [end for ends in flat for end in ends if end is not None]

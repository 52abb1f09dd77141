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
from qlora_kit.events import Announce, Notice, silent
from qlora_kit.lora.several import PerRow
from qlora_kit.model.architecture import read_generation_config
from qlora_kit.model.encoder_decoder import is_encoder_decoder
from qlora_kit.model.halving import batches_that_fit
from qlora_kit.model.load import Base

TOGETHER = 32
"""prompts that are continued together, where nobody says how many"""

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
    batch_size: int = TOGETHER,
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
    work = _Continuation(base, tokenizer, prompts, sampling or Sampling(), per_row)
    for _, texts in work.batches(range(len(prompts)), batch_size, silent):
        yield from texts


@torch.no_grad()
def generate_all(
    base: Base,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    batch_size: int = TOGETHER,
    per_row: PerRow | None = None,
    announce: Announce = silent,
) -> list[str]:
    """Return what `generate` yields, in the order of the prompts, with less padding.

    Prompts of similar length are continued together, the longest first: a batch that does not fit
    is found at once.

    Args:
        base: see `generate`, as for all but the last.
        tokenizer: its tokenizer.
        prompts: token ids.
        sampling: greedy if None.
        batch_size: prompts that are continued together.
        per_row: the adapter of each prompt.
        announce: receives that a batch was halved.

    Raises:
        OutOfMemory: even one prompt does not fit.
    """
    work = _Continuation(base, tokenizer, prompts, sampling or Sampling(), per_row)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found = [""] * len(prompts)
    for indices, texts in work.batches(order, batch_size, announce):
        for index, text in zip(indices, texts, strict=True):
            found[index] = text
    return found


@dataclass(frozen=True)
class _Continuation:
    """Prompts that a model continues; the attributes are the arguments of `generate`."""

    base: Base
    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    per_row: PerRow | None

    def batches(
        self, order: Sequence[int], batch_size: int, announce: Announce
    ) -> Iterator[tuple[Sequence[int], list[str]]]:
        """Yield the indices of each batch of prompts, in the given order, with what follows."""
        torch.manual_seed(self.sampling.seed)
        with self.base.in_evaluation():
            yield from batches_that_fit(
                order,
                batch_size,
                self._continued,
                self.base.hardware.device,
                line_of=self._line_of,
                on_halved=lambda most: announce(Notice(_fewer(most))),
            )

    def _continued(self, indices: Sequence[int]) -> list[str]:
        if self.per_row is not None:
            self.per_row.choose(indices)
        prompts = [self.prompts[index] for index in indices]
        return _generate_batch(self.base, self.tokenizer, prompts, self.sampling)

    def _line_of(self, index: int) -> str:
        return (
            f"out of memory in generation after a prompt of {len(self.prompts[index])} tokens; "
            "expected it to fit; pass a smaller --max-new-tokens, or fewer --bits"
        )


def _fewer(most: int) -> str:
    return f"out of memory in generation: {most} prompt(s) a batch from here"


def _generate_batch(
    base: Base, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[str]:
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id
    # Prompts are padded on the left, so that every continuation starts in the same column.
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model: Any = base.model
    output = model.generate(
        input_ids=ids.to(base.hardware.device),
        attention_mask=mask.to(base.hardware.device),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=end_ids(base, tokenizer),
        use_cache=True,
        # No process may end before the others where each has a part of the base.
        synced_gpus=base.shards is not None,
        **sampled_as(sampling),
    )
    # A decoder that continues a prompt gives it back; one that reads a source begins with a token
    # of its own.
    begun = 1 if is_encoder_decoder(model.config) else width
    return [tokenizer.decode(row[begun:], skip_special_tokens=True) for row in output]


def sampled_as(sampling: Sampling) -> dict[str, Any]:
    """Return the arguments of transformers' `generate` that say how the next token is chosen."""
    if sampling.temperature <= 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
    }


def end_ids(base: Base, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, by tokenizer, template and the model's files."""
    return end_token_ids(tokenizer, configured_ends(base))


def configured_ends(base: Base) -> list[int]:
    """Return the end tokens that `config.json` and `generation_config.json` name."""
    model: Any = base.model
    configured = [model.config.get_text_config().eos_token_id]
    settings = read_generation_config(base.spec.folder) if base.spec.folder else None
    if settings is not None:
        configured.append(settings.eos_token_id)
    flat = [e if isinstance(e, list) else [e] for e in configured]
    return [end for ends in flat for end in ends if end is not None]

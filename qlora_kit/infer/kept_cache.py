"""A model that continues one text after another, and keeps what it computed of the last.

Takes token ids; returns the ids that follow. Keys and values of the tokens that a text has in
common with the one before are not computed again. Knows nothing of turns, nor of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.errors import OutOfMemory
from qlora_kit.infer.generate import Sampling, sampled_as
from qlora_kit.model.load import Base
from qlora_kit.model.memory import is_out_of_memory, release_memory


@dataclass(frozen=True)
class Continued:
    """What a model has written after some ids.

    Attributes:
        ids: the new ids, with the end token if one came.
        kept: ids of the prompt that were not computed again.
    """

    ids: list[int]
    kept: int


class KeptCache:
    """A loaded model with the keys and values of the last text that it saw.

    Args:
        base: the model, with the adapters that it carries. Whoever changes its weights, or chooses
            another adapter, calls `forget`.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self._cache: Any = None
        self._ids: list[int] = []

    def forget(self) -> None:
        """Drop all keys and values."""
        self._cache, self._ids = None, []

    @torch.inference_mode()
    def continued(
        self,
        ids: Sequence[int],
        ends: Sequence[int],
        sampling: Sampling,
        pad: int,
        on_ids: Callable[[list[int]], None],
        is_stopped: Callable[[], bool],
    ) -> Continued:
        """Continue a text up to an end token.

        Args:
            ids: token ids of the text, at least one.
            ends: the end tokens.
            sampling: how the next token is chosen, and how many at most; its seed is not used.
            pad: the padding token, which is never seen.
            on_ids: receives new ids as they come.
            is_stopped: asked after each token whether to end here.

        Raises:
            OutOfMemory: the text does not fit.
        """
        kept = self._keep(ids)
        cache, self._cache = self._cache, None
        try:
            output = self._generate(ids, ends, sampling, pad, cache, on_ids, is_stopped)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            output = None
        if output is None:
            # Here the error is gone, and so are the tensors that its frames held.
            cache = None
            self.forget()
            release_memory(self._base.hardware.device)
            raise OutOfMemory(
                f"out of memory after a prompt of {len(ids)} tokens; expected it to fit; pass a "
                "smaller --context, or fewer --bits"
            )
        whole: list[int] = output.sequences[0].tolist()
        self._cache = output.past_key_values
        # The last token was chosen, and never seen.
        self._ids = [] if self._cache is None else whole[: self._cache.get_seq_length()]
        return Continued(whole[len(ids) :], kept)

    def _keep(self, ids: Sequence[int]) -> int:
        """Cut the cache to what the text has in common with the last; return its length."""
        # The last token is always computed: what follows it is asked for.
        most = min(len(self._ids), len(ids) - 1)
        same = next((n for n in range(most) if self._ids[n] != ids[n]), most)
        surplus = len(self._ids) - same
        if self._cache is None or not same or not self._is_cut(surplus):
            self.forget()
            return 0
        self._ids = self._ids[:same]
        return same

    def _is_cut(self, surplus: int) -> bool:
        """Take tokens off the end of the cache; return whether that can be done."""
        if not surplus:
            return True
        if not getattr(self._cache, "is_croppable", False):
            return False
        try:
            self._cache.crop(-surplus)
        except RuntimeError:
            # Layers that see a window of the text have dropped what came before it.
            return False
        return True

    def _generate(
        self,
        ids: Sequence[int],
        ends: Sequence[int],
        sampling: Sampling,
        pad: int,
        cache: Any,
        on_ids: Callable[[list[int]], None],
        is_stopped: Callable[[], bool],
    ) -> Any:
        from transformers import StoppingCriteriaList

        given = torch.tensor([ids], device=self._base.hardware.device)
        model: Any = self._base.model
        with self._base.in_evaluation():
            return model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                past_key_values=cache,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=list(ends),
                use_cache=True,
                return_dict_in_generate=True,
                streamer=_Listener(on_ids),
                stopping_criteria=StoppingCriteriaList([_Asked(is_stopped)]),
                **sampled_as(sampling),
            )


class _Listener:
    """What `generate` calls a streamer: it is given the prompt first, and then each new token."""

    def __init__(self, on_ids: Callable[[list[int]], None]) -> None:
        self._on_ids = on_ids
        self._has_prompt = False

    def put(self, ids: torch.Tensor) -> None:
        """Pass new ids on."""
        if self._has_prompt:
            self._on_ids(ids.reshape(-1).tolist())
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing: the caller knows when `generate` returns."""


class _Asked:
    """A criterion of `generate`: whether somebody asked for the end."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped

    def __call__(self, ids: torch.Tensor, scores: Any, **settings: Any) -> torch.Tensor:
        """Return, for each row of ids (B, T), whether it ends here: (B,)."""
        return torch.full((len(ids),), self._is_stopped(), device=ids.device)

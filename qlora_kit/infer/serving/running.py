"""The rows that are answered together, and their key-value cache.

A prompt runs through the model alone, and its row joins the others between two of their tokens.
Shorter rows are padded on the left, and a mask hides the padding, so every row computes as if it
were alone. A row that is done leaves, with the padding that only it needed.

    keys and values of a layer: (B, H, W, D), W the tokens of the longest row
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qlora_kit.errors import ModelError
from qlora_kit.infer.serving.asked import Asked
from qlora_kit.lora.several import AdapterSet
from qlora_kit.model.load import Base

# Kinds of layers that see of a row the same tokens, however far it is shifted to the right.
_SHIFTED_BY_PADDING = {"full_attention", "sliding_attention"}


@dataclass(eq=False)
class Row:
    """A row of the batch.

    Attributes:
        asked: its request.
        length: tokens in the cache.
        last: the token that was chosen last, which is not in the cache yet.
    """

    asked: Asked
    length: int = 0
    last: int = 0


class Batch:
    """Rows that go through the model together, a token at a time.

    Args:
        base: the loaded model.
        adapters: the adapters on it; None where it is used as it is.
    """

    def __init__(self, base: Base, adapters: AdapterSet | None) -> None:
        self._base, self._adapters = base, adapters
        self._model: Any = base.model
        self._device = base.hardware.device
        accepted = inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache = DynamicCache()
        self.rows: list[Row] = []

    def check(self, token: int) -> None:
        """Check that rows of this model can be answered together, by running one token.

        Args:
            token: any token of the model.

        Raises:
            ModelError: they cannot: the model keeps more than keys and values of each token, does
                not take the positions of its tokens, or sees other tokens where a row is padded.
        """
        name = self._base.spec.source.name
        kinds = set(getattr(self._model.config.get_text_config(), "layer_types", None) or ())
        if unknown := sorted(kinds - _SHIFTED_BY_PADDING):
            raise ModelError(
                f"{name}: has layers of {unknown[0].replace('_', ' ')}, which padding would "
                "change; expected full or sliding attention; use `qlora-kit generate`"
            )
        if "position_ids" not in inspect.signature(self._model.forward).parameters:
            raise ModelError(
                f"{name}: takes no positions of tokens, by which rows of different length are "
                "answered together; expected a model with rotary or learnt positions; use "
                "`qlora-kit generate`"
            )
        cache, _ = self._run_alone([token], None)
        if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ModelError(
                f"{name}: keeps a state of its own beside the keys and values of its tokens; "
                "expected attention in every layer; use `qlora-kit generate`"
            )

    def start(self, row: Row) -> tuple[DynamicCache, Tensor]:
        """Run the prompt of a row, alone.

        Returns:
            Its cache, for `join`, and the logits of the token after it, (1, V).
        """
        cache, logits = self._run_alone(row.asked.ids, row.asked.adapter)
        row.length = len(row.asked.ids)
        return cache, logits

    def join(self, row: Row, cache: DynamicCache) -> None:
        """Let a row go on with the others; its last token has been chosen.

        On an error the cache is as it was before.
        """
        if self.rows:
            self._stack(cache)
        else:
            self._cache = cache
        self.rows.append(row)

    def step(self) -> Tensor:
        """Run the last token of every row; return the logits after them, (B, V).

        On an error the cache is as it was before.
        """
        width = self._width
        lengths = torch.tensor([row.length for row in self.rows], device=self._device)
        places = torch.arange(width + 1, device=self._device)
        self._choose([row.asked.adapter for row in self.rows])
        try:
            logits: Tensor = self._model(
                input_ids=torch.tensor([[row.last] for row in self.rows], device=self._device),
                position_ids=lengths[:, None],
                attention_mask=(places >= width - lengths[:, None]).long(),
                past_key_values=self._cache,
                use_cache=True,
            ).logits[:, -1]
        except Exception:
            for layer in self._cache.layers:
                _trim(layer, slice(0, width))
            raise
        for row in self.rows:
            row.length += 1
        return logits

    def leave(self, rows: Iterable[Row]) -> None:
        """Take rows out."""
        gone = set(map(id, rows))
        kept = [index for index, row in enumerate(self.rows) if id(row) not in gone]
        if len(kept) == len(self.rows):
            return
        width = self._width
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            self._cache = DynamicCache()
            return
        chosen = torch.tensor(kept, device=self._device)
        first = width - max(row.length for row in self.rows)
        for layer in self._cache.layers:
            layer.keys = layer.keys.index_select(0, chosen)
            layer.values = layer.values.index_select(0, chosen)
            _trim(layer, slice(first, None))

    @property
    def _width(self) -> int:
        return max(row.length for row in self.rows)

    def _stack(self, cache: DynamicCache) -> None:
        rows, width = len(self.rows), self._width
        try:
            for mine, other in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = _stacked(mine.keys, other.keys)
                mine.values = _stacked(mine.values, other.values)
        except Exception:
            for layer in self._cache.layers:
                layer.keys = layer.keys[:rows, :, -width:]
                layer.values = layer.values[:rows, :, -width:]
            raise

    def _run_alone(self, ids: Sequence[int], adapter: str | None) -> tuple[DynamicCache, Tensor]:
        cache = DynamicCache()
        self._choose([adapter])
        given = torch.tensor([ids], device=self._device)
        output = self._model(
            input_ids=given,
            position_ids=torch.arange(len(ids), device=self._device)[None],
            attention_mask=torch.ones_like(given),
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        return cache, output.logits[:, -1]

    def _choose(self, names: Sequence[str | None]) -> None:
        if self._adapters is None:
            return
        # One name for all rows spares the gathering of each adapter's rows.
        self._adapters.set_adapter(names[0] if len({*names}) == 1 else names)


def _stacked(mine: Tensor, other: Tensor) -> Tensor:
    width = max(mine.shape[-2], other.shape[-2])
    widened = [F.pad(each, (0, 0, width - each.shape[-2], 0)) for each in (mine, other)]
    return torch.cat(widened)


def _trim(layer: Any, places: slice) -> None:
    # A copy where tokens are cut off at all, so that the longer tensor is given back.
    keys, values = layer.keys[..., places, :], layer.values[..., places, :]
    if keys.shape != layer.keys.shape:
        layer.keys, layer.values = keys.contiguous(), values.contiguous()

"""Token rows of preferences: a prompt with the answer that is preferred, and with the other.

Takes samples and a tokenizer; yields rows that hold both sequences, one behind the other, so that
nothing that orders, divides or cuts rows can part them. Each sequence is what training on it alone
would see, and its answer alone is supervised. `sides_of` divides a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Self

import pyarrow

from qlora_kit.config import LongSamples, TokenOptions
from qlora_kit.data.encode import CHOSEN_TOKENS, IGNORED, Encoder, Labelled
from qlora_kit.data.fields import Faults
from qlora_kit.data.labels import Labels
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Preference
from qlora_kit.data.template import Rendered, Renderer
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.model.tokenizer import template_hash
from qlora_kit.time_limit import many_limits

PAIRS = "pairs"


def sides_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two sequences of a row, each a row of text: the chosen and the rejected one."""
    cut = row[CHOSEN_TOKENS]
    chosen, rejected = (
        {"input_ids": row["input_ids"][part], "labels": row["labels"][part], "row": row["row"]}
        for part in (slice(0, cut), slice(cut, None))
    )
    return chosen, rejected


class PreferenceRows:
    """Makes rows of pairs, see `tokens.RowMaker`.

    `--max-length` bounds each sequence. A prompt with an answer that is too long loses its end, so
    both sequences keep the same prompt.

    Raises:
        ConfigError: the options are not for pairs.
    """

    weighs: str = PAIRS
    label_type = pyarrow.int32()
    has_token_types = False
    has_weights = False
    labels: Labels | None = None

    def __init__(self, samples: Samples, tokenizer: Any, options: TokenOptions) -> None:
        if options.long_samples == "split":
            raise ConfigError(
                "--long-samples split: two answers are compared as wholes; expected truncate, drop "
                "or error with --task preference; pass one of these"
            )
        if options.train_on == "all":
            raise ConfigError(
                "--train-on all: a prompt is the same for both answers, so nothing is preferred in "
                "it; expected completion or last-turn with --task preference; pass one of these"
            )
        self.samples = samples
        self.renderer = Renderer(tokenizer, options.train_on, options.chat_template)
        self.encoder = Encoder(tokenizer)
        self.max_length = options.max_length
        self.settings: Sequence[Any] = [PAIRS, self.renderer.train_on]
        is_raw = all(isinstance(each, Preference) and isinstance(each.prompt, str)
                     for each in samples.items)  # fmt: skip
        self.origin: Mapping[str, str | None] = {
            "data": samples.content_hash(),
            "tokenizer": self.encoder.content_hash(),
            "template": None if is_raw else template_hash(tokenizer),
        }

    def on(self, samples: Samples) -> Self:
        """Return the maker of the rows of other samples."""
        other = copy(self)
        other.samples = samples
        return other

    def rows(self, indices: Sequence[int], faults: Faults) -> Iterator[tuple[int, Labelled]]:
        """Yield the row of each sample, however long."""
        kept, rendered = [], []
        with many_limits():
            for index in indices:
                try:
                    sides = self._rendered(index)
                except DataError as error:
                    faults.add(*error.faults)
                    continue
                kept.append(index)
                rendered += sides
        encoded = iter(self.encoder.encode(rendered))
        for index, chosen, rejected in zip(kept, encoded, encoded, strict=True):
            if _learns(chosen) and _learns(rejected):
                yield index, _joined(chosen, rejected)
            else:
                faults.add(
                    f"{self.samples.items[index].place}: the tokenizer makes no token of an answer "
                    "behind its prompt; expected some to compare; correct it, or remove the record"
                )

    def _rendered(self, index: int) -> list[Rendered]:
        """Return the texts of both sequences of a sample."""
        sample = self.samples.items[index]
        assert isinstance(sample, Preference)
        found: list[Rendered] = []
        for side in sample.sides:
            texts = self.renderer.render(side)
            if len(texts) > 1:
                raise DataError(
                    f"{sample.place}: the chat template rewrites the earlier of several answers, "
                    "so they make up no one text; expected one to compare; keep one answer a side, "
                    "or pass --train-on last-turn"
                )
            found += texts
        return found

    def count(self, index: int) -> int:
        """Return 1: every pair is a row."""
        return 1

    def divided(self, index: int, tokens: int) -> None:
        """See `tokens.RowMaker`: an answer is compared as a whole."""

    def shorten(self, index: int, row: Labelled, how: LongSamples) -> list[Labelled]:
        """Return both sequences without their ends; nothing where an answer has no token left."""
        assert row.source is not None
        sides = (row.part(0, row.source), row.part(row.source, len(row.ids)))
        chosen, rejected = (side.part(0, self.max_length) for side in sides)
        return [_joined(chosen, rejected)] if _learns(chosen) and _learns(rejected) else []

    def weight(self, labels: list[Any]) -> int:
        """Return 1: pairs count alike."""
        return 1

    def nothing_left(self, lost: int, how: LongSamples) -> str:
        """Say that all rows were too long."""
        found = f"{self.samples.source}: no pair is left of {len(self.samples.items):,}"
        if how == "drop":
            return (
                f"{found}: all are longer than --max-length {self.max_length}; expected shorter "
                "ones; raise --max-length or pass --long-samples truncate"
            )
        return (
            f"{found}: the prompts alone fill --max-length {self.max_length}; expected room for "
            "both answers; raise --max-length"
        )


def _learns(side: Labelled) -> bool:
    """Whether a sequence has a token to compare: none predicts its first."""
    return any(label != IGNORED for label in side.labels[1:])


def _joined(chosen: Labelled, rejected: Labelled) -> Labelled:
    """Return both sequences as one row; no token before it predicts the first of a sequence."""
    labels = [label for side in (chosen, rejected) for label in (IGNORED, *side.labels[1:])]
    return Labelled(
        chosen.ids + rejected.ids,
        labels,
        chosen.aligned and rejected.aligned,
        source=len(chosen.ids),
    )

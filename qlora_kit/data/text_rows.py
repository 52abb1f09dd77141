"""Token rows of texts: rendered, encoded, and every supervised token a target.

Takes samples and a tokenizer; yields labelled rows. A token is supervised if a loss is computed for
it: no token comes before the first token of a row, so the first never counts. Never cuts a row that
is not too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Self

import pyarrow

from qlora_kit.config import LongSamples, TokenOptions
from qlora_kit.data.divide import Divider
from qlora_kit.data.encode import IGNORED, Encoder, Labelled
from qlora_kit.data.fields import Faults
from qlora_kit.data.labels import Labels
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Conversation, Sample, Shape, loss_weights
from qlora_kit.data.template import Rendered, Renderer
from qlora_kit.errors import DataError
from qlora_kit.model.tokenizer import template_hash
from qlora_kit.time_limit import many_limits

SUPERVISED_TOKENS = "supervised_tokens"


def nothing_marked(samples: Samples) -> str:
    """Return the error where the data marks nothing to be learnt."""
    return (
        f"{samples.source}: no supervised token is left in {len(samples.items)} rows: all have the "
        "weight 0 (loss_weight, weight, train); expected one above 0; take the marks away"
    )


def _is_learnt(sample: Sample) -> bool:
    """Whether the data wants any of a sample to be learnt."""
    if isinstance(sample, Conversation):
        answers = [turn.is_learnt for turn in sample.messages if turn.role == "assistant"]
        return bool(sample.loss_weight) and any(answers)
    return all(loss_weights(sample))


def _end_of_answers(labels: Sequence[int], limit: int) -> int:
    """Return where the last answer ends that ends within a limit; the limit where none does."""
    for end in range(limit, 0, -1):
        if labels[end - 1] != IGNORED and labels[end] == IGNORED:
            return end
    return limit


class TextRows:
    """Makes rows of conversations, pairs and texts, see `tokens.RowMaker`."""

    weighs: str = SUPERVISED_TOKENS
    label_type = pyarrow.int32()
    has_token_types = False
    labels: Labels | None = None

    def __init__(self, samples: Samples, tokenizer: Any, options: TokenOptions) -> None:
        self.samples = samples
        self.has_weights = samples.is_weighted
        self.renderer = Renderer(tokenizer, options.train_on, options.chat_template)
        self.encoder = Encoder(tokenizer)
        self.max_length = options.max_length
        self.settings: Sequence[Any] = [self.renderer.train_on]
        if options.long_samples == "split" and samples.shape not in (Shape.PAIR, Shape.TEXT):
            # Rows of a version that cut a chat anywhere are not taken from the cache.
            self.settings = [*self.settings, "turn borders"]
        self.divider = Divider(self.renderer, self.encoder, options.max_length)
        # Every row of this tokenizer starts with a BOS, and so does each chunk of a split row.
        self.opening = [tokenizer.bos_token_id] if self.encoder.puts_bos else []
        self.origin: Mapping[str, str | None] = {
            "data": samples.content_hash(),
            "tokenizer": self.encoder.content_hash(),
            "template": template_hash(tokenizer),
        }

    def on(self, samples: Samples) -> Self:
        """Return the maker of the rows of other samples."""
        other = copy(self)
        other.samples, other.has_weights = samples, samples.is_weighted
        return other

    def rows(self, indices: Sequence[int], faults: Faults) -> Iterator[tuple[int, Labelled]]:
        """Yield the rows of samples: one, or one an answer where a template asks for it."""
        rendered, sources = self._rendered(indices, faults)
        return zip(sources, self.encoder.encode(rendered), strict=True)

    def _rendered(self, indices: Sequence[int], faults: Faults) -> tuple[list[Rendered], list[int]]:
        """Return the texts of samples, and for each text the index of its sample."""
        rendered: list[Rendered] = []
        sources: list[int] = []
        with many_limits():
            for index in indices:
                try:
                    texts = self.renderer.render(self.samples.items[index])
                except DataError as error:
                    faults.add(*error.faults)
                    continue
                rendered += texts
                sources += [index] * len(texts)
        return rendered, sources

    def count(self, index: int) -> int:
        """Return how many rows a sample has: none, one, or one an answer, see `rows`.

        Only a conversation with several answers has to be rendered for it.
        """
        sample = self.samples.items[index]
        if not isinstance(sample, Conversation) or self.renderer.train_on == "all":
            return int(all(loss_weights(sample)))
        answers = len(self.renderer.learnt_turns(sample))
        if answers < 2:
            return answers
        with many_limits():
            return len(self.renderer.render(sample))

    def divided(self, index: int, tokens: int) -> list[Labelled] | None:
        """Return the rows of the parts of a conversation; None for a pair or a text."""
        sample = self.samples.items[index]
        if not isinstance(sample, Conversation):
            return None
        with many_limits():
            parts = self.divider.parts(sample, tokens)
        return [row for part in parts for row in part.rows]

    def shorten(self, index: int, row: Labelled, how: LongSamples) -> list[Labelled]:
        """Return the start of a row, or its chunks."""
        if how != "split":
            return [row.part(0, self.max_length)]
        if isinstance(self.samples.items[index], Conversation):
            return [row.part(0, _end_of_answers(row.labels, self.max_length))]
        return self._split(row)

    def _split(self, row: Labelled) -> list[Labelled]:
        opening = len(self.opening)
        width = self.max_length - opening
        starts = range(opening, len(row.ids), width)
        chunks = [row.part(start, start + width, self.opening) for start in starts]
        return [chunk for chunk in chunks if len(chunk.ids) >= 2]

    def weight(self, labels: list[Any]) -> int:
        """Return the number of supervised tokens."""
        return len(labels) - labels.count(IGNORED) - (bool(labels) and labels[0] != IGNORED)

    def nothing_left(self, lost: int, how: LongSamples) -> str:
        """Say whether the length or the mask took every supervised token."""
        found = (
            f"{self.samples.source}: no supervised token is left in {len(self.samples.items)} rows"
        )
        if not any(map(_is_learnt, self.samples.items)):
            return nothing_marked(self.samples)
        if not lost:
            return (
                f"{found}: the mask of --train-on {self.renderer.train_on} covers all; expected "
                "text to learn; add longer answers or pass --train-on all"
            )
        if how == "drop":
            return (
                f"{found}: all are longer than --max-length {self.max_length}; expected shorter "
                "ones; raise --max-length or pass --long-samples truncate"
            )
        return (
            f"{found}: the prompts alone fill --max-length {self.max_length}; expected room for "
            "the answers; raise --max-length"
        )

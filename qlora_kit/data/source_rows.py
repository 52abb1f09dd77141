"""Token rows of sources and targets: an encoder reads the one, and a decoder writes the other.

Takes samples of one question and one answer, and a tokenizer; yields rows that hold the source and,
behind it, the target, which alone is supervised. Both end with an EOS. `source_tokens` says where a
row is divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Self

import pyarrow

from qlora_kit.config import LongSamples, TokenOptions
from qlora_kit.data.chat_text import Tools
from qlora_kit.data.encode import IGNORED, Encoder, Labelled
from qlora_kit.data.fields import Faults
from qlora_kit.data.labels import Labels
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Conversation, Message, Pair, Sample, Shape
from qlora_kit.data.text_rows import SUPERVISED_TOKENS, nothing_marked
from qlora_kit.errors import ConfigError, DataError


def source_tokens(labels: Sequence[int]) -> int:
    """Return how many tokens of a row are its source, given the labels of the row."""
    return next(at for at, label in enumerate(labels) if label != IGNORED)


def source_text(prompt: str | Sequence[Message], place: str, tools: Tools = ()) -> str:
    """Return the text that an encoder reads.

    Args:
        prompt: a text; or the turns before an answer: the user's, and a system's turn before it.
        place: the place of the prompt, for errors.
        tools: the tools that may be called.

    Raises:
        DataError: there are more turns, or tools.
    """
    if isinstance(prompt, str):
        return prompt
    roles = [turn.role for turn in prompt]
    if tools or "tool" in roles:
        raise DataError(
            f"{place}: tools; expected a question and an answer with --task seq2seq: an encoder "
            "reads one text, which has no form for them; leave the record out"
        )
    if roles not in (["user"], ["system", "user"], ["developer", "user"]):
        raise DataError(
            f"{place}: {len(roles)} turns before the answer ({', '.join(roles)}); expected one of "
            "the user's with --task seq2seq: an encoder reads one text, not a conversation; keep "
            "one question and its answer a record"
        )
    return "\n\n".join(turn.content for turn in prompt)


def _target_text(sample: Sample) -> str:
    if isinstance(sample, Pair):
        return sample.completion
    assert isinstance(sample, Conversation)
    answer = sample.messages[-1]
    if answer.tool_calls or not answer.content:
        raise DataError(
            f"{sample.place}: the answer calls a tool; expected a text with --task seq2seq; leave "
            "the record out"
        )
    return answer.content


class SourceAsker:
    """Returns the ids of a source as training gives them to the encoder.

    Args:
        tokenizer: transformers' tokenizer.
        max_length: the most tokens of a source; None cuts none.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length

    def ids(self, prompt: str | Sequence[Message], place: str, tools: Tools = ()) -> list[int]:
        """Return the ids of a source, with its EOS.

        Raises:
            DataError: see `source_text`.
        """
        (ids,) = encoded(self._tokenizer, [source_text(prompt, place, tools)])
        return ids if self._max_length is None else cut_source(ids, self._max_length)


def encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts with the tokenizer's own special tokens, each with an EOS at its end.

    Args:
        tokenizer: transformers' tokenizer; that of T5 puts an EOS behind every text.
        texts: sources or targets.
    """
    found = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [ids if ids and ids[-1] == eos else [*ids, eos] for ids in map(list, found)]


def cut_source(ids: list[int], most: int) -> list[int]:
    """Return the first ids of a source that is too long, and its EOS, as transformers cuts it."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


class SourceRows:
    """Makes rows of sources and targets, see `tokens.RowMaker`.

    `--max-length` bounds the source, and the target as well.

    Raises:
        ConfigError: the options are not for sources and targets.
        DataError: the samples are plain text.
    """

    weighs: str = SUPERVISED_TOKENS
    label_type = pyarrow.int32()
    has_token_types = False
    labels: Labels | None = None
    settings: Sequence[Any] = ("sources and targets", "marked targets are not learnt")

    def __init__(self, samples: Samples, tokenizer: Any, options: TokenOptions) -> None:
        if samples.shape is Shape.TEXT:
            raise DataError(
                f"{samples.source}: plain text; expected sources and targets with --task seq2seq: "
                "an encoder-decoder answers a text with another; give pairs such as "
                '{"prompt": ..., "completion": ...}'
            )
        if options.long_samples == "split":
            raise ConfigError(
                "--long-samples split: a target is of a whole source; expected truncate, drop or "
                "error with --task seq2seq; pass one of these"
            )
        self.samples, self.tokenizer = samples, tokenizer
        self.has_weights = samples.is_weighted
        self.max_length = options.max_length
        self.origin: Mapping[str, str | None] = {
            "data": samples.content_hash(),
            "tokenizer": Encoder(tokenizer).content_hash(),
            "template": None,
        }

    def on(self, samples: Samples) -> Self:
        """Return the maker of the rows of other samples."""
        other = copy(self)
        other.samples, other.has_weights = samples, samples.is_weighted
        return other

    def rows(self, indices: Sequence[int], faults: Faults) -> Iterator[tuple[int, Labelled]]:
        """Yield the row of each sample, however long."""
        kept, sources, targets = [], [], []
        for index in indices:
            try:
                source, target = _texts(self.samples.items[index])
            except DataError as error:
                faults.add(*error.faults)
                continue
            kept.append(index)
            sources.append(source)
            targets.append(target)
        if kept:
            pairs = (encoded(self.tokenizer, texts) for texts in (sources, targets))
            for index, source_ids, target_ids in zip(kept, *pairs, strict=True):
                yield index, _row(source_ids, target_ids, _weight(self.samples.items[index]))

    def count(self, index: int) -> int:
        """Return 1 for a target that is learnt, else 0."""
        return int(bool(_weight(self.samples.items[index])))

    def divided(self, index: int, tokens: int) -> None:
        """See `tokens.RowMaker`: a target is of a whole source."""

    def shorten(self, index: int, row: Labelled, how: LongSamples) -> list[Labelled]:
        """Return the start of the source with its EOS, and the start of the target."""
        assert row.source is not None
        source = cut_source(row.ids[: row.source], self.max_length)
        target = row.ids[row.source :][: self.max_length]
        return [_row(source, target, _weight(self.samples.items[index]))]

    def weight(self, labels: list[Any]) -> int:
        """Return the number of supervised tokens: those of the target."""
        return len(labels) - labels.count(IGNORED)

    def nothing_left(self, lost: int, how: LongSamples) -> str:
        """Say that all rows were too long, or that no target is to be learnt."""
        if not lost:
            return nothing_marked(self.samples)
        return (
            f"{self.samples.source}: all {len(self.samples.items):,} rows have a source or a "
            f"target longer than --max-length {self.max_length} and are left out; expected shorter "
            "ones; raise --max-length or pass --long-samples truncate"
        )


def _texts(sample: Sample) -> tuple[str, str]:
    """Return the source and the target of a sample."""
    if isinstance(sample, Pair):
        return sample.prompt, sample.completion
    assert isinstance(sample, Conversation)
    return source_text(sample.messages[:-1], sample.place, sample.tools), _target_text(sample)


def _weight(sample: Sample) -> float:
    """Return the weight of a target; 0: it is not learnt."""
    if isinstance(sample, Pair):
        return sample.loss_weight
    assert isinstance(sample, Conversation)
    answer = sample.messages[-1]
    return sample.loss_weight * answer.loss_weight * answer.is_learnt


def _row(source: list[int], target: list[int], weight: float) -> Labelled:
    before = len(source)
    labels = [IGNORED] * before + (target if weight else [IGNORED] * len(target))
    weights = None if weight in (0, 1) else [0.0] * before + [weight] * len(target)
    return Labelled(source + target, labels, aligned=True, source=before, weights=weights)

"""Token rows of tagged words: each sentence is a row, and the first token of a word has its tag.

Takes samples, their tags and a tokenizer; yields rows with the tokenizer's own special tokens. A
sentence that is too long becomes several rows, divided between words. Never loses a word: one that
the tokenizer makes no token of is read as an unknown one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora_kit.config import LongSamples, TokenOptions
from qlora_kit.data.encode import IGNORED, Labelled
from qlora_kit.data.fields import Faults
from qlora_kit.data.labelled_rows import MakerOfLabels, hash_of_tokenizer
from qlora_kit.data.labels import Labels
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import TaggedWords
from qlora_kit.errors import ConfigError, ModelError

TAGS = "tags"


class EncodedWords(NamedTuple):
    """The tokens of a sentence or of a part of it.

    Attributes:
        ids: with the tokenizer's special tokens.
        firsts: the place of the first token of each word.
    """

    ids: list[int]
    firsts: list[int]


class WordEncoder:
    """Encodes sentences as a model that tags words is given them, in training and afterwards.

    Words are joined by spaces and encoded as running text: byte-level tokenizers see the spaces
    that they have learnt, and need no `add_prefix_space`.

    Args:
        tokenizer: transformers' tokenizer.
        max_length: tokens that a row may have.

    Raises:
        ModelError: the tokenizer does not say which characters a token is of.
        ConfigError: so few tokens leave no room beside the special tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__}: a tokenizer without a fast version, which does not "
                "say which word a token is of; expected a tokenizer.json; choose another model"
            )
        self._tokenizer = tokenizer
        probe = tokenizer("a", return_special_tokens_mask=True, verbose=False)
        mask: list[int] = probe["special_tokens_mask"]
        self._before = mask.index(0)
        self._after = mask[::-1].index(0)
        self._room = max_length - self._before - self._after
        if self._room < 1:
            special = self._before + self._after
            raise ConfigError(
                f"--max-length {max_length}: a sentence has {special} special tokens; expected "
                f"room for a word beside them; pass {special + 1} or more"
            )

    def encode(self, sentences: Sequence[Sequence[str]]) -> list[EncodedWords | None]:
        """Return the tokens of sentences, however long; None of one with a word without tokens."""
        found = self._encode(sentences)
        lost = [number for number, each in enumerate(found) if IGNORED in each.firsts]
        if lost:
            again = [self._with_unknown(sentences[number], found[number]) for number in lost]
            for number, encoded in zip(lost, self._encode(again), strict=True):
                found[number] = encoded
        return [None if IGNORED in each.firsts else each for each in found]

    def _with_unknown(self, words: Sequence[str], encoded: EncodedWords) -> list[str]:
        unknown = self._tokenizer.unk_token or self._tokenizer.eos_token or ""
        return [
            unknown if first == IGNORED else word
            for word, first in zip(words, encoded.firsts, strict=True)
        ]

    def _encode(self, sentences: Sequence[Sequence[str]]) -> list[EncodedWords]:
        """Encode sentences; the place of a word without tokens is `IGNORED`."""
        made = self._tokenizer(
            [" ".join(words) for words in sentences],
            return_offsets_mapping=True, return_attention_mask=False, verbose=False,
        )  # fmt: skip
        pairs = zip(sentences, made["input_ids"], made["offset_mapping"], strict=True)
        return [EncodedWords(ids, self._firsts(words, offsets)) for words, ids, offsets in pairs]

    def _firsts(self, words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
        """Return the place of the first token of each word, or `IGNORED`.

        A token is of the word that its last character is of; it may begin with the space before.
        """
        starts, start = [], 0
        for word in words:
            starts.append(start)
            start += len(word) + 1
        firsts = [IGNORED] * len(words)
        for place in range(self._before, len(offsets) - self._after):
            first, end = offsets[place]
            of = bisect_right(starts, end - 1) - 1
            is_inside = first < end and end <= starts[of] + len(words[of])
            if is_inside and firsts[of] == IGNORED:
                firsts[of] = place
        return firsts

    def parts(self, encoded: EncodedWords) -> list[EncodedWords]:
        """Divide a sentence between words into parts that fit.

        A word that does not fit alone is cut.
        """
        ids, firsts = encoded
        behind = len(ids) - self._after
        ends = [*firsts[1:], behind]
        parts, start, own = [], firsts[0], 0
        for number, end in enumerate(ends):
            if end - start > self._room and number > own:
                parts.append(self._part(encoded, start, firsts[own:number], ends[number - 1]))
                start, own = firsts[number], number
        return [*parts, self._part(encoded, start, firsts[own:], behind)]

    def _part(
        self, encoded: EncodedWords, start: int, firsts: Sequence[int], end: int
    ) -> EncodedWords:
        before = encoded.ids[: self._before]
        behind = encoded.ids[len(encoded.ids) - self._after :]
        body = encoded.ids[start:end][: self._room]
        return EncodedWords(
            [*before, *body, *behind], [first - start + self._before for first in firsts]
        )


@dataclass(frozen=True)
class TaggedRows:
    """Makes the maker of rows for samples with these tags, see `tokens.MakesRows`."""

    labels: Labels

    def __call__(self, samples: Samples, tokenizer: Any, options: TokenOptions) -> TaggedRowMaker:
        """Return the maker of the rows of some samples.

        Raises:
            ConfigError: `max_length` leaves no room for a word.
            DataError: a tag of a sample is not known.
            ModelError: see `WordEncoder`.
        """
        encoder = WordEncoder(tokenizer, options.max_length)
        self.labels.check(samples)
        return TaggedRowMaker(samples, self.labels, encoder, hash_of_tokenizer(tokenizer))


class TaggedRowMaker(MakerOfLabels):
    """Makes rows of tagged words, see `tokens.RowMaker`."""

    weighs = TAGS

    def __init__(
        self, samples: Samples, labels: Labels, encoder: WordEncoder, tokenizer_hash: str
    ) -> None:
        super().__init__(samples, labels, tokenizer_hash)
        self._encoder = encoder

    def rows(self, indices: Sequence[int], faults: Faults) -> Iterator[tuple[int, Labelled]]:
        """Yield the row of each sentence, however long."""
        samples = [self._sample(index) for index in indices]
        encoded = self._encoder.encode([sample.words for sample in samples])
        for index, sample, made in zip(indices, samples, encoded, strict=True):
            if made is not None:
                yield index, tagged(made, self._known.target(sample))
            else:
                faults.add(
                    f"{sample.place}: the tokenizer makes no token of a word, and has none for "
                    "unknown ones; expected some to read; correct it, or remove the record"
                )

    def _sample(self, index: int) -> TaggedWords:
        sample = self.samples.items[index]
        assert isinstance(sample, TaggedWords)
        return sample

    def shorten(self, index: int, row: Labelled, how: LongSamples) -> list[Labelled]:
        """Return the row in parts, or its first part where it is truncated."""
        firsts = words_of(row.labels)
        parts = self._encoder.parts(EncodedWords(row.ids, firsts))
        tags = iter([row.labels[first] for first in firsts])
        made = [tagged(part, [next(tags) for _ in part.firsts]) for part in parts]
        return made if how == "split" else made[:1]

    def weight(self, labels: list[Any]) -> int:
        """Return the number of tags."""
        return len(words_of(labels))

    def nothing_left(self, lost: int, how: LongSamples) -> str:
        """Say that all rows were too long."""
        return (
            f"{self.samples.source}: all sentences, {lost:,} words, are too long and left out; "
            "expected shorter ones; raise --max-length or pass --long-samples split"
        )


def tagged(encoded: EncodedWords, tags: Sequence[float]) -> Labelled:
    """Return the row of a sentence: a tag at the first token of each word, `IGNORED` elsewhere."""
    labels: list[Any] = [IGNORED] * len(encoded.ids)
    for first, tag in zip(encoded.firsts, tags, strict=True):
        labels[first] = int(tag)
    return Labelled(encoded.ids, labels, aligned=True)


def words_of(labels: Sequence[int]) -> list[int]:
    """Return the places of a row's tags: of the first token of each word."""
    return [place for place, label in enumerate(labels) if label != IGNORED]

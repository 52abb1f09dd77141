"""Reads prompts for a model that tags words, and gathers the entities that its tags spell.

Takes texts and the likelihoods of tags; returns entities with their places in the text. Loads
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_kit.data.tag_schemes import entities, has_scheme

if TYPE_CHECKING:
    from qlora_kit.data.batch import Row
    from qlora_kit.data.tagged_rows import EncodedWords
    from qlora_kit.model.class_head import ClassHead

# Tagged data has marks apart from words: a word is letters and digits, joined by a sign inside;
# or an abbreviation with its dots; or one mark.
_BETWEEN_SPACES = re.compile(r"\S+")
_WORD = re.compile(r"(?:\w\.){2,}|\w+(?:[-'’.&]\w+)*|[^\w\s]")
_MOST_LISTED = 50


class _Sentence(NamedTuple):
    """A text, and the half-open range of the characters of each word."""

    text: str
    words: list[tuple[int, int]]


class WordReader:
    """Reads each text word by word.

    Args:
        classes: the tags.
        tokenizer: transformers' tokenizer.
        max_length: tokens that a row may have; a longer text has several.
        is_raw: whether words are whatever stands between spaces.
    """

    def __init__(
        self, classes: ClassHead, tokenizer: Any, max_length: int, *, is_raw: bool = False
    ) -> None:
        from qlora_kit.data.tagged_rows import WordEncoder

        self._names = classes.names
        self._encoder = WordEncoder(tokenizer, max_length)
        self._max_length = max_length
        self._word = _BETWEEN_SPACES if is_raw else _WORD
        self._sentences: list[_Sentence] = []
        self._firsts: list[list[list[int]]] = []

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """Return the rows of all texts; `row` is the index of a text.

        A text without words, or with one that the tokenizer has no token for, has no row.
        """
        from qlora_kit.data.tagged_rows import tagged

        self._sentences = [
            _Sentence(text, [match.span() for match in self._word.finditer(text)]) for text in texts
        ]
        words = [[each.text[slice(*span)] for span in each.words] for each in self._sentences]
        rows: list[Row] = []
        for index, encoded in enumerate(self._encoder.encode(words)):
            parts: list[EncodedWords] = []
            if encoded is not None and words[index]:
                is_long = len(encoded.ids) > self._max_length
                parts = self._encoder.parts(encoded) if is_long else [encoded]
            self._firsts.append([part.firsts for part in parts])
            for part in parts:
                row = tagged(part, [0] * len(part.firsts))
                rows.append({"input_ids": row.ids, "labels": row.labels, "row": index})
        return rows

    def answer(self, index: int, values: Sequence[list[Any]]) -> dict[str, Any]:
        """Return the entities of a text, or the tag of each word where tags have no scheme.

        Args:
            index: of the text.
            values: for each row of the text, how likely each tag is at each token.
        """
        likely = [
            part[first]
            for part, firsts in zip(values, self._firsts[index], strict=True)
            for first in firsts
        ]
        best = [max(range(len(shares)), key=shares.__getitem__) for shares in likely]
        chances = [shares[tag] for shares, tag in zip(likely, best, strict=True)]
        tags = [self._names[tag] for tag in best]
        if has_scheme(self._names):
            return {"entities": [*_entities(self._sentences[index], tags, chances)]}
        sentence = self._sentences[index]
        whole = zip(tags, range(len(tags)), chances, strict=True)
        return {
            "words": [_found(sentence, "tag", tag, n, n + 1, chance) for tag, n, chance in whole]
        }

    def in_words(self, answer: dict[str, Any]) -> str:
        """Return an answer as one line."""
        found = answer.get("entities", answer.get("words", ()))
        parts = [
            f"{each.get('type', each.get('tag'))} {' '.join(each['text'].split())} "
            f"{each['probability']:.3f} [{each['start']}:{each['end']}]"
            for each in found[:_MOST_LISTED]
        ]
        more = [f"and {len(found) - len(parts):,} more"] if len(found) > len(parts) else []
        return "; ".join([*parts, *more]) or "no entity"


def _entities(
    sentence: _Sentence, tags: Sequence[str], chances: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield the entities; the probability of one is the mean of those of its words' tags."""
    for kind, start, end in entities(tags):
        mean = sum(chances[start:end]) / (end - start)
        yield _found(sentence, "type", kind, start, end, mean)


def _found(
    sentence: _Sentence, what: str, name: str, first: int, behind: int, chance: float
) -> dict[str, Any]:
    """Return what was found in some words, with its place in the text in characters."""
    start, end = sentence.words[first][0], sentence.words[behind - 1][1]
    return {
        what: name, "text": sentence.text[start:end], "start": start, "end": end,
        "probability": chance,
    }  # fmt: skip

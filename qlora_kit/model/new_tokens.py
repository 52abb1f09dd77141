"""Tokens that are added to a tokenizer, `--new-tokens`, and the rows of a model that they need.

Takes a tokenizer, changed in place; returns `NewTokens`. A model's tables grow only where they have
no spare rows: many have more rows than their tokenizer has tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import ModelError

_BEFORE, _AFTER = "one ", " two"


@dataclass(frozen=True)
class NewTokens:
    """Tokens whose rows are trained.

    Attributes:
        texts: the tokens.
        ids: their numbers.
        added: those that the tokenizer did not have.
        known: number of tokens that the tokenizer had before.
    """

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    added: tuple[str, ...]
    known: int

    @property
    def fresh(self) -> frozenset[int]:
        """The numbers of those that no row was learnt for."""
        pairs = zip(self.texts, self.ids, strict=True)
        return frozenset(number for text, number in pairs if text in self.added)

    def rows_needed(self, rows: int | None) -> int | None:
        """Return how many rows a model needs for them; None if it has that many.

        Args:
            rows: the rows that its tables have; None where it does not say.
        """
        return max(self.ids) + 1 if rows is not None and max(self.ids) >= rows else None

    def describe(self, rows: int | None) -> Iterator[str]:
        """Yield what the tokens are and where their rows start, for notices."""
        if self.added:
            grown = self.rows_needed(rows)
            where = f"grow from {rows} to {grown} rows" if grown else "have spare rows for them"
            yield (
                f"--new-tokens: {', '.join(self.added)} added to the tokenizer; the model's tables "
                f"{where}, which start at the mean of the {min(self.known, rows or self.known):,} "
                "known ones"
            )
        had = [text for text in self.texts if text not in self.added]
        if had:
            yield (
                f"--new-tokens: the tokenizer has {', '.join(had)} already; only their rows are "
                "trained"
            )


def add_tokens(tokenizer: Any, texts: Sequence[str], name: str) -> NewTokens:
    """Add tokens to a tokenizer, but for those that it has as one token.

    They are no special tokens: decoding shows them.

    Args:
        tokenizer: transformers' tokenizer.
        texts: the tokens.
        name: of the model, for an error.

    Raises:
        ModelError: a token is not found in a text that has it.
    """
    from tokenizers import AddedToken

    known = len(tokenizer)
    had = {text for text in texts if _is_one(tokenizer, text)}
    added = [text for text in texts if text not in had]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    ids = tuple(int(tokenizer.convert_tokens_to_ids(text)) for text in texts)
    for text, number in zip(texts, ids, strict=True):
        found = tokenizer(f"{_BEFORE}{text}{_AFTER}", add_special_tokens=False)["input_ids"]
        if text not in had and found.count(number) != 1:
            raise ModelError(
                f"{name}: its tokenizer does not find {text!r} in a text after it was added; "
                "expected a tokenizer that takes tokens; choose another token"
            )
    return NewTokens(tuple(texts), ids, tuple(added), known)


def changed_by_decoding(tokenizer: Any, tokens: NewTokens) -> Iterator[tuple[str, str]]:
    """Yield texts with an added token in the middle that do not come back as they were.

    The tokenizers of Llama 2 put a space before every text, also before what follows a token.
    """
    for text in tokens.added:
        whole = f"{_BEFORE}{text}{_AFTER}"
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.lstrip(" ") != whole:
            yield whole, back


def _is_one(tokenizer: Any, text: str) -> bool:
    number = tokenizer.get_vocab().get(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return number is not None and [*ids] == [number]

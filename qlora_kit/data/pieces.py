"""Cuts a token row into pieces of readable text, and says which of them are supervised.

Takes ids and labels; returns one `Piece` a token, or a token group where several make up one
character. Never changes what a tokenizer decodes, but for secrets, which are not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.encode import IGNORED
from qlora_kit.redact import redacted

# What a decoder writes for bytes that are not a whole character yet; none has more than four.
_INCOMPLETE = "\ufffd"
_MOST_BYTES = 4
WITHHELD = "[not shown: this row holds what looks like a secret]"


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of a token, or of a few that are only together a character."""

    text: str
    ids: tuple[int, ...]
    is_supervised: bool
    """whether a loss is computed for it"""
    is_special: bool
    """whether it is a token with a meaning of its own, such as an end token"""


def pieces_of(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> tuple[Piece, ...]:
    """Return the pieces of a token row, in order.

    A row that holds what looks like a secret becomes one piece that says so: cut into tokens, it
    would pass the redaction of whatever is printed.

    Args:
        tokenizer: transformers' tokenizer.
        ids: of the row.
        labels: of the same length; see `encode.IGNORED`.
    """
    pieces = tuple(_pieces(tokenizer, ids, labels))
    text = "".join(piece.text for piece in pieces)
    if redacted(text) != text:
        return (Piece(WITHHELD, (), is_supervised=False, is_special=True),)
    return pieces


def _pieces(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> Iterator[Piece]:
    special = special_ids(tokenizer)
    # The first token of a row has none before it that would predict it.
    supervised = [at > 0 and label != IGNORED for at, label in enumerate(labels)]
    before = start = 0
    for end in range(1, len(ids) + 1):
        text = _added_text(tokenizer, ids[before:start], ids[start:end])
        goes_on = end < len(ids) and supervised[end] == supervised[start]
        if text.endswith(_INCOMPLETE) and goes_on and end - start < _MOST_BYTES:
            continue
        group = tuple(ids[start:end])
        yield Piece(text, group, supervised[start], special.issuperset(group))
        before, start = start, end


def _added_text(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """Return what tokens add to the text of those before them.

    Alone, a token would lose the space it begins with: decoders take it off a text's start.
    """
    context = _decode(tokenizer, before)
    text = _decode(tokenizer, [*before, *ids])
    return text[len(context) :] if text.startswith(context) else _decode(tokenizer, ids)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of all tokens that a tokenizer declares special."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return frozenset(
        [*tokenizer.all_special_ids, *(number for number, token in added if token.special)]
    )

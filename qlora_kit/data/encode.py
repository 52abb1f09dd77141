"""Turns rendered text into token ids and labels, and ids and labels into text for a reader.

`Encoder` takes `Rendered` texts and returns ids with labels of the same length; the ids of a
generation prompt are a prefix of the ids that are trained on. `pieces_of` takes ids and labels and
returns the text of each token, with secrets withheld. Never shortens a row.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from qlora_kit.data.chat_text import wants_bos
from qlora_kit.data.template import Rendered
from qlora_kit.redact import redacted

IGNORED = -100
"""label of a token that is not supervised"""
LOSS_WEIGHTS = "loss_weights"
"""name of the column with the factor of each token's loss; null where a row has no weights"""

CHOSEN_TOKENS = "chosen_tokens"
"""name of the column with the tokens of a row that are the first of two sequences, where it has two
"""

# An anchor is put before a piece and taken away again: some tokenizers add a space to the start
# of every text.
_ANCHORS = ("", "\n")

# A decoder writes this for bytes that do not make up a character yet. A character has at most four.
_INCOMPLETE = "\ufffd"
_MOST_BYTES = 4
WITHHELD = "[not shown: this row holds what looks like a secret]"


class Labelled(NamedTuple):
    """Token ids and their labels: the id itself at the same position, or `IGNORED`.

    A row that is classified has the labels of the whole row instead, see `Labels.target`.
    """

    ids: list[int]
    labels: list[Any]
    aligned: bool
    """whether no token straddles the end of a prompt"""
    token_types: list[int] | None = None
    """the text that each token is of, where the model is told that"""
    source: int | None = None
    """tokens at the start that an encoder reads, where the rest is written apart"""
    weights: list[float] | None = None
    """factor of the loss of each token; None where all that are supervised have 1"""
    image: str | None = None
    """the file of an image, where the row is one"""

    @property
    def length(self) -> int:
        """Tokens that a limit is for: of the row, or of the longer of its source and target."""
        tokens = len(self.ids)
        return tokens if self.source is None else max(self.source, tokens - self.source)

    def part(self, start: int, end: int, opening: Sequence[int] = ()) -> Labelled:
        """Return some of the tokens, without types, behind ids that are not supervised."""
        before = len(opening)
        weights = self.weights
        return Labelled(
            [*opening, *self.ids[start:end]],
            [IGNORED] * before + self.labels[start:end],
            self.aligned,
            weights=None if weights is None else [0.0] * before + weights[start:end],
        )


class _Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]
    """half-open character range of each token, in order"""


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Encode a generation prompt as training encodes the start of a row: with one BOS, no EOS."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _with_bos(ids, tokenizer.bos_token_id) if wants_bos(tokenizer) else list(ids)


def _with_bos(ids: list[int], bos: int) -> list[int]:
    return [bos, *ids[_leading(ids, bos) :]]


def _leading(ids: list[int], token: int) -> int:
    count = 0
    while count < len(ids) and ids[count] == token:
        count += 1
    return count


class Encoder:
    """Encodes rendered texts in batches.

    Args:
        tokenizer: transformers' tokenizer; one with a Rust backend is fast, any other encodes
            piece by piece.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bos = tokenizer.bos_token_id if wants_bos(tokenizer) else None
        self._eos = tokenizer.eos_token_id
        self._backend = _bare_copy(getattr(tokenizer, "backend_tokenizer", None))

    @property
    def puts_bos(self) -> bool:
        """Whether rows begin with a BOS token, see `wants_bos`."""
        return self._bos is not None

    def content_hash(self) -> str:
        """Return the SHA-256 of everything that decides the ids of a text."""
        if self._backend is not None:
            content = self._backend.to_str()
        else:
            content = json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        state = json.dumps([type(self._tokenizer).__name__, self._bos, self._eos])
        return hashlib.sha256((state + content).encode()).hexdigest()

    def encode(self, rendered: Sequence[Rendered]) -> list[Labelled]:
        """Encode texts, supervise the tokens of their spans, and add BOS and EOS.

        Each text is encoded whole. Where a token would straddle the end of a prompt, prompt and
        answer are encoded apart and joined, provided that the joined ids decode to the same text.
        So the ids of the first prompt are always a prefix of the row's ids. The ids of a later
        prompt are one as well, unless an earlier answer had to be encoded apart.
        """
        if self._backend is None:
            return [self._label_without_offsets(item) for item in rendered]
        whole = self._encode([item.text for item in rendered])
        differing = self._differing_prompts(rendered, whole)
        rows = []
        for index, (item, encoded) in enumerate(zip(rendered, whole, strict=True)):
            cuts = [
                start
                for start in item.answers
                if not _is_cut(encoded, start)
                or (index in differing and _context_matters(item.text, start))
            ]
            joined = self._join(item.text, cuts, encoded) if cuts else encoded
            rows.append(self._label(item, joined or encoded, aligned=joined is not None))
        return rows

    def _differing_prompts(
        self, rendered: Sequence[Rendered], whole: Sequence[_Encoded]
    ) -> set[int]:
        """Return the indices of the texts whose first prompt has other ids when it stands alone.

        Only prompts whose encoding could depend on the text after them are encoded.
        """
        indices = [
            index
            for index, item in enumerate(rendered)
            if item.answers and _context_matters(item.text, item.answers[0])
        ]
        prompts = [rendered[index].text[: rendered[index].answers[0]] for index in indices]
        return {
            index
            for index, prompt in zip(indices, self._encode(prompts), strict=True)
            if whole[index].ids[: len(prompt.ids)] != prompt.ids
        }

    def _label(self, item: Rendered, encoded: _Encoded, aligned: bool) -> Labelled:
        ids, offsets = encoded
        labels, weights = [IGNORED] * len(ids), [0.0] * len(ids)
        factors = item.weights or (1.0,) * len(item.spans)
        for (start, end), factor in zip(item.spans, factors, strict=True):
            first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
            while first and offsets[first - 1][1] > start:
                first -= 1
            labels[first:last] = ids[first:last]
            weights[first:last] = [factor] * (last - first)
        if self._bos is not None:
            given = _leading(ids, self._bos)
            ids, labels = _with_bos(ids, self._bos), [IGNORED, *labels[given:]]
            weights = [0.0, *weights[given:]]
        if item.append_eos:
            body = -1 if ids and ids[-1] == self._eos else len(ids)
            ids = [*ids[:body], self._eos]
            labels = [*labels[:body], self._eos]
            weights = [*weights[:body], factors[-1]]
        return Labelled(ids, labels, aligned, weights=weights if item.weights else None)

    # ------------------------------------------------------------ pieces

    def _join(self, text: str, cuts: Sequence[int], whole: _Encoded) -> _Encoded | None:
        """Encode `text` cut at `cuts`; return None where the ids would decode to another text."""
        expected = _text_of_ids(self._tokenizer, whole.ids)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in pairwise((0, *cuts, len(text))):
            for anchor in _ANCHORS if start else ("",):
                piece = self._piece(text[start:end], anchor)
                if expected.startswith(_text_of_ids(self._tokenizer, ids + piece.ids)):
                    break
            else:
                return None
            ids += piece.ids
            offsets += [(start + first, start + last) for first, last in piece.offsets]
        return _Encoded(ids, offsets) if _text_of_ids(self._tokenizer, ids) == expected else None

    def _label_without_offsets(self, item: Rendered) -> Labelled:
        """Encode with a tokenizer that gives no offsets: every edge of a span is a cut."""
        edges = sorted({edge for span in item.spans for edge in span} - {0, len(item.text)})
        whole = self._piece(item.text, "")
        joined = self._join(item.text, edges, whole)
        encoded = joined or self._by_prefixes(item.text, edges, whole)
        return self._label(item, encoded, aligned=joined is not None)

    def _by_prefixes(self, text: str, edges: Sequence[int], whole: _Encoded) -> _Encoded:
        """Give each token the range of the piece it lies in.

        Each prefix of the text up to an edge is encoded; the ids it shares with the whole text lie
        before that edge.
        """
        found = [0]
        for edge in edges:
            prefix = self._piece(text[:edge], "").ids
            found.append(max(found[-1], _agreeing(whole.ids, prefix)))
        offsets: list[tuple[int, int]] = []
        pieces = zip(
            pairwise((0, *edges, len(text))), pairwise((*found, len(whole.ids))), strict=True
        )
        for piece, (first, last) in pieces:
            offsets += [piece] * (last - first)
        return _Encoded(whole.ids, offsets)

    def _piece(self, text: str, anchor: str) -> _Encoded:
        (encoded,) = self._encode([anchor + text])
        if not anchor:
            return encoded
        (before,) = self._encode([anchor])
        count, width = len(before.ids), len(anchor)
        if encoded.ids[:count] != before.ids:
            return encoded
        offsets = [(first - width, last - width) for first, last in encoded.offsets[count:]]
        return _Encoded(encoded.ids[count:], offsets)

    # ------------------------------------------------------------ the tokenizer itself

    def _encode(self, texts: list[str]) -> list[_Encoded]:
        if self._backend is not None:
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            return [_Encoded(encoding.ids, encoding.offsets) for encoding in encodings]
        encoded = []
        for text in texts:
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            encoded.append(_Encoded(ids, [(0, len(text))] * len(ids)))
        return encoded


def _text_of_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of ids that both sequences begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _bare_copy(backend: Any) -> Any:
    """Copy a Rust tokenizer without its post-processor, truncation and padding.

    Post-processors of byte-level tokenizers trim white space off the offsets, which hides a
    token that straddles the end of a prompt. `Encoder` adds BOS and EOS itself.
    """
    if backend is None:
        return None
    import tokenizers

    copy: Any = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.post_processor = None
    copy.no_truncation()
    copy.no_padding()
    return copy


def _is_cut(encoded: _Encoded, position: int) -> bool:
    """Whether no token covers characters on both sides of `position`."""
    index = bisect_left(encoded.offsets, (position,))
    return index == 0 or encoded.offsets[index - 1][1] <= position


def _context_matters(text: str, position: int) -> bool:
    r"""Whether the text before `position` may be split differently when nothing follows it.

    The split rules of byte-level tokenizers look ahead in a run of white space (`\s+(?!\S)`) and
    in a run of digits, which they group from the right. Elsewhere a token border is enough.
    """
    before = text[max(position - 2, 0) : position]
    return before[-1:].isdigit() or (len(before) == 2 and before.isspace())


# ---------------------------------------------------------------- pieces to read


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of a token, or of the few tokens that make up one character together."""

    text: str
    ids: tuple[int, ...]
    weight: float
    """the factor of its loss; 0: no loss is computed for it"""
    is_special: bool
    """whether it is a token with a meaning of its own, such as an end token"""

    @property
    def is_supervised(self) -> bool:
        """Whether a loss is computed for it."""
        return self.weight > 0


def pieces_of(
    tokenizer: Any,
    ids: Sequence[int],
    labels: Sequence[int],
    weights: Sequence[float] | None = None,
) -> tuple[Piece, ...]:
    """Return the pieces of a token row, in order.

    A row that seems to hold a secret becomes a single piece that says so: cut into tokens, the
    secret would pass the redaction of printed text.

    Args:
        tokenizer: transformers' tokenizer.
        ids: token ids of the row.
        labels: labels of the row, of the same length, see `IGNORED`.
        weights: the factor of the loss of each token; None: 1 where it is supervised.
    """
    factors = [1.0] * len(ids) if weights is None else weights
    # No token comes before the first token of a row, so nothing predicts it.
    learnt = [at > 0 and label != IGNORED for at, label in enumerate(labels)]
    in_force = [weight if is_on else 0.0 for weight, is_on in zip(factors, learnt, strict=True)]
    pieces = tuple(_pieces(tokenizer, ids, in_force))
    text = "".join(piece.text for piece in pieces)
    if redacted(text) != text:
        return (Piece(WITHHELD, (), weight=0.0, is_special=True),)
    return pieces


def _pieces(tokenizer: Any, ids: Sequence[int], weights: Sequence[float]) -> Iterator[Piece]:
    special = _special_ids(tokenizer)
    before = start = 0
    for end in range(1, len(ids) + 1):
        text = _added_text(tokenizer, ids[before:start], ids[start:end])
        goes_on = end < len(ids) and weights[end] == weights[start]
        if text.endswith(_INCOMPLETE) and goes_on and end - start < _MOST_BYTES:
            continue
        group = tuple(ids[start:end])
        yield Piece(text, group, weights[start], special.issuperset(group))
        before, start = start, end


def _added_text(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that tokens add to the text of the tokens before them.

    Decoded alone, a token would lose the space it begins with: decoders strip it from the start
    of a text.
    """
    context = _text_of_ids(tokenizer, before)
    text = _text_of_ids(tokenizer, [*before, *ids])
    return text[len(context) :] if text.startswith(context) else _text_of_ids(tokenizer, ids)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of all tokens that a tokenizer declares special."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return frozenset(
        [*tokenizer.all_special_ids, *(number for number, token in added if token.special)]
    )

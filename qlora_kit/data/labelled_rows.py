"""Token rows of labelled texts: each text or pair of texts is a row, with the labels of the whole.

Takes samples, their labels and a tokenizer; yields rows with the tokenizer's own special tokens,
cut as transformers cuts them. Never makes two rows of a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import pyarrow

from qlora_kit.config import LongSamples, TokenOptions
from qlora_kit.data.encode import Labelled
from qlora_kit.data.fields import Faults
from qlora_kit.data.labels import Labels
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import LabelledText, Shape
from qlora_kit.errors import ConfigError

LABELS = "labels"


class EncodedText(NamedTuple):
    """The tokens of a text or of a pair of texts.

    Attributes:
        ids: with the tokenizer's special tokens.
        token_types: the text that each token is of; None where the model is not told that.
    """

    ids: list[int]
    token_types: list[int] | None


class TextEncoder:
    """Encodes texts as a model that classifies is given them, in training and afterwards.

    Args:
        tokenizer: transformers' tokenizer.
        max_length: tokens that a text, or a pair of texts together, may have.

    Raises:
        ConfigError: so few tokens leave no room beside the special tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length

    def encode(self, text: str, second: str | None = None) -> EncodedText:
        """Return a text or a pair of texts, cut to length as transformers does.

        Tokens are taken from the end of the longer text until both fit, which transformers names
        `longest_first`; from its start where the tokenizer's `truncation_side` says so.
        """
        self.check_room(is_pair=second is not None)
        (encoded,) = self._encode([text], None if second is None else [second], cut=True)
        return encoded

    def length(self, text: str) -> int:
        """Return the number of tokens of a text before it is cut."""
        return len(self._encode([text], None)[0].ids)

    def encode_whole(self, samples: Sequence[LabelledText]) -> list[EncodedText]:
        """Return samples, all of them pairs or none, however long they are."""
        seconds = [sample.second or "" for sample in samples]
        is_pair = bool(samples) and samples[0].second is not None
        return self._encode([sample.text for sample in samples], seconds if is_pair else None)

    def check_room(self, *, is_pair: bool) -> None:
        """Check that special tokens leave room for a token of each text.

        Raises:
            ConfigError: they do not.
        """
        special = self._tokenizer.num_special_tokens_to_add(pair=is_pair)
        least = special + (2 if is_pair else 1)
        if self._max_length < least:
            what = "a pair of texts" if is_pair else "a text"
            raise ConfigError(
                f"--max-length {self._max_length}: {what} has {special} special tokens; expected "
                f"room for the text beside them; pass {least} or more"
            )

    def _encode(
        self, texts: list[str], seconds: list[str] | None, *, cut: bool = False
    ) -> list[EncodedText]:
        length = {"truncation": "longest_first", "max_length": self._max_length} if cut else {}
        found = self._tokenizer(
            texts, seconds, return_attention_mask=False, verbose=False, **length
        )
        # Types that are all 0 say nothing, and a model takes them for granted.
        types = found.get("token_type_ids") or [None] * len(texts)
        pairs = zip(found["input_ids"], types, strict=True)
        return [EncodedText(ids, kinds if kinds and any(kinds) else None) for ids, kinds in pairs]


def hash_of_tokenizer(tokenizer: Any) -> str:
    """Return the SHA-256 of everything that decides the ids of a text."""
    # A tokenizer keeps the lengths that its last call has set; these calls take them back.
    probe = [tokenizer("a b", verbose=False), tokenizer("a b", "c", verbose=False)]
    state = [type(tokenizer).__name__, tokenizer.truncation_side, list(map(dict, probe))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
    else:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256((json.dumps(state) + content).encode()).hexdigest()


@dataclass(frozen=True)
class LabelledRows:
    """Makes the maker of rows for samples with these labels, see `tokens.MakesRows`."""

    labels: Labels

    def __call__(self, samples: Samples, tokenizer: Any, options: TokenOptions) -> LabelledRowMaker:
        """Return the maker of the rows of some samples.

        Raises:
            ConfigError: the options are not for labelled texts.
            DataError: the label of a sample is not known.
        """
        if samples.shape is Shape.IMAGE:
            raise ConfigError(
                f"--data: {samples.source} has images, and the model reads text; expected labelled "
                "texts; name them, or a model of images such as a ViT"
            )
        if options.long_samples == "split":
            raise ConfigError(
                "--long-samples split: a label is of a whole text; expected truncate, drop or "
                "error with --task classify; pass one of these"
            )
        self.labels.check(samples)
        encoder = TextEncoder(tokenizer, options.max_length)
        return LabelledRowMaker(samples, self.labels, encoder, hash_of_tokenizer(tokenizer))


class MakerOfLabels:
    """What all makers of rows with labels have in common, see `tokens.RowMaker`."""

    has_token_types = False
    has_weights = False

    def __init__(self, samples: Samples, labels: Labels, tokenizer_hash: str) -> None:
        self.samples = samples
        self.labels: Labels | None = labels
        self.settings: Sequence[Any] = []
        self.label_type = pyarrow.float64() if labels.kind == "regression" else pyarrow.int32()
        self.origin: Mapping[str, str | None] = {
            "data": samples.content_hash(),
            "tokenizer": tokenizer_hash,
            "template": None,
            LABELS: labels.content_hash(),
        }
        self._known = labels

    def count(self, index: int) -> int:
        """Return 1: whatever a sample has labels for is learnt."""
        return 1

    def divided(self, index: int, tokens: int) -> None:
        """See `tokens.RowMaker`: no row has borders within it but those that `shorten` knows."""

    def on(self, samples: Samples) -> Self:
        """Return the maker of the rows of other samples.

        Raises:
            DataError: the label of a sample is not known.
        """
        self._known.check(samples)
        other = copy(self)
        other.samples = samples
        return other

    def nothing_left(self, lost: int, how: LongSamples) -> str:
        """Say that all rows were too long."""
        return (
            f"{self.samples.source}: all {lost:,} rows are too long and left out; expected shorter "
            "ones; raise --max-length or pass --long-samples truncate"
        )


class LabelledRowMaker(MakerOfLabels):
    """Makes rows of labelled texts, see `tokens.RowMaker`."""

    weighs = LABELS

    def __init__(
        self, samples: Samples, labels: Labels, encoder: TextEncoder, tokenizer_hash: str
    ) -> None:
        super().__init__(samples, labels, tokenizer_hash)
        self._encoder = encoder
        first = self._sample(0)
        encoder.check_room(is_pair=first.second is not None)
        self.has_token_types = encoder.encode_whole([first])[0].token_types is not None

    def _sample(self, index: int) -> LabelledText:
        sample = self.samples.items[index]
        assert isinstance(sample, LabelledText)
        return sample

    def rows(self, indices: Sequence[int], faults: Faults) -> Iterator[tuple[int, Labelled]]:
        """Yield the row of each sample, however long."""
        samples = [self._sample(index) for index in indices]
        encoded = self._encoder.encode_whole(samples)
        for index, sample, made in zip(indices, samples, encoded, strict=True):
            if made.ids:
                yield index, self._labelled(sample, made)
            else:
                faults.add(
                    f"{sample.place}: the tokenizer makes no token of the text; expected some to "
                    "read; correct it, or remove the record"
                )

    def _labelled(self, sample: LabelledText, encoded: EncodedText) -> Labelled:
        types = encoded.token_types or [0] * len(encoded.ids) if self.has_token_types else None
        return Labelled(encoded.ids, self._known.target(sample), aligned=True, token_types=types)

    def shorten(self, index: int, row: Labelled, how: LongSamples) -> list[Labelled]:
        """Return the row as transformers truncates it."""
        sample = self._sample(index)
        return [self._labelled(sample, self._encoder.encode(sample.text, sample.second))]

    def weight(self, labels: list[Any]) -> int:
        """Return 1: rows count alike, with however many labels."""
        return 1

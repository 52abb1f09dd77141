"""Token rows of labelled texts: framed and cut as transformers does, with labels and types."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
from data_fixtures import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.config import TaskOptions, TokenOptions
from qlora_kit.data.labelled_rows import LabelledRows, TextEncoder, hash_of_tokenizer
from qlora_kit.data.labels import Labels, labels_of
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import LabelledText, Pair, Shape
from qlora_kit.data.tokens import Tokenized, split_validation, tokenize
from qlora_kit.errors import ConfigError, DataError

WORDS = ["good", "bad", "film", "the", "a", "story", "dull", "great"]


@lru_cache
def _word_level() -> str:
    """Make a tokenizer of words that frames texts as BERT's does."""
    tokenizer: Any = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(each, tokenizer.token_to_id(each)) for each in ("[CLS]", "[SEP]")],
    )
    return str(tokenizer.to_str())


def _encoder_tokenizer(**options: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_word_level()),
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], **options,
    )  # fmt: skip


def _samples(*items: tuple[Any, ...]) -> Samples:
    texts = [
        LabelledText(text[0], f"a.csv:{n}", *text[1:], label=label)
        for n, (*text, label) in enumerate(items, 1)
    ]
    is_pair = texts[0].second is not None
    return Samples(texts, Shape.CLASSIFY_PAIR if is_pair else Shape.CLASSIFY, "a.csv")


def _rows(
    tokenizer: Any,
    samples: Samples,
    labels: Labels | None = None,
    cache: bool = False,
    **options: Any,
) -> Tokenized:
    labels = labels or labels_of(samples, TaskOptions())
    return tokenize(
        samples, tokenizer, TokenOptions(**options), makes=LabelledRows(labels), cache=cache
    )


TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
TWO = [("good film", "pos"), ("bad film", "neg")]
PAIRS = [("good film", "a great story", 1), ("bad film", "a dull story", 0)]


# ---------------------------------------------------------------- as transformers


@given(
    texts=st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=4), is_pair=st.booleans(),
    most=st.integers(5, 20), side=st.sampled_from(["right", "left"]), frames=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_rows_are_framed_and_cut_as_transformers_does(
    texts: list[tuple[str, str]], is_pair: bool, most: int, side: str, frames: bool
) -> None:
    make = _encoder_tokenizer if frames else make_tokenizer
    tokenizer = make(truncation_side=side)
    given_texts = [text if is_pair else text[:1] for text in texts]
    samples = _samples(*((*text, n) for n, text in enumerate(given_texts)))
    rows = _rows(tokenizer, samples, max_length=most)
    twin = make(truncation_side=side)
    cut = 0
    for text, row in zip(given_texts, rows.rows, strict=True):
        expected = twin(*text, truncation=True, max_length=most)
        assert row["input_ids"] == expected["input_ids"]
        types = expected.get("token_type_ids", [])
        assert row.get("token_types") == (types if any(types) else None)
        whole = twin(*text)["input_ids"]
        assert row["uncut_tokens"] == len(whole)
        assert TextEncoder(tokenizer, most).encode(*text).ids == row["input_ids"]
        cut += len(whole) > most
    assert rows.counts.rows_truncated == cut
    assert (rows.counts.weighs, rows.counts.weight) == ("labels", len(texts))
    assert [row["labels"] for row in rows.rows] == [[n] for n in range(len(texts))]


def test_a_real_encoder_and_a_decoder_are_given_what_they_know(minilm: Path) -> None:
    bert = AutoTokenizer.from_pretrained(minilm)
    rows = _rows(bert, _samples(*PAIRS))
    for row, (one, other, label) in zip(rows.rows, PAIRS, strict=True):
        expected = bert(one, other)
        assert row["input_ids"] == expected["input_ids"]
        assert row["token_types"] == expected["token_type_ids"]
        assert row["labels"] == [label]
    assert rows.rows.table.features["token_types"] == datasets.List(datasets.Value("int8"))
    # With one text all types are 0, and there is no column of them.
    assert "token_types" not in _rows(bert, _samples(*TWO)).rows.table.column_names
    decoder = make_tokenizer()
    (row, _) = _rows(decoder, _samples(*TWO)).rows
    assert decoder.decode(row["input_ids"]) == "good film"
    assert {*row} == {"input_ids", "labels", "row", "uncut_tokens"}


# ---------------------------------------------------------------- labels and lengths


def test_labels_are_whole_numbers_lists_of_them_or_values() -> None:
    tokenizer = _encoder_tokenizer()
    several = _rows(tokenizer, _samples(("a", ("x", "y")), ("the", ()), ("film", ("y",))))
    assert [row["labels"] for row in several.rows] == [[0, 1], [], [1]]
    assert several.counts.weight == 3
    values = _rows(tokenizer, _samples(("a", 0.1), ("the", 2)))
    assert [row["labels"] for row in values.rows] == [[0.1], [2.0]]
    assert values.rows.table.features["labels"] == datasets.List(datasets.Value("float64"))
    single = _rows(tokenizer, _samples(*TWO))
    assert single.rows.table.features["labels"] == datasets.List(datasets.Value("int32"))
    assert single.labels == Labels("single", ("neg", "pos"), (1.0, 1.0))
    assert single.label_counts() == (1, 1)
    assert single.template_hash is None


def test_long_rows_are_cut_dropped_or_refused() -> None:
    tokenizer = _encoder_tokenizer()
    samples = _samples(("good " * 9, "pos"), ("bad", "neg"), ("a", "pos"))
    cut = _rows(tokenizer, samples, max_length=6)
    assert cut.rows.lengths() == [6, 3, 3]
    assert cut.counts.describe() == "3 classify rows; 1 truncated; 12 tokens; lost: nothing"
    dropped = _rows(tokenizer, samples, max_length=6, long_samples="drop")
    assert dropped.counts.describe() == "3 classify rows; 6 tokens; lost: 1 row"
    assert dropped.counts.as_json()["labels_lost"] == 1
    assert [*dropped.dropped.items()] == [(0, 11)]
    with pytest.raises(DataError, match=r"a\.csv:1: 11 tokens; expected at most 6; shorten it"):
        _rows(tokenizer, samples, max_length=6, long_samples="error")
    with pytest.raises(ConfigError, match=r"--long-samples split: a label is of a whole text"):
        _rows(tokenizer, samples, max_length=6, long_samples="split")


@pytest.mark.parametrize(("items", "special"), [(TWO, 2), (PAIRS, 3)])
def test_a_length_without_room_for_text_is_refused(items: list[Any], special: int) -> None:
    tokenizer, least = _encoder_tokenizer(), special + (2 if items is PAIRS else 1)
    assert max(_rows(tokenizer, _samples(*items), max_length=least).rows.lengths()) == least
    with pytest.raises(ConfigError) as caught:
        _rows(tokenizer, _samples(*items), max_length=least - 1)
    what = "a pair of texts" if items is PAIRS else "a text"
    assert str(caught.value) == (
        f"--max-length {least - 1}: {what} has {special} special tokens; expected room for the "
        f"text beside them; pass {least} or more"
    )


def test_a_text_of_which_no_token_is_left_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("§", "")
    with pytest.raises(DataError, match=r"a\.csv:2: the tokenizer makes no token of the text; ex"):
        _rows(tokenizer, _samples(("a", 0), ("§", 1)))


# ---------------------------------------------------------------- fingerprints and the cache


def _fingerprint(tokenizer: Any = None, items: Any = TWO, **options: Any) -> str:
    asked = {name: options.pop(name) for name in ("labels", "class_weights") if name in options}
    samples = _samples(*items)
    labels = labels_of(samples, TaskOptions.model_validate(asked))
    return _rows(tokenizer or _encoder_tokenizer(), samples, labels, **options).fingerprint


def test_everything_that_decides_rows_or_labels_is_in_the_fingerprint() -> None:
    unframed = _encoder_tokenizer()
    unframed.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    found = [
        _fingerprint(),
        _fingerprint(labels="pos,neg"),
        _fingerprint(class_weights="pos=2"),
        _fingerprint(max_length=7),
        _fingerprint(long_samples="drop"),
        _fingerprint(items=[TWO[0], ("bad film", "other")]),
        _fingerprint(items=PAIRS),
        _fingerprint(unframed),
        _fingerprint(_encoder_tokenizer(truncation_side="left")),
    ]
    assert len({*found}) == len(found)


def test_what_a_tokenizer_did_before_is_not_in_the_fingerprint() -> None:
    used = _encoder_tokenizer()
    used(["good film story"], truncation=True, max_length=4, padding=True)
    fresh = hash_of_tokenizer(_encoder_tokenizer())
    assert hash_of_tokenizer(used) == fresh


def test_a_second_run_takes_rows_and_labels_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    tokenizer = _encoder_tokenizer()
    for items in (PAIRS, [("a", 0.25), ("the", 1.5)], [("a", ("x",)), ("the", ())]):
        made, again = (_rows(tokenizer, _samples(*items), cache=True) for _ in range(2))
        assert made.seconds is not None
        assert again.seconds is None
        assert [*again.rows] == [*made.rows]
        assert (again.labels, again.counts, again.origin) == (made.labels, made.counts, made.origin)
        assert again.origin["labels"] == made.labels.content_hash()  # type: ignore[union-attr]
        assert again.rows.content_hash() == made.rows.content_hash()
        shutil.rmtree(tmp_path / "qlora_kit")


def test_token_types_are_a_part_of_what_the_rows_are() -> None:
    # The same ids, once as one text and once as a pair.
    plain = _encoder_tokenizer()
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(each, plain.convert_tokens_to_ids(each)) for each in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    one, other = (_rows(each, _samples(*PAIRS)).rows for each in (plain, _encoder_tokenizer()))
    assert [row["input_ids"] for row in one] == [row["input_ids"] for row in other]
    assert one.content_hash() != other.content_hash()


def test_rows_that_are_held_out_keep_their_labels() -> None:
    samples = _samples(*((word, label) for label in range(100) for word in ("good", "bad", "film")))
    whole = _rows(_encoder_tokenizer(), samples)
    rest, part = split_validation(whole, 0.1, 3)
    assert part is not None
    assert (len(rest.rows), len(part.rows)) == (270, 30)
    assert (rest.counts.weight, part.counts.weight) == (270, 30)
    assert rest.labels == part.labels == whole.labels
    both = zip(rest.label_counts(), part.label_counts(), strict=True)
    assert [one + other for one, other in both] == [3] * 100


def test_a_label_that_training_has_not_is_refused_in_validation() -> None:
    labels = labels_of(_samples(*TWO), TaskOptions())
    with pytest.raises(DataError, match=r"a\.csv:2: the label odd that is none of the 2 known"):
        _rows(_encoder_tokenizer(), _samples(TWO[0], ("a film", "odd")), labels)


def test_texts_to_be_learnt_have_no_labels() -> None:
    pair = Samples([Pair("a", "b", "x:1")], Shape.PAIR, "x")
    rows = tokenize(pair, make_tokenizer(), TokenOptions(), cache=False)
    assert rows.labels is None
    assert "labels" not in rows.origin

"""Tagged words as people bring them: every form is read, no tag is lost, faults are told."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run
from transformers import AutoTokenizer

from qlora_kit.config import RecordOptions, TaskOptions, TokenOptions
from qlora_kit.data.encode import IGNORED
from qlora_kit.data.labels import Labels, labels_of, tags_in_words
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.data.shapes import Shape, TaggedWords
from qlora_kit.data.tagged_rows import TaggedRows, WordEncoder, words_of
from qlora_kit.data.tokens import Tokenized, split_validation, tokenize
from qlora_kit.errors import ModelError

SENTENCES = [
    (("EU", "rejects", "German", "call"), ("B-ORG", "O", "B-MISC", "O")),
    (("Peter", "Blackburn"), ("B-PER", "I-PER")),
]
RECORDS = [{"tokens": [*words], "tags": [*tags]} for words, tags in SENTENCES]


def _load(path: Path | str, **options: Any) -> Samples:
    return load_samples(path, options=RecordOptions(**options), task="tag")


def _found(samples: Samples) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    assert all(isinstance(sample, TaggedWords) for sample in samples.items)
    return [(each.words, each.tags) for each in samples.items]  # type: ignore[union-attr]


def _columns(gap: str, *between: str) -> str:
    return "\n\n".join(
        "\n".join(gap.join([word, *between, tag]) for word, tag in zip(*sentence, strict=True))
        for sentence in SENTENCES
    )


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), stream)
    return stream.getvalue()


CONLLU = (
    "# sent_id = 1\n# text = EU rejects German call\n"
    "1-2\tEUrejects\t_\t_\t_\t_\t_\t_\t_\t_\n"
    + "\n".join(
        f"{n}\t{word}\t{word.lower()}\t{tag}\t_\t_\t0\troot\t_\t_"
        for n, (word, tag) in enumerate(zip(*SENTENCES[0], strict=True), 1)
    )
    + "\n\n# sent_id = 2\n"
    + "\n".join(
        f"{n}\t{word}\t_\t{tag}\t_\t_\t0\troot\t_\t_"
        for n, (word, tag) in enumerate(zip(*SENTENCES[1], strict=True), 1)
    )
)
FORMS: dict[str, str | bytes] = {
    "a.conll": f"-DOCSTART- -X- -X- O\n\n{_columns(' ', 'NN', 'B-NP')}\n",
    "tabs.conll": _columns("\t"),
    "crlf.conll": _columns("\t").replace("\n", "\r\n"),
    "spaces.conll": _columns("   "),
    "blank lines.conll": f"\n\n{_columns(' ')}\n\n\n \t \n".replace("\n\n", "\n\n\n"),
    "comments.conll": "# id 1\tdomain=en\n"
    + _columns(" ", "_", "_").replace("\n\n", "\n\n# id 2\n"),
    "train.txt": _columns(" "),
    "dev.tsv": _columns("\t"),
    "eng.testa": _columns(" ", "NNP"),
    "u.conllu": CONLLU,
    "a.jsonl": "\n".join(map(json.dumps, RECORDS)),
    "words.jsonl": "\n".join(
        json.dumps({"words": r["tokens"], "ner_tags": r["tags"]}) for r in RECORDS
    ),
    "a.json": json.dumps(RECORDS),
    "a.parquet": _parquet(),
    "texts.csv": "tokens,tags\n" + "\n".join(f"{' '.join(w)},{' '.join(t)}" for w, t in SENTENCES),
    "lists.tsv": "tokens\tner_tags\n" + "\n".join(f"{[*w]}\t{[*t]}" for w, t in SENTENCES),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_sentences(tmp_path: Path, name: str, packed: bool) -> None:
    content = FORMS[name]
    data = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / f"{name}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(data) if packed else data)
    samples = _load(path)
    assert _found(samples) == SENTENCES
    assert samples.shape is Shape.TAG
    assert len({sample.place for sample in samples.items}) == 2


def test_folders_and_line_aligned_files_are_read(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(_columns(" "))
    assert _found(_load(tmp_path)) == SENTENCES
    held_out = load_samples(tmp_path, "validation", task="tag")
    assert held_out.notices[0].startswith(f"{tmp_path / 'valid.txt'}: 2 tag records")
    (tmp_path / "words").write_text("".join(f"{' '.join(words)}\n" for words, _ in SENTENCES))
    (tmp_path / "names").write_text("".join(f"{' '.join(tags)}\n" for _, tags in SENTENCES))
    assert _found(_load(f"{tmp_path / 'words'}+{tmp_path / 'names'}")) == SENTENCES


def test_a_column_between_may_be_the_tags(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(_columns(" ", "NNP", "B-NP"))
    samples = _load(tmp_path / "a.conll", columns={"tags": "3"})
    assert {tag for _, tags in _found(samples) for tag in tags} == {"B-NP"}


def test_a_hash_is_a_word_where_it_has_a_tag(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("one O\n# O\n\n# O\ntwo O\n")
    assert [words for words, _ in _found(_load(tmp_path / "a.conll"))] == [
        ("one", "#"),
        ("#", "two"),
    ]


def test_numbers_have_the_names_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"tokens": ["Ann", "ran"], "ner_tags": [1, 0]}))
    samples = _load(tmp_path / "a.jsonl")
    bare = labels_of(samples, TaskOptions(task="tag"))
    assert "name them with --labels" in tags_in_words(bare, samples)
    named = labels_of(samples, TaskOptions(task="tag", labels=("O", "B-PER")))
    assert named.target(samples.items[0]) == [1, 0]  # type: ignore[arg-type]
    assert tags_in_words(named, samples) == "scheme BIO, entities of 1 type"


# ---------------------------------------------------------------- rows


def _samples(*sentences: list[str]) -> Samples:
    items = [
        TaggedWords(tuple(words), tuple("AB"[n % 2] for n in range(len(words))), f"a:{line}")
        for line, words in enumerate(sentences)
    ]
    return Samples(items, Shape.TAG, "a")


LABELS = Labels("tags", ("A", "B"), (1.0, 1.0))


def _rows(samples: Samples, tokenizer: Any, most: int, how: str = "auto") -> Tokenized:
    options = TokenOptions(max_length=most, long_samples=how)  # type: ignore[arg-type]
    return tokenize(samples, tokenizer, options, makes=TaggedRows(LABELS), cache=False)


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
@given(words=st.lists(st.text("abeghinrtĞ.,-é日", min_size=1, max_size=9), min_size=1, max_size=12),
       most=st.integers(2, 14))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_each_word_is_tagged_at_its_first_token_whatever_the_length(
    kind: str, words: list[str], most: int
) -> None:
    tokenizer = make_tokenizer(kind, unk_token="<unk>")
    made = _rows(_samples(words), tokenizer, most)
    tags = [int(t) for row in made.rows for t in row["labels"] if t != IGNORED]
    assert tags == [n % 2 for n in range(len(words))]
    assert max(map(len, made.rows["input_ids"])) <= most
    assert made.counts.weight == len(words)
    assert made.counts.weight_lost == 0
    whole = _rows(_samples(words), tokenizer, 1000).rows[0]
    pieces = tokenizer.convert_ids_to_tokens(whole["input_ids"])
    if any("▁" in piece.strip("▁") for piece in pieces):
        return  # one token holds parts of two words: no text is only a word's
    starts = words_of(whole["labels"])
    for word, start, end in zip(words, starts, [*starts[1:], None], strict=True):
        text = tokenizer.decode(whole["input_ids"][start:end])
        assert text.strip() == word or "<unk>" in text


def test_a_sentence_that_is_truncated_says_what_it_loses() -> None:
    samples, tokenizer = _samples(["one", "two", "three"]), make_tokenizer()
    whole = _rows(samples, tokenizer, 100)
    length = len(whole.rows[0]["input_ids"])
    cut = _rows(samples, tokenizer, length - 1, "truncate")
    assert (len(cut.rows), cut.counts.weight, cut.counts.weight_lost) == (1, 2, 1)
    assert cut.describe().split(";")[-2].strip() == "lost: 1 tag"
    split = _rows(samples, tokenizer, length - 1)
    assert (len(split.rows), split.counts.weight) == (2, 3)
    assert "1 split into 2 chunks" in split.describe()


def test_held_out_sentences_count_their_words() -> None:
    tokenized = _rows(_samples(*[["a"] * (1 + n % 3) for n in range(300)]), make_tokenizer(), 50)
    rest, held_out = split_validation(tokenized, 0.1, 1)
    assert held_out is not None
    assert rest.counts.weight + held_out.counts.weight == tokenized.counts.weight == 600


def test_a_tokenizer_without_a_fast_version_is_refused_by_name() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"Slow: a tokenizer without a fast version.*; expected"):
        WordEncoder(Slow(), 10)


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_a_real_tokenizer_finds_every_word(model: str, request: pytest.FixtureRequest) -> None:
    words = ["Ann", "\u200d", "x", "\ufe0f", "New York", "#", "don't", "Zürich", "日本"]
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(model))
    (found,) = WordEncoder(tokenizer, 100).encode([words])
    assert found is not None
    assert found.firsts == sorted(set(found.firsts))
    assert len(found.firsts) == len(words)
    first = [tokenizer.decode([found.ids[place]]).strip().lower() for place in found.firsts]
    assert (first[0], first[2], first[4:7]) == ("ann", "x", ["new", "#", "don"])
    parts = WordEncoder(tokenizer, 8).parts(found)
    assert len(parts) > 1
    assert sum(len(part.firsts) for part in parts) == len(words)
    assert all(len(part.ids) <= 8 for part in parts)


# ---------------------------------------------------------------- faults

BAD: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "one column": ("a.conll", "one\ntwo\n", (),
        "a.conll:1: one column; expected a word and its tag"),
    "a line without its tag": (
        "a.conll", "one O\ntwo B-X\n\nthree\n", (), "a.conll:4: one column; expected",
    ),
    "columns that vary": (
        "a.conll", "one NN O\ntwo O\n", (), "a.conll:2: 2 columns; expected 3 as in the first row",
    ),
    "a comment inside a sentence": (
        "a.conll", "one O\n# two three\n", (), "a.conll:2: 3 columns; expected 2 as in the first",
    ),
    "an empty word": ("a.conll", "one\tO\n\tB-X\n", (), "a.conll:2: the word is empty; expected"),
    "an empty tag": ("a.conll", "one\tO\ntwo\t\n", (), "a.conll:2: the tag is empty; expected"),
    "only comments": ("a.conll", "# a\n# b\n\n", (), "a.conll: no records; expected at least one"),
    "no file": ("b.conll", "", (), "a.conll: no such file; expected a data file"),
    "a word without tags": (
        "a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}\n', (),
        "a.jsonl:1: 2 tokens and 1 tags; expected a tag for each token",
    ),
    "no words": (
        "a.jsonl", '{"tokens": [], "tags": []}', (),
        'a.jsonl:1: "tokens" is an empty list; expected',
    ),
    "a blank word": (
        "a.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}', (),
        'a.jsonl:1: word 2: "tokens" is empty; expected text',
    ),
    "a word that is a number": (
        "a.jsonl", '{"tokens": ["a", 7], "tags": ["O", "O"]}', (),
        'a.jsonl:1: word 2: "tokens" is a number; expected a string',
    ),
    "a tag that is null": (
        "a.jsonl", '{"tokens": ["a"], "tags": [null]}', (), "a.jsonl:1: tag 1 is null; expected",
    ),
    "a tag with a fraction": (
        "a.jsonl", '{"tokens": ["a"], "tags": [0.5]}', (),
        "tag 1 is a number with a fraction; expected",
    ),
    "tags that are an object": (
        "a.jsonl", '{"tokens": ["a"], "tags": {"a": 1}}', (),
        'a.jsonl:1: "tags" is an object; expected',
    ),
    "no tags": (
        "a.jsonl", '{"tokens": ["a"], "other": 1}', (),
        "a.jsonl:1: keys tokens, other; expected one of: tokens + tags",
    ),
    "labels of texts": (
        "a.jsonl", '{"tokens": ["a"], "tags": ["O"]}', ("--format", "classify"),
        "--format classify: no format of --task tag; expected auto, tag",
    ),
    "a column that is not there": (
        "a.conll", "one O\n", ("--columns", "tags=7"), 'a.conll:1: no "7" but keys tokens, tags',
    ),
    "one tag only": (
        "a.conll", "one O\ntwo O\n", (), "a.conll: one label only (O) in 1 records; expected two",
    ),
    "a tag outside of --labels": (
        "a.conll", "one O\ntwo B-X\n", ("--labels", "O,B-Y"),
        "a.conll:1: word 2: the label B-X that is none of the 2 known ones; expected O, B-Y",
    ),
    "a kind of label": (
        "a.conll", "one O\ntwo B-X\n", ("--label-kind", "multi"),
        "--label-kind multi: each word has one tag; expected no other kind with --task tag",
    ),
    "a weight of no tag": (
        "a.conll", "one O\ntwo B-X\n", ("--class-weights", "B-Z=2"),
        "--class-weights: no label 'B-Z'",
    ),
    "half of a character": (
        "a.jsonl", '{"tokens": ["\\ud800"], "tags": ["O"]}', (),
        "half of a surrogate pair; expected",
    ),
    "NUL": ("a.conll", "one\0 O\n", (), "a.conll:1: has a NUL; expected UTF-8 text"),
    "no data": ("-", "", (), "--data: none is given, and the built-in sample data has no labels; "
                             "expected tagged words for --task tag; pass --data FILE"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_one_line(
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, content, more, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    data = () if name == "-" else ("--data", name if name != "b.conll" else "a.conll")
    code, _, err = run("check", "--task", "tag", *data, *more, capsys=capsys)
    assert code == 2
    faults = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(faults) == 1
    assert message in faults[0]
    assert faults[0].count("; ") >= 2 or case == "a weight of no tag"


def test_faults_are_collected_or_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("one O\n\ntwo\n\nthree O\nfour B-X\n")
    samples = _load(tmp_path / "a.conll", skip_bad_lines=True)
    assert [words for words, _ in _found(samples)] == [("one",), ("three", "four")]
    assert samples.skipped == 1
    assert "a.conll:3: one column" in samples.notices[1]

"""`check` shows the tokens that training learns, with correct figures, and leaves no files."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_fixtures import CHATML, chat, conversation, make_tokenizer, samples_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support import PROJECT, run

from qlora_kit.config import TokenOptions
from qlora_kit.data.batch import TokenTable
from qlora_kit.data.chat_template import built_in_templates, spelled_out_end
from qlora_kit.data.encode import IGNORED, WITHHELD, pieces_of
from qlora_kit.data.row_arrays import Part
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Pair, Sample, Text
from qlora_kit.data.survey import Survey, survey
from qlora_kit.data.tokens import split_validation, tokenize
from qlora_kit.errors import DataError
from qlora_kit.report.data_view import data_page, length_rows, summary_rows, tables
from qlora_kit.report.mask import mask_text, shown, visible
from qlora_kit.report.page import environment

ROW = {"prompt": "one dollar: ", "completion": "$1.00"}


def _write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"number {n}: ", "completion": f"it is {n * n}"} for n in range(count)]


def _survey(*items: Sample, validation: Samples | None = None, **options: Any) -> Survey:
    tokenizer = make_tokenizer(chat_template=CHATML)
    asked = TokenOptions(**options)
    samples = samples_of(*items)
    learnt = Part(samples, tokenize(samples, tokenizer, asked, cache=False))
    measured = None
    if validation is not None:
        measured = Part(validation, tokenize(validation, tokenizer, asked, cache=False))
    return survey(learnt, measured, tokenizer, asked, seed=1, shown_rows=5)


# ---------------------------------------------------------------- the command


def test_the_page_of_a_run_is_that_of_check(
    simulated_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`check` and training have the same rows and masks, to the byte."""
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "my.jsonl", *_pairs(240))
    common = ("--data", "my.jsonl", "--max-length", "48", "--seed", "5")
    code, _, err = run(
        "train", *common, "--output", "mine", "--max-steps", "1", "--samples", "0",
        "--no-rehearse", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    code, _, err = run("check", *common, "--rows", "20", "--html", "page.html", capsys=capsys)
    assert code == 0, err
    assert (tmp_path / "mine" / "data.html").read_text() == (tmp_path / "page.html").read_text()


def test_check_takes_the_configuration_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "my.jsonl", ROW)
    Path("run.yaml").write_text("data: my.jsonl\nlora_r: 8\nmax_length: 12\nlearning_rate: 1e-3\n")
    code, out, err = run("check", "--config", "run.yaml", "--json", capsys=capsys)
    assert code == 0, err
    assert json.loads(out)["max_length"] == 12


def test_check_creates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path / "my.jsonl", ROW)
    before = path.read_bytes()
    assert run("check", "--data", "my.jsonl", "--output", "mine", capsys=capsys)[0] == 0
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == before


def test_check_prints_tables_and_rows_with_their_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "my.jsonl", ROW, {"prompt": "[bold]two[/bold] ", "completion": "$2.00"}, ROW)
    code, out, _ = run("check", "--data", "my.jsonl", "--rows", "3", capsys=capsys)
    assert code == 0
    lines = out.splitlines()
    assert "data: my.jsonl" in lines
    assert lines.count("<s>one dollar: ⟦$1.00</s>⟧") == 2
    assert "<s>[bold]two[/bold] ⟦$2.00</s>⟧" in lines
    assert "longest rows" in lines
    assert any("my.jsonl:2: " in line for line in lines)
    assert (
        "note: training rows that repeat another: 1, the first my.jsonl:3, as my.jsonl:1; remove "
        "them, or they count twice"
    ) in lines


def test_check_draws_the_same_rows_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "my.jsonl", *_pairs(100))
    outs = [
        run("check", "--data", "my.jsonl", "--rows", "4", "--seed", seed, capsys=capsys)[1]
        for seed in ("1", "1", "2")
    ]
    drawn = [re.findall(r"my\.jsonl:\d+: ", out) for out in outs]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4


def test_figures_for_programs_hold_no_text_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path / "my.jsonl", *_pairs(5), {"prompt": "a ", "completion": "SECRETWORD"})
    code, out, err = run("check", "--data", str(path), "--json", capsys=capsys)
    assert code == 0
    assert "SECRETWORD" not in out + err
    found = json.loads(out)
    assert found["training"]["rows_kept"] == 6
    assert found["ends"] == {"rows": 6, "of": 6, "tokens": {"</s>": 6}}
    assert found["prompts"] == {"tried": 6, "differing": 0, "places": []}
    assert (found["repeats"]["rows"], found["overlap"], found["warnings"]) == (0, None, [])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file; "),
        (("--data", "bad.jsonl"), 'bad.jsonl:1: "completion" is empty; '),
        (("--data", "my.jsonl", "--max-length", "2"), "my.jsonl: no supervised token is left in "),
        (
            ("--data", "my.jsonl", "--max-length", "4", "--long-samples", "error"),
            "my.jsonl:1: 12 tokens; expected at most 4; ",
        ),
        (("--data", "my.jsonl", "--html", "my.jsonl"), "--html: found my.jsonl; expected a name "),
        (("--data", "my.jsonl", "--html", "no/p.html"), "--html: no folder no; expected one; "),
        (("--data", "my.jsonl", "--html", "d.html"), "--html: found d.html; expected a name that "),
        (("--data", "my.jsonl", "--rows", "-1"), "--rows: found -1; expected "),
        (("--data", "my.jsonl", "--early-stopping-patience", "2"), "--early-stopping-patience: "),
        (("--data", "my.jsonl", "--html", "p.html", "--chat-template", "x"), "--chat-template x: "),
    ],
)
def test_data_that_does_not_train_is_refused_and_nothing_changes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "my.jsonl", ROW)
    _write(tmp_path / "bad.jsonl", {**ROW, "completion": " "})
    (tmp_path / "d.html").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    code, out, err = run("check", *arguments, capsys=capsys)
    errors = [each for each in err.splitlines() if each.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), err
    assert errors[0].startswith(f"error: {line}")
    assert "Traceback" not in out + err
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_a_page_replaces_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path / "my.jsonl", ROW)
    (tmp_path / "page.html").write_text("old")
    where = str(tmp_path / "page.html")
    assert run("check", "--data", str(path), "--html", where, capsys=capsys)[0] == 0
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


# ---------------------------------------------------------------- figures


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), limit=st.integers(8, 200),
    how=st.sampled_from(["truncate", "drop", "split"]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_lengths_are_those_before_any_cut(lengths: list[int], limit: int, how: str) -> None:
    # A BOS, as many bytes as were asked for, and an end token.
    items = [Text("\u00a7" * length, f"x:{n}") for n, length in enumerate(lengths)]
    tokenizer = make_tokenizer()
    samples = samples_of(*items)
    options = TokenOptions(max_length=limit, long_samples=how)
    try:
        rows = tokenize(samples, tokenizer, options, cache=False)
    except DataError:
        return  # nothing is left
    whole = tokenize(samples, tokenizer, TokenOptions(max_length=10**6), cache=False)
    expected = [len(ids) for ids in whole.rows["input_ids"]]
    found = survey(Part(samples, rows), None, tokenizer, options, seed=0, shown_rows=0)
    bins = found.lengths.histogram
    assert found.lengths.longest == max(expected)
    assert found.lengths.median in expected
    assert sum(length <= found.lengths.p95 for length in expected) >= 0.95 * len(expected)
    assert [each.rows for each in bins] == [
        sum(each.first <= length <= each.last for length in expected) for each in bins
    ]
    assert sum(each.rows for each in bins) == len(expected)
    # No bin has both rows that are cut and rows that are not.
    assert all(each.last <= limit or each.first > limit for each in bins)
    ranked = sorted(range(len(items)), key=lambda n: (-expected[n], n))[:5]
    assert [(row.place, row.tokens) for row in found.longest] == [
        (f"x:{n}", expected[n]) for n in ranked
    ]
    outcome = {"truncate": "truncated", "drop": "dropped", "split": "split"}[how]
    for row in found.longest:
        assert row.outcome == ("whole" if row.tokens <= limit else outcome)
    assert len(length_rows(found)) == len(bins)


QUESTIONS = st.sampled_from(["a?", "b?", "c?", "d?"])
ANSWERS = st.sampled_from(["x", "y", "z"])
TALKS = st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=12)


@given(learnt=TALKS, measured=TALKS)
@settings(deadline=None, max_examples=60)
def test_repeats_and_overlaps_are_those_that_one_counts_by_hand(
    learnt: list[tuple[str, str]], measured: list[tuple[str, str]]
) -> None:
    items = [replace(chat(*each), place=f"t:{n}") for n, each in enumerate(learnt)]
    others = [replace(chat(*each), place=f"v:{n}") for n, each in enumerate(measured)]
    found = _survey(*items, validation=samples_of(*others))
    assert found.repeats.rows == len(learnt) - len({*learnt})
    assert found.overlap is not None
    assert found.overlap.rows == sum(each in learnt for each in measured)
    asked = {question for question, _ in learnt}
    assert found.overlap.prompts == sum(
        each not in learnt and each[0] in asked for each in measured
    )
    for place, earlier in found.overlap.places:
        assert measured[int(place[2:])] == learnt[int(earlier[2:])]
    for place, earlier in found.repeats.places:
        assert learnt[int(place[2:])] == learnt[int(earlier[2:])]
        assert int(earlier[2:]) == learnt.index(learnt[int(place[2:])])
    overlapping = any("also trained on" in text for text in found.warnings())
    assert overlapping == bool(found.overlap.rows)


def test_chunks_of_one_text_on_both_sides_are_no_overlap() -> None:
    tokenizer = make_tokenizer()
    samples = samples_of(Text(" ".join(map(str, range(4000))), "story.txt:1"))
    options = TokenOptions(max_length=32)
    learnt, measured = split_validation(tokenize(samples, tokenizer, options), 0.1, 3)
    assert measured is not None
    parts = (Part(samples, learnt), Part(samples, measured))
    found = survey(*parts, tokenizer, options, seed=0, shown_rows=3)
    assert found.overlap is not None
    assert (found.overlap.rows, found.overlap.prompts, found.repeats.rows) == (0, 0, 0)
    assert not [*found.warnings()]
    assert all(re.fullmatch(r"story\.txt:1 \(token row [\d,]+\)", row.place) for row in found.shown)


def test_ends_are_counted_where_they_are_learnt() -> None:
    found = _survey(chat("a", "b"), chat("a", "b " * 100), max_length=40)
    assert (found.ends.rows, found.ends.of) == (1, 2)
    assert found.ends.tokens == {"<|im_end|>": 1}
    assert not any("end token" in text for text in found.warnings())
    cut = _survey(chat("a", "b " * 100), max_length=40)
    assert any("does not learn to stop" in text for text in cut.warnings())


def test_prompts_are_tried_with_every_answer_that_is_learnt() -> None:
    talk = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert _survey(talk, chat("e", "f")).prompts.tried == 3
    assert _survey(talk, chat("e", "f"), train_on="last-turn").prompts.tried == 2
    marked = tuple(replace(turn, is_learnt=turn.content != "b") for turn in talk.messages)
    assert _survey(replace(talk, messages=marked)).prompts.tried == 1
    # A prompt that fills its row has no answer, so it does not count as a prompt.
    assert _survey(chat("a " * 90, "b"), chat("c", "d"), max_length=60).prompts.tried == 1


def test_a_prompt_that_the_template_refuses_is_not_tried() -> None:
    template = "{% if messages|length < 2 %}{{ raise_exception('too few') }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(chat_template=template)
    samples = samples_of(conversation(("assistant", "a"), ("user", "b"), ("assistant", "c")))
    options = TokenOptions(train_on="all")
    part = Part(samples, tokenize(samples, tokenizer, options, cache=False))
    found = survey(part, None, tokenizer, options, seed=0, shown_rows=0)
    assert (found.prompts.tried, found.prompts.differing) == (1, 0)


def test_a_row_that_begins_otherwise_than_generation_is_told() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    samples = samples_of(chat("one", "x"), replace(chat("two", "y"), place="data.jsonl:2"))
    rows = tokenize(samples, tokenizer, TokenOptions(), cache=False)

    def with_a_space(row: dict[str, Any]) -> dict[str, Any]:
        (space,) = tokenizer(" ", add_special_tokens=False)["input_ids"]
        ids, labels = row["input_ids"], row["labels"]
        return {**row, "input_ids": [ids[0], space, *ids[1:]], "labels": [IGNORED, *labels]}

    changed = [with_a_space(row) if row["row"] else row for row in rows.rows]
    table = TokenTable(datasets.Dataset.from_list(changed))
    part = Part(samples, replace(rows, rows=table))
    found = survey(part, None, tokenizer, TokenOptions(), seed=0, shown_rows=0)
    assert (found.prompts.tried, found.prompts.differing) == (2, 1)
    assert found.prompts.places == ("data.jsonl:2",)
    assert any("1 of 2 tried, the first in data.jsonl:2" in text for text in found.warnings())


def test_a_first_token_is_supervised_for_nobody() -> None:
    tokenizer = make_tokenizer(bos_token=None)
    samples = samples_of(Text("one two", "x:1"), Text("three", "x:2"))
    rows = tokenize(samples, tokenizer, TokenOptions(), cache=False)
    assert rows.rows[0]["labels"][0] != IGNORED
    found = survey(Part(samples, rows), None, tokenizer, TokenOptions(), seed=0, shown_rows=2)
    for row in found.shown:
        flags = [piece.is_supervised for piece in row.pieces for _ in piece.ids]
        assert flags == [False] + [True] * (row.tokens - 1)
        assert row.supervised_tokens == row.tokens - 1
    assert found.training.weight == sum(row.supervised_tokens for row in found.shown)


def test_what_is_lost_is_told_with_what_would_keep_it() -> None:
    items = [Pair("ask ", "say " * n, f"x:{n}") for n in range(1, 101)]
    found = _survey(*items, max_length=60)
    (warning,) = (text for text in found.warnings() if "lose their end" in text)
    assert f"{found.training.rows_truncated:,} of 100" in warning
    assert f"{found.lengths.p95:,} would keep 95 % whole, {found.lengths.longest:,} all" in warning
    assert dict(summary_rows(found))["cut"].startswith(f"{found.training.rows_truncated} truncated")


# ---------------------------------------------------------------- pieces of text


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x1F700), max_size=30),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_pieces_are_the_text_of_the_row(text: str, data: st.DataObject) -> None:
    tokenizer = make_tokenizer(data.draw(st.sampled_from(["bytes", "spaces"])))
    ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2][:20]
    flag = data.draw(st.sampled_from([st.just(True), st.just(False), st.booleans()]))
    labels = [token if data.draw(flag) else IGNORED for token in ids]
    pieces = pieces_of(tokenizer, ids, labels)
    assert [token for piece in pieces for token in piece.ids] == ids
    flags = [piece.is_supervised for piece in pieces for _ in piece.ids]
    assert flags == [at > 0 and label != IGNORED for at, label in enumerate(labels)]
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if len({*flags[1:]}) == 1 and "\ufffd" not in whole:
        assert "".join(piece.text for piece in pieces) == whole


def test_a_character_of_several_tokens_is_one_piece() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    texts = [piece.text for piece in pieces_of(tokenizer, ids, ids)]
    assert texts == ["a", "€", "b"]


def test_spaces_before_words_are_kept(assets: Path) -> None:
    from qlora_kit.model.tokenizer import load_tokenizer

    for name in ("models/stories260K", "tokenizers/deepseek-llm-7b"):
        tokenizer = load_tokenizer(assets / name)
        ids = tokenizer("Once upon a time, 你好", add_special_tokens=False)["input_ids"]
        text = "".join(piece.text for piece in pieces_of(tokenizer, ids, ids))
        assert text.lstrip() == tokenizer.decode(ids).lstrip()
        assert " upon a time" in text


def test_special_tokens_are_marked() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("<s>a</s>", add_special_tokens=False)["input_ids"]
    assert [piece.is_special for piece in pieces_of(tokenizer, ids, ids)] == [True, False, True]


def test_a_row_with_a_secret_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = "hf_" + "AbCdEfGh" * 5
    _write(tmp_path / "my.jsonl", {"prompt": "log in with ", "completion": f"the token {secret}"})
    code, out, _ = run("check", "--data", "my.jsonl", "--html", "p.html", capsys=capsys)
    assert code == 0
    page_text = Path("p.html").read_text()
    for shown_text in (out, page_text):
        assert WITHHELD in shown_text
        assert secret not in re.sub(r"</?span[^>]*>", "", shown_text)


# ---------------------------------------------------------------- in the terminal


def test_a_mask_in_colour_has_a_style_for_each_token() -> None:
    tokens = [("<s>", False), ("ask", False), ("say", True), (" it", True), ("</s>", True)]
    text = mask_text(tokens, in_colour=True)
    styles = [str(span.style) for span in text.spans[:5]]
    assert ["on" in style for style in styles] == [flag for _, flag in tokens]
    assert all(one != other for one, other in pairwise(styles))
    console = Console(force_terminal=True, color_system="truecolor", width=80, record=True)
    with console.capture() as printed:
        console.print(text)
    assert "\x1b[" in printed.get()
    assert "supervised" in printed.get()


def test_a_mask_without_colours_has_brackets() -> None:
    tokens = [("a", False), ("b", True), ("c", True), ("d", False), ("e", True)]
    assert mask_text(tokens, in_colour=False).plain == "a⟦bc⟧d⟦e⟧"


def test_what_could_steer_a_terminal_is_written_out() -> None:
    assert visible("a\x1b[2J\u202eb\tc\nd") == "a\\u{1b}[2J\\u{202e}b→\tc↵\nd"
    assert visible("\r\x00\ud800\u2028") == "\\u{d}\\u{0}\\u{d800}\\u{2028}"


@given(flags=st.lists(st.booleans(), max_size=60), most=st.integers(2, 9).map(lambda n: 2 * n))
def test_long_runs_lose_their_midst_and_nothing_else(flags: list[bool], most: int) -> None:
    seen: list[int] = []
    for what, is_supervised in shown(flags, most):
        several = what if isinstance(what, range) else [what]
        assert all(flags[index] == is_supervised for index in several)
        seen += several
    assert seen == [*range(len(flags))]


# ---------------------------------------------------------------- the page


class _Reader(HTMLParser):
    """Collects the tokens of a page, and every tag and attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.rows: list[list[tuple[str, str]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        names = dict(attrs).get("class") or ""
        if tag == "p" and names == "tokens":
            self.rows.append([])
        self.open.append(f"{tag} {names}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split()[0] == tag or tag in ("meta",)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1].startswith("span") and self.rows:
            self.rows[-1].append((data, self.open[-1]))


def _read(html: str) -> _Reader:
    reader = _Reader()
    # `meta` has no end tag.
    reader.feed(re.sub(r"<meta[^>]*>", "", html))
    assert not [tag for tag in reader.open if tag.strip()]
    return reader


NASTY = '</span><script>alert(1)</script> & "quotes" <b>'


def test_a_page_marks_exactly_the_supervised_tokens() -> None:
    found = _survey(chat(f"ask {NASTY}", f"say {NASTY}\nthen"))
    reader = _read(data_page(found))
    _legend, row = reader.rows
    learnt = "".join(text for text, tag in row if "learnt" in tag)
    assert learnt == f"say {NASTY}↵\nthen<|im_end|>"
    context = "".join(text for text, tag in row if "learnt" not in tag)
    assert context.startswith("<s><|im_start|>user↵\n")
    assert f"ask {NASTY}" in context
    assert "script" not in reader.tags


def test_a_page_loads_nothing() -> None:
    html = data_page(_survey(chat(f"ask {NASTY}", "say"), replace(chat("a", "b"), place=NASTY)))
    reader = _read(html)
    assert not reader.tags.keys() & {"script", "link", "img", "iframe", "object", "base"}
    assert not [
        name for name, _ in reader.attributes if name in ("src", "href") or name[:2] == "on"
    ]
    assert "default-src 'none'" in html
    assert NASTY in reader.text


def test_every_table_of_the_terminal_is_on_the_page() -> None:
    items = [replace(chat("a", "b"), place=f"x:{n}") for n in range(3)]
    found = _survey(*items, validation=samples_of(chat("a", "b")))
    reader = _read(data_page(found))
    for title, rows in tables(found):
        for name, value in rows:
            assert name in reader.text or "tokens of a row" in title
            assert value.strip("█░ ") in reader.text
    for warning in found.warnings():
        assert warning in reader.text


def test_parts_of_pages_escape_what_they_are_given() -> None:
    page = environment().from_string(
        '{% extends "page.html.jinja" %}'
        '{% from "parts.html.jinja" import figure, folded, table %}'
        "{% block sections %}<h2>{{ title }}</h2>{{ table(rows, [title]) }}"
        "{{ figure(png, title) }}{{ folded(title, rows, 2) }}{% endblock %}"
    )
    html = page.render(title=NASTY, rows=[(NASTY, 3, True)], png=b"png")
    reader = _read(html.replace("<img ", "<meta "))
    assert "<script>" not in html
    assert reader.text.count(NASTY) == 8
    assert [unescape(words) for words in re.findall('alt="([^"]*)"', html)] == [NASTY]
    assert html.count('src="data:image/png;base64,cG5n"') == 1
    assert '<td class="number">3</td><td>True</td>' in html


def test_every_template_escapes_what_it_shows() -> None:
    """Cards are Markdown; everything else that is made from a template is HTML."""
    made = environment()
    names = made.list_templates()
    assert {"data.html.jinja", "run.html.jinja", "card.md.jinja", "page.css"} <= {*names}
    assert callable(made.autoescape)
    assert {name for name in names if not made.autoescape(name)} == {
        name for name in names if name.endswith(".md.jinja")
    }
    for name in names:
        assert made.loader is not None
        text, *_ = made.loader.get_source(made, name)
        assert not re.search(r"\|\s*safe\b|autoescape", text), name


# ---------------------------------------------------------------- ends that are spelled out


@pytest.mark.parametrize("name", built_in_templates())
def test_no_built_in_template_spells_out_its_end(name: str) -> None:
    extra = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<start_of_turn>"]
    template = built_in_templates()[name]
    tokenizer = make_tokenizer(chat_template=template, additional_special_tokens=extra)
    assert spelled_out_end(tokenizer) is None


def test_an_end_that_is_no_token_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _write(tmp_path / "my.jsonl", {"messages": turns})
    Path("mine.jinja").write_text(CHATML)
    arguments = ("check", "--data", "my.jsonl", "--chat-template", "mine.jinja")
    code, out, _ = run(*arguments, capsys=capsys)
    assert code == 0
    assert (
        "note: the chat template ends answers with '<|im_end|>', which is no token of the "
        "tokenizer: it is spelled out, and the EOS token learnt after it; expected an end token; "
        "correct the template"
    ) in out.splitlines()
    Path("mine.jinja").write_text(CHATML.replace("<|im_end|>", "</s>"))
    code, out, _ = run(*arguments, capsys=capsys)
    assert (code, "spelled out" in out) == (0, False)


# ---------------------------------------------------------------- the documentation


def test_the_example_in_the_documentation_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (PROJECT / "docs" / "data.md").read_text().partition("## Check: what would be learnt")[2]
    (name, content), *_ = re.findall(r"```jsonl (\S+)\n(.*?)```", text, re.DOTALL)
    Path(name).write_text(content)
    (command, before, after), *_ = re.findall(
        r"```console\n\$ qlora-kit (.*?)\n(.*?)\n…\n(.*?)\n```", text, re.DOTALL
    )
    code, out, err = run(*command.split(), capsys=capsys)
    assert code == 0, err
    assert out.startswith(before + "\n")
    assert out.endswith(after + "\n")

"""Preferences as data sets bring them: each shape becomes a prompt with two answers to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import make_tokenizer
from support import run

from qlora_kit.config import RecordOptions, TokenOptions
from qlora_kit.data.encode import CHOSEN_TOKENS, prompt_ids
from qlora_kit.data.preference_rows import PreferenceRows, sides_of
from qlora_kit.data.row_arrays import Part
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.data.shapes import Message, Preference
from qlora_kit.data.survey import survey
from qlora_kit.data.tokens import Tokenized, tokenize
from qlora_kit.errors import DataError

# Stands in every text, never in a name: where it shows in an error, a text has leaked.
SECRET = "§"
ASKED = [{"role": "user", "content": "one §"}]
GOOD, BAD = {"role": "assistant", "content": "two §"}, {"role": "assistant", "content": "six §"}
OLDER = [{"role": "user", "content": "a §"}, {"role": "assistant", "content": "b §"}]
TURNS = (Message("user", "one §"),)
CHAT = (TURNS, "two §", "six §")
OF_CHAT: dict[str, dict[str, Any]] = {
    "turns": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
    "turns and texts": {"prompt": ASKED, "chosen": "two §", "rejected": "six §"},
    "a text and turns": {"prompt": "one §", "chosen": [GOOD], "rejected": [BAD]},
    "a turn each": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
    "whole ones beside a prompt": {
        "prompt": "one §", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD], "messages": ASKED,
    },
    "whole ones beside turns": {
        "prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "one §"}],
        "chosen": {"from": "gpt", "value": "two §"}, "rejected": {"from": "gpt", "value": "six §"},
    },
    "messages": {"messages": ASKED, "chosen": GOOD, "rejected": BAD},
    "alpaca": {"instruction": "one §", "input": "", "chosen": "two §", "rejected": "six §"},
    "a question": {"question": "one §", "chosen": "two §", "rejected": "six §"},
    "ratings beside": {
        "prompt": "one §", "responses": ["so §", "two §", "six §"], "scores": [3, 5, "1"],
    },
    "ratings within": {
        "prompt": "one §", "completions": [
            {"response": "six §", "rating": 1}, {"response": "two §", "rating": 4.5},
        ],
    },
}  # fmt: skip


def write(folder: Path, *records: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def load(path: Path, **options: Any) -> Samples:
    return load_samples(path, options=RecordOptions(**options), task="preference")


def found(samples: Samples) -> list[tuple[Any, ...]]:
    """Return prompt and answers of each sample; the text of an answer that is one turn."""

    def text(answer: Any) -> Any:
        return answer if isinstance(answer, str) or len(answer) > 1 else answer[0].content

    return [
        (sample.prompt, text(sample.chosen), text(sample.rejected))
        for sample in samples.items
        if isinstance(sample, Preference)
    ]


@pytest.mark.parametrize("name", OF_CHAT)
def test_every_shape_of_a_chat_is_the_same_sample(name: str, tmp_path: Path) -> None:
    assert found(load(write(tmp_path, OF_CHAT[name], OF_CHAT[name]))) == [CHAT, CHAT]


def test_texts_are_used_as_they_are(tmp_path: Path) -> None:
    texts = {"prompt": "one §", "chosen": " two", "rejected": " six"}
    assert found(load(write(tmp_path, texts))) == [("one §", " two", " six")]
    whole = {"chosen": "Human: one Bot: two", "rejected": "Human: one Bot: six"}
    assert found(load(write(tmp_path, whole))) == [("Human: one Bot:", " two", " six")]


def test_the_prompt_is_every_turn_that_both_have(tmp_path: Path) -> None:
    more = {"chosen": [*OLDER, *ASKED, GOOD], "rejected": [*OLDER, *ASKED, BAD]}
    ((prompt, *answers),) = found(load(write(tmp_path, {"system": "S §", "messages": OLDER, **{
        "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}})))  # fmt: skip
    assert [turn.role for turn in prompt] == ["system", "user", "assistant", "user"]
    assert answers == ["two §", "six §"]
    ((prompt, *answers),) = found(load(write(tmp_path, more)))
    assert len(prompt) == 3
    (sample,) = load(write(tmp_path, more)).items
    assert isinstance(sample, Preference)
    chosen, _ = sample.sides
    assert [turn.is_learnt for turn in chosen.messages] == [False, False, False, True]  # type: ignore[union-attr]


def test_columns_name_other_fields(tmp_path: Path) -> None:
    record = {"question": "q §", "response_j": "two §", "response_k": "six §"}
    columns = "prompt=question,chosen=response_j,rejected=response_k"
    samples = load(write(tmp_path, record), columns=columns)
    assert found(samples) == [("q §", "two §", "six §")]
    with pytest.raises(DataError, match=f"--columns {columns}"):
        load(write(tmp_path, record))


def test_records_that_prefer_nothing_are_left_out_and_told(tmp_path: Path) -> None:
    same = {"prompt": "one", "chosen": "two", "rejected": "two"}
    tie = {"prompt": "one", "responses": ["two", "six"], "scores": [3, 3]}
    path = write(tmp_path, {**same, "rejected": "six"}, same, same)
    samples = load(path)
    assert len(samples.items) == 1
    assert any("2 of 3 records left out: they prefer no answer" in n for n in samples.notices)
    with pytest.raises(DataError, match="2 prefer no answer"):
        load(write(tmp_path, tie, tie))


def test_the_hash_does_not_know_the_place(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    for folder in (one, other):
        folder.mkdir()
    hashes = {load(write(at, OF_CHAT["turns"])).content_hash() for at in (one, other)}
    hashes.add(load(write(one, {**OF_CHAT["turns"], "chosen": OLDER[1]})).content_hash())
    assert len(hashes) == 2


# ---------------------------------------------------------------- token rows


def rows_of(samples: Samples, **options: Any) -> Tokenized:
    given = TokenOptions(**{"max_length": 64, **options})
    return tokenize(samples, make_tokenizer(), given, makes=PreferenceRows, cache=False)


def test_a_row_is_both_sequences_with_one_prompt(tmp_path: Path) -> None:
    record = {"prompt": "one two ", "chosen": "six", "rejected": "nine ten"}
    made = rows_of(load(write(tmp_path, record)))
    row, tokenizer = made.rows[0], make_tokenizer()
    chosen, rejected = sides_of(row)
    asked = prompt_ids(tokenizer, "one two ")
    for side, text in ((chosen, "six"), (rejected, "nine ten")):
        assert side["input_ids"][: len(asked)] == asked
        assert side["labels"][: len(asked)] == [-100] * len(asked)
        assert tokenizer.decode(side["labels"][len(asked) :]) == f"{text}</s>"
    assert made.rows.lengths() == [len(rejected["input_ids"])]
    assert made.counts.weight == 1
    assert made.counts.tokens == len(row["input_ids"])
    assert made.template_hash is None, "texts go through no template"
    assert rows_of(load(write(tmp_path, OF_CHAT["turns"]))).template_hash


def test_long_answers_lose_their_end_and_keep_the_prompt(tmp_path: Path) -> None:
    record = {"prompt": "one two ", "chosen": "six", "rejected": "nine " * 40}
    samples = load(write(tmp_path, record))
    made = rows_of(samples, max_length=20)
    chosen, rejected = sides_of(made.rows[0])
    assert (len(rejected["input_ids"]), made.counts.rows_truncated) == (20, 1)
    shared = len(prompt_ids(make_tokenizer(), "one two "))
    assert chosen["input_ids"][:shared] == rejected["input_ids"][:shared]
    with pytest.raises(DataError, match="the prompts alone fill --max-length 4"):
        rows_of(samples, max_length=4)
    with pytest.raises(DataError, match="longer than --max-length"):
        rows_of(samples, max_length=20, long_samples="drop")


def test_the_survey_shows_both_answers(tmp_path: Path) -> None:
    samples = load(write(tmp_path, OF_CHAT["turns"]))
    made = rows_of(samples)
    part, options = Part(samples, made), TokenOptions(max_length=64)
    shown = survey(part, None, make_tokenizer(), options, seed=1, shown_rows=1)
    chosen, rejected = shown.shown
    assert chosen.place.endswith("pairs.jsonl:1, chosen")
    assert rejected.place.endswith(", rejected")
    assert chosen.tokens == made.rows[0][CHOSEN_TOKENS]
    assert shown.prompts is not None
    assert (shown.prompts.tried, shown.prompts.differing) == (1, 0)
    assert "supervised_share" not in shown.as_json()


# ---------------------------------------------------------------- bad input

PAIR = {"prompt": "one §", "chosen": "two §", "rejected": "six §"}
RATED: dict[str, Any] = {"prompt": "one §", "responses": ["two §", "six §"], "scores": [2, 1]}
BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"prompt": "one §", "chosen": "two §"}, "expected one of"),
    "one answer with a label": (
        {"prompt": "§", "completion": "§", "label": True}, "as KTO learns from",
    ),
    "an empty answer": ({**PAIR, "rejected": ""}, '"rejected" is empty'),
    "a null answer": ({**OF_CHAT["turns"], "chosen": None}, '"chosen" is null'),
    "a blank answer": ({**PAIR, "chosen": " "}, '"chosen" is empty'),
    "a number for an answer": ({**PAIR, "chosen": 3}, '"chosen" is a number'),
    "a text against turns": ({**PAIR, "chosen": [GOOD]}, "expected both of one kind"),
    "no turn in common": (
        {"chosen": [*ASKED, GOOD], "rejected": [*OLDER[:1], BAD]}, "no turn in common",
    ),
    "a question for an answer": (
        {"prompt": ASKED, "chosen": [*ASKED, *ASKED], "rejected": [BAD]}, "the last turn is",
    ),
    "a prompt that is a number": ({**OF_CHAT["turns"], "prompt": 7}, "the prompt is a number"),
    "an unknown role": (
        {**OF_CHAT["turns"], "chosen": [{"role": "boss", "content": "§"}]}, "turn 2",
    ),
    "a weight": ({**PAIR, "loss_weight": 2}, '"loss_weight"'),
    "a turn with a weight": (
        {**OF_CHAT["turns"], "chosen": [{**GOOD, "weight": 0}]}, "a weight of its own",
    ),
    "one rated answer": ({**RATED, "responses": ["two §"]}, '"responses" has 1'),
    "a rating too few": ({**RATED, "scores": [1]}, "2 answers and 1 scores"),
    "a rating in words": ({**RATED, "scores": [1, "good"]}, "answer 2 has a string for a rating"),
    "no rating": ({"prompt": "§", "responses": ["§", "§§"]}, "answer 1 has no rating"),
    "a boolean for a rating": ({**RATED, "scores": [1, True]}, "a boolean for a rating"),
    "a rated answer without a text": (
        {**RATED, "responses": [{"model": "m"}, "six §"]}, "answer 1 has no text",
    ),
    "another shape": (
        {**OF_CHAT["alpaca"], "prompt": "§"}, "a record of shape preference-alpaca",
    ),
}  # fmt: skip


# Later records are compared with the first.
FIRST = ("no rejected", "one answer with a label")


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_one_line_that_names_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, expected = BAD_RECORDS[name]
    like = PAIR if "prompt" in bad else OF_CHAT["whole conversations"]
    before = [RATED if "responses" in bad else like] * (name not in FIRST)
    path = write(tmp_path, *before, bad)
    code, out, err = run("check", "--task", "preference", "--data", str(path), capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2
    assert len(lines) == 1, err
    assert expected in lines[0]
    assert f"pairs.jsonl:{len(before) + 1}" in lines[0]
    assert SECRET not in err + out


BAD_OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "no data": (("--task", "preference"), "prefers no answer"),
    "kto": (("--task", "preference", "--loss", "kto"), "kto compares an answer"),
    "an unknown loss": (("--task", "preference", "--loss", "simpo"), "'dpo', 'ipo' or 'orpo'"),
    "beta 0": (("--task", "preference", "--beta", "0"), "--beta"),
    "beta nan": (("--task", "preference", "--beta", "nan"), "--beta"),
    "a loss without the task": (("--loss", "orpo"), "expected --task preference"),
    "a beta without the task": (("--beta", "0.5"), "expected --task preference"),
    "train on all": (("--task", "preference", "--train-on", "all", "PAIRS"), "--train-on all"),
    "split": (("--task", "preference", "--long-samples", "split", "PAIRS"), "--long-samples split"),
    "packing": (("--task", "preference", "--packing", "PAIRS"), "--packing"),
    "a stream": (("--task", "preference", "--stream-data", "PAIRS"), "--stream-data"),
    "another format": (("--task", "preference", "--format", "alpaca", "PAIRS"), "preference"),
    "the format without the task": (("--format", "preference", "PAIRS"), "--task causal"),
    "an unknown column": (("--task", "preference", "--columns", "x=a", "PAIRS"), "no field x"),
    "an encoder-decoder": (("--task", "preference", "--model", "t5-small", "PAIRS"), ""),
    "no such adapter": (("--adapter", "nowhere", "PAIRS"), "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = BAD_OPTIONS[name]
    path = write(tmp_path, PAIR, {**PAIR, "prompt": "ten"})
    named = [each for option in options for each in (
        ("--data", str(path)) if option == "PAIRS" else (option,)
    )]  # fmt: skip
    code, _, err = run("check", *named, capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code in (2, 3)
    assert len(lines) == 1, err
    assert expected in lines[0]

"""Chats that are too long are divided between turns; rows are what the template makes of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import CHATML, QWEN3, conversation, make_tokenizer, samples_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run

from qlora_kit.config import TokenOptions
from qlora_kit.data.batch import LOSS_WEIGHTS
from qlora_kit.data.encode import IGNORED, Encoder, Labelled
from qlora_kit.data.row_arrays import Part
from qlora_kit.data.shapes import Conversation, Message
from qlora_kit.data.survey import survey
from qlora_kit.data.template import Renderer
from qlora_kit.data.tokens import Tokenized, tokenize
from qlora_kit.errors import DataError

# Every turn is named, and no name is in another: so a test can see which turns a row has.
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def chat_of(sizes: list[tuple[int, int]], system: int = 0) -> Conversation:
    """Return a chat with rounds of a question and an answer of so many repetitions of its name."""
    turns = [("system", "§" * system)] if system else []
    for letter, (asked, answered) in zip(LETTERS, sizes, strict=False):
        turns += [("user", f"{letter}?" * asked), ("assistant", f"{letter}!" * answered)]
    return conversation(*turns)


def split(
    *items: Conversation, template: str = CHATML, max_length: int, **options: Any
) -> Tokenized:
    tokenizer = make_tokenizer(chat_template=template)
    asked = TokenOptions(max_length=max_length, long_samples="split", **options)
    return tokenize(samples_of(*items), tokenizer, asked, cache=False)


def whole_rows(sample: Conversation, template: str, train_on: Any = "completion") -> list[Labelled]:
    tokenizer = make_tokenizer(chat_template=template)
    return Encoder(tokenizer).encode(Renderer(tokenizer, train_on).render(sample))


def excerpts(sample: Conversation) -> list[tuple[int, int, Conversation]]:
    """Return all runs of rounds of a chat of rounds, behind its system turn."""
    lead = [turn for turn in sample.messages if turn.role == "system"]
    turns = sample.messages[len(lead) :]
    rounds = [turns[at : at + 2] for at in range(0, len(turns), 2)]
    return [
        (
            start,
            end,
            Conversation((*lead, *(t for one in rounds[start:end] for t in one)), "data.jsonl:1"),
        )
        for start in range(len(rounds))
        for end in range(start + 1, len(rounds) + 1)
    ]


SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=7)


@given(
    sizes=SIZES, system=st.integers(0, 6), max_length=st.integers(24, 120),
    template=st.sampled_from([CHATML, "{{ bos_token }}" + CHATML, QWEN3]),
    thinks=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=120)
def test_every_row_is_what_the_template_makes_of_whole_rounds(
    sizes: list[tuple[int, int]], system: int, max_length: int, template: str, thinks: bool
) -> None:
    sample = chat_of(sizes, system)
    if thinks and template is QWEN3:
        turns = tuple(
            Message("assistant", f"<think>\n{turn.content[0]}\n</think>\n\n{turn.content}")
            if turn.role == "assistant"
            else turn
            for turn in sample.messages
        )
        sample = Conversation(turns, sample.place)
    allowed = {
        (tuple(row.ids), tuple(row.labels))
        for _, _, part in excerpts(sample)
        for row in whole_rows(part, template)
    }
    alone = [
        max(row.length for row in whole_rows(part, template))
        for start, end, part in excerpts(sample)
        if end == start + 1
    ]
    uncut = whole_rows(sample, template)
    try:
        made = split(sample, template=template, max_length=max_length)
    except DataError:
        assert max(alone) > max_length
        return
    rows = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in made.rows]
    assert all(len(ids) <= max_length for ids, _ in rows)
    whole = [row for row in rows if row in allowed]
    # Each round that fits in a row by itself is learnt whole; the others lose their end.
    too_long = sum(length > max_length for length in alone)
    assert len(rows) - len(whole) <= too_long
    counts = made.counts
    assert counts.weight == sum(label != IGNORED for _, labels in rows for label in labels[1:])
    for letter in LETTERS[: len(sizes)]:
        assert sum(f"{letter}!" in answers for answers in _answers(made)) <= 1
    in_all = sum(label != IGNORED for row in uncut for label in row.labels)
    assert counts.weight + counts.weight_lost == in_all
    assert counts.rows_truncated == bool(too_long)
    if not too_long:
        assert len(whole) == len(rows)
        assert counts.weight == in_all


def _decoded(made: Tokenized) -> list[str]:
    tokenizer = make_tokenizer()
    return [tokenizer.decode(row["input_ids"]) for row in made.rows]


def _answers(made: Tokenized) -> list[str]:
    """Return what each row learns, without the end of the turn."""
    tokenizer = make_tokenizer()
    return [
        tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        .replace("<|im_end|>", " ")
        .strip()
        for row in made.rows
    ]


ROUNDS = chat_of([(2, 2)] * 5, system=3)
ONE, TWO = (
    len(whole_rows(part, CHATML)[0].ids)
    for part in (chat_of([(2, 2)], 3), chat_of([(2, 2)] * 2, 3))
)


def test_parts_begin_with_the_system_and_fill_from_the_end() -> None:
    made = split(ROUNDS, max_length=TWO)
    assert _answers(made) == ["a!a!", "b!b! c!c!", "d!d! e!e!"]
    assert all(text.startswith("<s><|im_start|>system\n§§§<|im_end|>") for text in _decoded(made))
    assert all(text.count("<|im_start|>system") == 1 for text in _decoded(made))
    counts = made.counts
    assert (counts.rows_split, counts.chunks, counts.rows_truncated) == (1, 3, 0)
    assert counts.describe().startswith("1 chat row; 1 split into 3 chunks; ")
    assert counts.describe().endswith("lost: nothing")


def test_a_chat_that_fits_is_one_row() -> None:
    tokens = len(whole_rows(ROUNDS, CHATML)[0].ids)
    assert len(split(ROUNDS, max_length=tokens).rows) == 1
    made = split(ROUNDS, max_length=tokens - 1)
    assert _answers(made) == ["a!a!", "b!b! c!c! d!d! e!e!"]
    assert {row["uncut_tokens"] for row in made.rows} == {tokens}


def test_the_last_turn_alone_keeps_all_the_turns_before_it_that_fit() -> None:
    made = split(ROUNDS, max_length=TWO, train_on="last-turn")
    assert _answers(made) == ["e!e!"]
    assert "d?d?" in _decoded(made)[0]
    assert (made.counts.rows_split, made.counts.chunks) == (1, 1)


def test_everything_is_learnt_of_each_part() -> None:
    made = split(ROUNDS, max_length=TWO, train_on="all")
    assert [text.count("!") for text in _answers(made)] == [2, 4, 4]


def test_marks_and_weights_stay_with_their_turns() -> None:
    turns = list(ROUNDS.messages)
    turns[4] = Message("assistant", "b!b!", is_learnt=False)
    turns[8] = Message("assistant", "d!d!", loss_weight=0.5)
    made = split(Conversation(tuple(turns), "data.jsonl:1", loss_weight=2.0), max_length=TWO)
    assert _answers(made) == ["a!a!", "c!c!", "d!d! e!e!"]
    weights = [{weight for weight in row[LOSS_WEIGHTS] or [2.0] if weight} for row in made.rows]
    assert weights == [{2.0}, {2.0}, {1.0, 2.0}]


def test_a_round_that_no_row_has_room_for_loses_its_end_and_no_other_does() -> None:
    sample = chat_of([(2, 2), (2, 60), (2, 2)], system=3)
    made = split(sample, max_length=TWO)
    assert _answers(made)[::2] == ["a!a!", "c!c!"]
    cut = _answers(made)[1]
    assert cut == "b!" * (len(cut) // 2) + "b" * (len(cut) % 2)
    assert len(made.rows[1]["input_ids"]) == TWO
    counts = made.counts
    assert (counts.rows_split, counts.rows_truncated, counts.chunks) == (1, 1, 3)
    assert counts.weight_lost == 2 * 60 + 1 - len(cut)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}
TOOLS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments|tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_call_stays_with_its_result_and_a_long_round_ends_with_an_answer() -> None:
    turns = [Message("user", "sum?")]
    for number in range(6):
        turns.append(Message("assistant", f"c{number}", (CALL,)))
        turns.append(Message("tool", f"{number}"))
    turns += [Message("assistant", "sum!"), Message("user", "so?"), Message("assistant", "so!")]
    sample = Conversation(tuple(turns), "data.jsonl:1")
    tokens = len(whole_rows(sample, TOOLS)[0].ids)
    made = split(sample, template=TOOLS, max_length=tokens - 1)
    assert _answers(made)[1] == "so!"
    assert "sum!" in _answers(made)[0]
    short = split(sample, template=TOOLS, max_length=80)
    text = _decoded(short)[0]
    assert text.endswith('add{"n": 1}<|im_end|>')
    assert len(short.rows[0]["input_ids"]) <= 80
    assert (len(short.rows), short.counts.rows_truncated) == (2, 1)


def test_what_the_template_refuses_of_a_part_is_a_fault_with_its_line() -> None:
    template = (
        "{% if messages[0]['content'] != 'a?a?' %}{{ raise_exception('no a') }}{% endif %}" + CHATML
    )
    with pytest.raises(DataError, match=r"^data\.jsonl:1: the chat template refuses .*no a"):
        split(chat_of([(2, 2)] * 5), template=template, max_length=TWO)


def test_prompts_of_parts_are_those_of_generation() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    options = TokenOptions(max_length=TWO, long_samples="split")
    samples = samples_of(chat_of([(2, 2), (9, 2), (2, 2), (2, 9), (2, 2), (3, 1), (1, 1)], 3))
    rows = tokenize(samples, tokenizer, options, cache=False)
    found = survey(Part(samples, rows), None, tokenizer, options, seed=0, shown_rows=0)
    assert found.prompts is not None
    assert (found.prompts.tried, found.prompts.differing) == (7, 0)
    assert found.longest[0].outcome == "split"
    assert found.longest[0].tokens == found.lengths.longest > TWO


def test_long_chats_are_split_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": turn.role, "content": turn.content} for turn in ROUNDS.messages]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    asked = ("--data", str(path), "--chat-template", "zephyr", "--long-samples", "split")
    code, out, _ = run("check", *asked, "--max-length", "60", "--json", capsys=capsys)
    assert code == 0
    counts = json.loads(out)["training"]
    assert counts["rows_split"] == 1
    assert counts["chunks"] > 1
    assert counts["supervised_tokens_lost"] == 0

"""Facts that turns carry beside their text: the call a tool answers, and turns not to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import CHATML, QWEN3, make_tokenizer

import qlora_kit as qk
from qlora_kit.config import RecordOptions, TokenOptions
from qlora_kit.data.chat_text import ChatWriter
from qlora_kit.data.encode import IGNORED
from qlora_kit.data.samples import Samples, load_samples
from qlora_kit.data.shapes import Conversation
from qlora_kit.data.template import Renderer
from qlora_kit.data.tokens import Tokenized, tokenize
from qlora_kit.errors import DataError

# The rules for tools of Mistral's own template, from its documentation: every call and every
# result has an id of nine letters or digits, and results have a name.
MISTRAL_TOOLS = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}"
    "{% if m['tool_call_id'] is not defined or m['tool_call_id']|length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}"
    "[TOOL_RESULTS]{{ m['name'] }} {{ m['tool_call_id'] }}: {{ m['content'] }}[/TOOL_RESULTS]"
    "{% elif m['tool_calls'] is defined %}"
    "[TOOL_CALLS]{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] }} {{ c['function']['arguments']|tojson }} {{ c['id'] }}"
    "{% endfor %}</s>"
    "{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
CALL = {"id": "abc123DEF", "function": {"name": "add", "arguments": {"one": 1, "other": 2}}}
TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "How much is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "abc123DEF", "name": "add"},
    {"role": "assistant", "content": "It is 3."},
]


def _load(folder: Path, *turns: list[dict[str, Any]], **options: Any) -> Samples:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return load_samples(path, options=RecordOptions(**options))


def _fault(folder: Path, turn: dict[str, Any]) -> str:
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, turn]
    with pytest.raises(DataError) as caught:
        _load(folder, [*talk, {"role": "assistant", "content": "b"}])
    (fault,) = caught.value.faults
    return str(fault).removeprefix(f"{folder}/chats.jsonl:1: ")


# ---------------------------------------------------------------- tools


def test_a_template_is_given_the_call_that_a_tool_answers_and_its_name(tmp_path: Path) -> None:
    samples = _load(tmp_path, TOOL_TURNS)
    assert "not read" not in samples.notices[0]
    (sample,) = samples.items
    assert isinstance(sample, Conversation)
    tokenizer = make_tokenizer(chat_template=MISTRAL_TOOLS)
    assert ChatWriter(tokenizer).write(sample.messages, sample.place) == (
        "[INST]How much is it?[/INST]"
        '[TOOL_CALLS]add {"one": 1, "other": 2} abc123DEF</s>'
        "[TOOL_RESULTS]add abc123DEF: 3[/TOOL_RESULTS]"
        "It is 3.</s>"
    )
    rows = tokenize(samples, tokenizer, TokenOptions(), cache=False)
    assert _learnt(tokenizer, rows) == ['[TOOL_CALLS]add {"one": 1, "other": 2} abc123DEF</s>'
                                        "It is 3.</s>"]  # fmt: skip


def test_a_template_that_needs_the_call_refuses_turns_without_it(tmp_path: Path) -> None:
    turns = [{k: v for k, v in turn.items() if k != "tool_call_id"} for turn in TOOL_TURNS]
    samples = _load(tmp_path, turns)
    tokenizer = make_tokenizer(chat_template=MISTRAL_TOOLS)
    with pytest.raises(DataError, match=r"jsonl:1: the chat template refuses .*nine characters"):
        tokenize(samples, tokenizer, TokenOptions(), cache=False)


def test_the_call_and_the_name_count_in_the_hash_of_the_data(tmp_path: Path) -> None:
    other = [*TOOL_TURNS[:2], {**TOOL_TURNS[2], "tool_call_id": "xyz123DEF"}, TOOL_TURNS[3]]
    hashes = {_load(tmp_path, turns).content_hash() for turns in (TOOL_TURNS, other)}
    assert len(hashes) == 2


def test_names_of_others_are_told_as_not_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u", "name": "Ann", "tool_call_id": "x"}, TOOL_TURNS[3]]
    assert (
        _load(tmp_path, turns).notices[0].endswith("not read: messages.name, messages.tool_call_id")
    )


def test_a_call_that_is_no_text_is_refused(tmp_path: Path) -> None:
    fault = _fault(tmp_path, {"role": "tool", "content": "3", "tool_call_id": 7})
    assert fault == (
        'turn 3: "tool_call_id" is a number; expected a string; write the text in quotes'
    )


def test_arguments_that_a_table_fills_with_nulls_are_not_there(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    def row(name: str, argument: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {argument: {"type": "string"}}}
        call = {"function": {"name": name, "arguments": {argument: "x"}}}
        turns = [TOOL_TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        tool = {"name": name, "parameters": schema}
        return {"messages": turns, "tools": [tool], "system": None}

    path = tmp_path / "calls.parquet"
    rows = [row("weather", "city"), row("time", "zone")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert "zone" in parquet.read_table(path).to_pylist()[0]["tools"][0]["parameters"]["properties"]
    first, second = load_samples(path).items
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert first.tools[0]["function"]["parameters"]["properties"] == {"city": {"type": "string"}}
    assert first.messages[1].tool_calls[0]["function"]["arguments"] == {"city": "x"}
    assert second.messages[1].tool_calls[0]["function"]["arguments"] == {"zone": "x"}


def test_a_null_that_is_written_out_stays(tmp_path: Path) -> None:
    call = {"function": {"name": "find", "arguments": {"limit": None}}}
    turns = [TOOL_TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    (sample,) = _load(tmp_path, turns).items
    assert isinstance(sample, Conversation)
    assert sample.messages[1].tool_calls[0]["function"]["arguments"] == {"limit": None}


# ---------------------------------------------------------------- turns that are not to be learnt


def _learnt(tokenizer: Any, rows: Tokenized) -> list[str]:
    texts = []
    for row in rows.rows:
        ids = [token for token, label in zip(row["input_ids"], row["labels"], strict=True)
               if label != IGNORED]  # fmt: skip
        texts.append(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return texts


def _talk(**third: Any) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for number in (1, 2, 3):
        turns.append({"role": "user", "content": f"ask {number}"})
        turns.append({"role": "assistant", "content": f"say {number}"})
    turns[3] |= third
    return turns


MARKS: list[dict[str, Any]] = [{"weight": 0}, {"weight": 0.0}, {"train": False}]


@pytest.mark.parametrize("mark", MARKS)
def test_exactly_the_marked_turns_are_left_out_of_the_loss(
    tmp_path: Path, mark: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    samples = _load(tmp_path, _talk(**mark))
    assert samples.notices[1:] == (
        f"{tmp_path}/chats.jsonl: 1 answer is marked not to be learnt (weight, train), and left "
        "out of the loss",
    )
    marked = tokenize(samples, tokenizer, TokenOptions(), cache=False)
    plain = tokenize(_load(tmp_path, _talk()), tokenizer, TokenOptions(), cache=False)
    assert _learnt(tokenizer, plain) == ["say 1<|im_end|>say 2<|im_end|>say 3<|im_end|>"]
    assert _learnt(tokenizer, marked) == ["say 1<|im_end|>say 3<|im_end|>"]
    assert marked.rows[0]["input_ids"] == plain.rows[0]["input_ids"], "it is still read"


@pytest.mark.parametrize("mark", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"train": None}])
def test_turns_marked_to_be_learnt_are_as_all_others(tmp_path: Path, mark: dict[str, Any]) -> None:
    samples = _load(tmp_path, _talk(**mark))
    assert len(samples.notices) == 1
    assert samples.content_hash() == _load(tmp_path, _talk()).content_hash()


def test_sharegpt_turns_are_marked_likewise(tmp_path: Path) -> None:
    path = tmp_path / "shared.json"
    turns = [
        {"from": "human", "value": "ask", "weight": 0}, {"from": "gpt", "value": "one"},
        {"from": "human", "value": "ask", "train": False},
        {"from": "gpt", "value": "two", "weight": 0}, {"from": "human", "value": "ask"},
        {"from": "gpt", "value": "three", "train": True},
    ]  # fmt: skip
    path.write_text(json.dumps([{"conversations": turns}]))
    tokenizer = make_tokenizer(chat_template=CHATML)
    rows = tokenize(load_samples(path), tokenizer, TokenOptions(), cache=False)
    assert _learnt(tokenizer, rows) == ["one<|im_end|>three<|im_end|>"]


def test_a_last_answer_that_is_not_learnt_is_not_read_either(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    turns = _talk()
    turns[5]["weight"] = 0
    rows = tokenize(_load(tmp_path, turns), tokenizer, TokenOptions(), cache=False)
    assert _learnt(tokenizer, rows) == ["say 1<|im_end|>say 2<|im_end|>"]
    assert "say 3" not in tokenizer.decode(rows.rows[0]["input_ids"])


def test_a_record_of_which_nothing_is_to_be_learnt_is_counted_as_dropped(tmp_path: Path) -> None:
    turns = _talk()
    for turn in turns:
        turn["weight"] = 0
    tokenizer = make_tokenizer(chat_template=CHATML)
    rows = tokenize(_load(tmp_path, turns, _talk()), tokenizer, TokenOptions(), cache=False)
    assert (rows.counts.rows_read, rows.counts.rows_kept, rows.counts.rows_dropped) == (2, 1, 1)
    assert list(rows.dropped) == [0]
    with pytest.raises(DataError, match="no supervised token is left in 1 rows"):
        tokenize(_load(tmp_path, turns), tokenizer, TokenOptions(), cache=False)


def test_last_turn_learns_the_last_answer_only_if_it_is_not_marked(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    last = TokenOptions(train_on="last-turn")
    rows = tokenize(_load(tmp_path, _talk(weight=0)), tokenizer, last, cache=False)
    assert _learnt(tokenizer, rows) == ["say 3<|im_end|>"]


def test_everything_and_a_mark_contradict_each_other(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    samples = _load(tmp_path, _talk(weight=0))
    with pytest.raises(DataError, match=r":1: turn 4 is marked not to be learnt; .*--train-on all"):
        tokenize(samples, tokenizer, TokenOptions(train_on="all"), cache=False)


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        (
            {"role": "assistant", "content": "x", "weight": -0.5},
            'turn 3 has -0.5 for "weight"; expected 0, or a number from 1e-9 to 1e9, by which the '
            "loss of its tokens is multiplied; correct it",
        ),
        (
            {"role": "assistant", "content": "x", "train": "no"},
            'turn 3 has a string for "train"; expected 0 or 1, false or true: a turn is learnt or '
            "it is not; correct it",
        ),
        (
            {"role": "assistant", "content": "x", "weight": 1, "train": False},
            'turn 3 has a "weight" and a "train" that contradict each other; expected one of '
            "them; remove the other",
        ),
        (
            {"role": "user", "content": "x", "train": True},
            'turn 3 is the user\'s and has "train" on; expected only answers to be learnt; '
            'remove the "train"',
        ),
    ],
)
def test_what_a_mark_cannot_say_is_refused(
    tmp_path: Path, turn: dict[str, Any], fault: str
) -> None:
    assert _fault(tmp_path, turn) == fault


def test_record_options_are_exported() -> None:
    assert qk.RecordOptions is RecordOptions


# ---------------------------------------------------------------- parts with a value


PARTS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "value": "How much "}, {"value": "is it?"}],
     "loss_weight": 0.0},
    {"role": "assistant", "loss_weight": 1.0, "content": [
        {"type": "reasoning", "value": "Add them."},
        {"type": "text", "value": "I ask."},
        {"type": "tool_call", "value": '{"name": "add", "arguments": {"one": 1, "other": 2}}'},
    ]},
    {"role": "tool", "content": [{"type": "text", "value": "3"}]},
    {"role": "assistant", "content": [{"type": "reasoning", "value": ""},
                                      {"type": "text", "value": "It is 3."}]},
]  # fmt: skip
ADD = {"function": {"name": "add", "arguments": {"one": 1, "other": 2}}}
AS_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "How much is it?", "weight": 0},
    {"role": "assistant", "content": "<think>\nAdd them.\n</think>\n\nI ask.", "tool_calls": [ADD]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "<think>\n\n</think>\n\nIt is 3."},
]


def test_parts_of_llama_factory_are_the_turns_they_stand_for(tmp_path: Path) -> None:
    samples, plain = _load(tmp_path, PARTS), _load(tmp_path, AS_TURNS)
    assert samples.content_hash() == plain.content_hash()
    assert "not read" not in samples.notices[0]


def test_the_reasoning_of_a_part_is_learnt_where_the_template_has_its_place(
    tmp_path: Path,
) -> None:
    turns = [PARTS[0], {"role": "assistant", "content": PARTS[1]["content"][:2]}]
    tokenizer = make_tokenizer(chat_template=QWEN3)
    rows = tokenize(_load(tmp_path, turns), tokenizer, TokenOptions(), cache=False)
    assert _learnt(tokenizer, rows) == ["<think>\nAdd them.\n</think>\n\nI ask.<|im_end|>"]


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        (
            {"role": "user", "content": [{"type": "reasoning", "value": "SECRET"}]},
            "turn 3 reasons as user; expected only an assistant to; correct its role or remove "
            "that part",
        ),
        (
            {"role": "user", "content": [{"type": "tool_call", "value": "{}"}]},
            "turn 3 calls a tool as user; expected only an assistant to; correct its role or "
            "remove the call",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "value": "SECRET"}]},
            'turn 3: a part of type "image_url"; expected {"type": "text", "text": ...}; remove '
            "the record: only text is trained",
        ),
        (
            {"role": "user", "content": [{"type": "text", "value": 3}]},
            'turn 3: "value" is a number; expected a string; write the text in quotes',
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_call", "value": "SECRET"}]},
            "turn 3: the call: not valid JSON (Expecting value at column 1); expected it whole; "
            "correct it",
        ),
        (
            {"role": "user", "content": "x", "loss_weight": 1.0},
            'turn 3 is the user\'s and has "loss_weight" on; expected only answers to be learnt; '
            'remove the "loss_weight"',
        ),
    ],
)
def test_a_part_that_cannot_be_read_is_one_true_line(
    tmp_path: Path, turn: dict[str, Any], fault: str
) -> None:
    assert _fault(tmp_path, turn) == fault


def test_a_loss_weight_of_nothing_is_not_learnt(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    samples = _load(tmp_path, _talk(loss_weight=0.0))
    rows = tokenize(samples, tokenizer, TokenOptions(), cache=False)
    assert _learnt(tokenizer, rows) == ["say 1<|im_end|>say 3<|im_end|>"]


# ---------------------------------------------------------------- who speaks when


FIRST = [
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "say"},
]
TWO = [FIRST[1], FIRST[2], {"role": "assistant", "content": "more"}]
# Templates, each with the opening of an answer that has no text before it.
OPENINGS = {
    "alpaca": "<s>### Response:\n",
    "chatml": "<s><|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>model\n",
    "llama-3": "<s><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>",
    "vicuna": "<s> ASSISTANT:",
    "zephyr": "<s><|assistant|>\n",
}
ENDS = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama-3": "<|eot_id|>"}
TOKENS = [
    "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


@pytest.mark.parametrize("name", OPENINGS)
def test_the_first_turn_may_be_the_assistant_s(tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer(additional_special_tokens=TOKENS)
    samples = _load(tmp_path, FIRST)
    renderer = Renderer(tokenizer, chat_template=name)
    opening, end = OPENINGS[name], ENDS.get(name, "</s>")
    space = " " if name in ("mistral", "vicuna") else ""
    (rendered,) = renderer.render(samples.items[0])
    assert renderer.prompt_text(()) == opening
    assert rendered.text.startswith(f"{opening}{space}hello{end}")
    assert rendered.answers[0] == len(opening)
    rows = tokenize(samples, tokenizer, TokenOptions(chat_template=name), cache=False)
    assert _learnt(tokenizer, rows) == [f"{space}hello{end}{space}say{end}"]


# Texts of a template's own that it may write before the very first answer.
OTHERS = {
    "a system of its own": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
        "{% endif %}" + CHATML,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n",
    ),
    "reasoning in each last answer": (QWEN3, "<|im_start|>assistant\n"),
    "an end of the last message": (
        CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
                       "{% if add"),
        "<|im_start|>assistant\n",
    ),
    "reasoning that the prompt opens": (
        CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}"),
        "<|im_start|>assistant\n<think>\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
def test_the_first_answer_follows_what_its_template_opens_it_with(
    tmp_path: Path, form: str
) -> None:
    template, opening = OTHERS[form]
    tokenizer = make_tokenizer(chat_template=template)
    renderer = Renderer(tokenizer)
    assert renderer.prompt_text(()) == opening
    rendered = renderer.render(_load(tmp_path, FIRST).items[0])
    assert rendered[0].text.startswith(opening)
    assert rendered[0].answers[0] == len(opening)


def test_a_template_that_wants_the_user_first_says_so(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user first') }}{% endif %}"
    )
    samples = _load(tmp_path, FIRST)
    with pytest.raises(DataError, match=r"jsonl:1: the chat template refuses .*\(the user first\)"):
        tokenize(samples, make_tokenizer(chat_template=template + CHATML), TokenOptions())


@pytest.mark.parametrize("name", OPENINGS)
def test_two_answers_in_a_row_are_both_learnt(tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer(additional_special_tokens=TOKENS)
    samples = _load(tmp_path, TWO)
    rows = tokenize(samples, tokenizer, TokenOptions(chat_template=name), cache=False)
    end, space = ENDS.get(name, "</s>"), " " if name in ("mistral", "vicuna") else ""
    assert _learnt(tokenizer, rows) == [f"{space}say{end}{space}more{end}"]


def test_a_template_without_a_prompt_for_a_second_answer_is_one_line(tmp_path: Path) -> None:
    old = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
        "{% if m['role'] == 'user' or not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    samples = _load(tmp_path, TWO)
    with pytest.raises(DataError) as caught:
        tokenize(samples, make_tokenizer(chat_template=old), TokenOptions(), cache=False)
    assert str(caught.value) == (
        f"{tmp_path}/chats.jsonl:1: turn 3 is an answer right after another, which the chat "
        "template has no prompt for; expected the user's turn between them; join the two answers, "
        "or use another template"
    )


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (CHATML, "system"),
        ("{# knows developer #}" + CHATML, "developer"),
        # As in Qwen's template, a turn with an unknown role would be left out silently.
        (
            "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
            "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
            "system",
        ),
    ],
)
def test_the_developer_speaks_as_the_system_where_no_other_is_known(
    tmp_path: Path, template: str, role: str
) -> None:
    turns = [{"role": "developer", "content": "Be kind."}, *FIRST[1:]]
    tokenizer = make_tokenizer(chat_template=template)
    (rendered,) = Renderer(tokenizer).render(_load(tmp_path, turns).items[0])
    assert rendered.text.startswith(f"<|im_start|>{role}\nBe kind.<|im_end|>\n<|im_start|>user")


def test_the_default_template_has_a_place_for_the_developer(tmp_path: Path) -> None:
    turns = [{"role": "developer", "content": "Be kind."}, *FIRST[1:]]
    (rendered,) = Renderer(make_tokenizer()).render(_load(tmp_path, turns).items[0])
    assert rendered.text.startswith("<s>Be kind.\n\n### Instruction:\nask")

"""Masks, compared with an oracle of characters that shares no code with the kit.

The oracle renders conversations with transformers alone. Every answer in them is a text that stands
nowhere else. So the oracle looks the answer up, adds the end token of the template, and marks these
characters. The tokens that the kit supervises must cover exactly the same characters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from data_fixtures import QWEN3, make_tokenizer, samples_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.config import TokenOptions
from qlora_kit.data.chat_template import built_in_templates
from qlora_kit.data.encode import IGNORED, prompt_ids
from qlora_kit.data.shapes import Conversation, Message
from qlora_kit.data.template import Renderer
from qlora_kit.data.tokens import tokenize
from qlora_kit.errors import DataError

# Marks answers in the way that transformers' own masks expect.
GENERATION = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<start_of_turn>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
    "<｜User｜>", "<｜Assistant｜>", "<eos>", "<bos>",
]  # fmt: skip


class Known(NamedTuple):
    """The facts about a template that the oracle gets; all of them can be read in its text."""

    template: str
    end: str
    """what ends an answer"""
    before: str = ""
    """what stands between the generation prompt and an answer"""
    last_end: str | None = None
    """what ends the last answer, where that is not the same"""
    bos: str | None = "<s>"
    eos: str = "</s>"
    system: bool = True
    tools: bool = False
    reasons: bool = False
    """whether answers to earlier questions lose their reasoning"""

    def tokenizer(self) -> Any:
        return make_tokenizer(
            bos_token=self.bos,
            eos_token=self.eos,
            chat_template=self.template,
            additional_special_tokens=[t for t in _SPECIAL if t not in (self.bos, self.eos)],
        )


def _known(assets: Path) -> dict[str, Known]:
    golden = {e["name"]: e for e in json.loads((assets / "templates/golden.json").read_text())}
    files = {path.stem: path.read_text() for path in (assets / "templates").glob("*.jinja")}

    def of(name: str, end: str, **more: Any) -> Known:
        entry = golden[name]
        names = {"bos": entry["bos_token"] or None, "eos": entry["eos_token"] or "</s>"}
        return Known(entry["chat_template"], end, **{**names, **more})

    sentence = "<｜end▁of▁sentence｜>"
    built_in = built_in_templates()
    return {
        "_base": of("_base", "<|im_end|>"),
        "gpt2": of("gpt2", "</s>", eos="</s>"),
        "zephyr-gemma": of(
            "HuggingFaceH4/zephyr-7b-gemma-v0.1", "<|im_end|>", last_end="<|im_end|>\n<eos>"
        ),
        "mistral": of("mistralai/Mistral-7B-Instruct-v0.1", "</s>", system=False),
        "qwen1.5": of("Qwen/Qwen1.5-72B-Chat", "<|im_end|>", eos="<|im_end|>"),
        "deepseek": of("deepseek-ai/deepseek-llm-7b-chat", sentence, before=" "),
        "internlm": of("internlm/internlm2-chat-7b", "<|im_end|>", last_end="<|im_end|>\n</s>"),
        "qwen2.5": Known(
            files["Qwen-Qwen2.5-7B-Instruct"], "<|im_end|>", bos=None, eos="<|im_end|>", tools=True
        ),
        "llama-3.1": Known(
            files["meta-llama-Llama-3.1-8B-Instruct"], "<|eot_id|>", eos="<|eot_id|>", tools=True
        ),
        "r1": Known(
            files["deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"], sentence,
            bos="<｜begin▁of▁sentence｜>", eos=sentence, reasons=True,
        ),
        "qwen3": Known(QWEN3, "<|im_end|>", bos=None, eos="<|im_end|>", reasons=True),
        "generation": Known(GENERATION, "<|im_end|>"),
        "alpaca built in": Known("{{- bos_token -}}" + built_in["alpaca"], "</s>"),
        "chatml built in": Known(built_in["chatml"], "<|im_end|>", bos=None),
        "gemma built in": Known(built_in["gemma"], "<end_of_turn>"),
        "llama-3 built in": Known(built_in["llama-3"], "<|eot_id|>"),
        "mistral built in": Known(built_in["mistral"], "</s>", before=" "),
        "vicuna built in": Known(built_in["vicuna"], "</s>", before=" "),
        "zephyr built in": Known(built_in["zephyr"], "</s>"),
    }  # fmt: skip


NAMES = (
    "_base", "gpt2", "zephyr-gemma", "mistral", "qwen1.5", "deepseek", "internlm", "qwen2.5",
    "llama-3.1", "r1", "qwen3", "generation", "alpaca built in", "chatml built in",
    "gemma built in", "llama-3 built in", "mistral built in", "vicuna built in", "zephyr built in",
)  # fmt: skip
WITH_TOOLS = ("qwen2.5", "llama-3.1")
ROLES = {
    "one": ("user", "assistant"),
    "two": ("user", "assistant", "user", "assistant"),
    "four": ("user", "assistant") * 4,
    "system": ("system", "user", "assistant"),
    "system, three": ("system", *(("user", "assistant") * 3)),
}


def _turn(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    return {**plain, "tool_calls": list(message.tool_calls)} if message.tool_calls else plain


def _render(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    turns = [_turn(message) for message in messages]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    return text


def _talk(roles: Sequence[str], words: str = "says word") -> Conversation:
    messages = tuple(Message(r, f"{r} {words} {n}x{n}.") for n, r in enumerate(roles))
    return Conversation(messages, "data.jsonl:1")


# ---------------------------------------------------------------- what the kit supervises


class Learnt(NamedTuple):
    text: str
    marked: frozenset[int]


def _learnt(tokenizer: Any, sample: Conversation, **options: Any) -> list[Learnt]:
    """Return the text of each token row, and the characters of its supervised tokens."""
    made = tokenize(samples_of(sample), tokenizer, TokenOptions(**options), cache=False)
    found = []
    for row in made.rows:
        text, marked = "", set()
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, IGNORED)
            piece = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if label != IGNORED:
                marked |= {*range(len(text), len(text) + len(piece))}
            text += piece
        found.append(Learnt(text, frozenset(marked)))
    return found


def _oracle(
    known: Known, tokenizer: Any, sample: Conversation, answers: Sequence[int], **options: Any
) -> Learnt:
    """Mark some answers of a conversation in the text that transformers makes of it."""
    text = _render(tokenizer, sample.messages, **options)
    last = max(i for i, message in enumerate(sample.messages) if message.role == "assistant")
    if not text.rstrip().endswith(known.last_end or known.end):
        text += known.end
    marked: set[int] = set()
    for index in answers:
        content = sample.messages[index].content
        assert text.count(content) == 1
        start = text.index(content) - len(known.before)
        end = known.last_end if index == last and known.last_end else known.end
        stop = text.index(content) + len(content)
        assert text[start:].startswith(known.before + content)
        assert text.startswith(end, stop)
        marked |= {*range(start, stop + len(end))}
    bos = tokenizer.bos_token or ""
    shift = 0 if text.startswith(bos) else len(bos)
    return Learnt(bos * bool(shift) + text, frozenset(place + shift for place in marked))


def _answers(sample: Conversation) -> list[int]:
    return [i for i, message in enumerate(sample.messages) if message.role == "assistant"]


# ---------------------------------------------------------------- plain conversations


@pytest.mark.parametrize("talk", ROLES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("r1", "qwen3")])
def test_every_answer_with_its_end_and_nothing_else(assets: Path, name: str, talk: str) -> None:
    known = _known(assets)[name]
    tokenizer, sample = known.tokenizer(), _talk(ROLES[talk])
    if talk.startswith("system") and not known.system:
        with pytest.raises(DataError, match=r"^data.jsonl:1: the chat template refuses"):
            _learnt(tokenizer, sample)
        return
    assert _learnt(tokenizer, sample) == [_oracle(known, tokenizer, sample, _answers(sample))]
    last = _oracle(known, tokenizer, sample, _answers(sample)[-1:])
    assert _learnt(tokenizer, sample, train_on="last-turn") == [last]
    ((text, marked),) = _learnt(tokenizer, sample, train_on="all")
    assert (text, len(marked)) == (last.text, len(text) - len(known.bos or ""))


@pytest.mark.parametrize("name", NAMES)
def test_each_generation_prompt_is_a_prefix_of_what_is_learnt(assets: Path, name: str) -> None:
    known = _known(assets)[name]
    tokenizer = known.tokenizer()
    sample = _talk(ROLES["four"])
    made = tokenize(samples_of(sample), tokenizer, TokenOptions(), cache=False)
    prompts = [_render(tokenizer, sample.messages[:i], add_generation_prompt=True)
               for i in _answers(sample)]  # fmt: skip
    for number, prompt in enumerate(prompts):
        ids = prompt_ids(tokenizer, prompt)
        # If a prompt ends in white space that this tokenizer would join with the answer, the kit
        # encodes both apart. In a later prompt's history they are not apart, so text is compared.
        by_text = number > 0 and prompt[-2:].isspace()
        learnt_after = 0
        for row in made.rows:
            starts = [n for n in range(1, len(row["labels"]))
                      if row["labels"][n - 1] == IGNORED != row["labels"][n]]  # fmt: skip
            before = [row["input_ids"][:start] for start in starts]
            if by_text:
                learnt_after += [*map(tokenizer.decode, before)].count(tokenizer.decode(ids))
            else:
                learnt_after += before.count(ids)
        assert learnt_after == 1
    for row in made.rows:
        ends = {*tokenizer.convert_tokens_to_ids([known.end, known.eos])}
        assert row["input_ids"].count(tokenizer.bos_token_id) == (1 if known.bos else 0)
        assert ends & {*row["labels"][-2:]}


# A template may trim white space at the edges, so the oracle's texts have none there.
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"], max_codepoint=0x1F700),
                min_size=1, max_size=12)  # fmt: skip


@given(texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), name=st.sampled_from(NAMES))
@settings(deadline=None, max_examples=120)
def test_whatever_is_said(assets: Path, texts: list[tuple[str, str]], name: str) -> None:
    known = _known(assets)[name]
    tokenizer = known.tokenizer()
    pairs = [pair for turn in texts for pair in zip(("user", "assistant"), turn, strict=True)]
    messages = tuple(Message(r, f"⟦{n}:{text}⟧") for n, (r, text) in enumerate(pairs))
    sample = Conversation(messages, "data.jsonl:1")
    if known.reasons:
        expected = [_reasoned(name, known, tokenizer, sample, i) for i in _answers(sample)]
        assert _learnt_by_ids(tokenizer, sample) == [_by_ids(tokenizer, e) for e in expected]
        return
    oracle = _oracle(known, tokenizer, sample, _answers(sample))
    assert _learnt_by_ids(tokenizer, sample) == [_by_ids(tokenizer, oracle)]


def _learnt_by_ids(tokenizer: Any, sample: Conversation) -> list[list[tuple[bool, str]]]:
    """Return each row as runs of text, supervised or not: characters may be several tokens."""
    made = tokenize(samples_of(sample), tokenizer, TokenOptions(), cache=False)
    rows = []
    for row in made.rows:
        runs: list[tuple[bool, list[int]]] = []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if not runs or runs[-1][0] != (label != IGNORED):
                runs.append((label != IGNORED, []))
            runs[-1][1].append(token)
        rows.append([(on, tokenizer.decode(ids, clean_up_tokenization_spaces=False))
                     for on, ids in runs])  # fmt: skip
    return rows


def _by_ids(tokenizer: Any, learnt: Learnt) -> list[tuple[bool, str]]:
    runs: list[tuple[bool, str]] = []
    for place, character in enumerate(learnt.text):
        on = place in learnt.marked
        if runs and runs[-1][0] == on:
            runs[-1] = (on, runs[-1][1] + character)
        else:
            runs.append((on, character))
    # White space after the last end token is the template's text, which is not learnt.
    return runs


# ---------------------------------------------------------------- reasoning


def _reasoned(name: str, known: Known, tokenizer: Any, sample: Conversation, index: int) -> Learnt:
    """Return the generation prompt of one answer, and the answer, which is learnt."""
    prompt = _render(tokenizer, sample.messages[:index], add_generation_prompt=True)
    content = sample.messages[index].content
    thought, _, said = content.rpartition("</think>")
    thought, said = thought.removeprefix("<think>").strip("\n"), said.lstrip("\n")
    opening = "" if name == "r1" else "<think>\n"
    answer = f"{opening}{thought}\n</think>\n\n{said}{known.end}"
    text = prompt + answer
    marked = frozenset(range(len(prompt), len(text)))
    return Learnt(text + ("\n" if name == "qwen3" else ""), marked)


THOUGHTS = {
    "none": ("Hello 1x1.", "Hello 2x2.", "Hello 3x3."),
    "each": tuple(f"<think>\nIt is {n}.\n</think>\n\nHello {n}x{n}." for n in (1, 2, 3)),
    "some": ("Hello 1x1.", "<think>\nIt is 2.\n</think>\n\nHello 2x2.", "Hello 3x3."),
}


@pytest.mark.parametrize("thoughts", THOUGHTS)
@pytest.mark.parametrize("name", ["r1", "qwen3"])
def test_each_answer_of_a_reasoning_model_is_learnt_after_its_own_prompt(
    assets: Path, name: str, thoughts: str
) -> None:
    known = _known(assets)[name]
    tokenizer = known.tokenizer()
    pairs = [(f"Ask {n}", text) for n, text in enumerate(THOUGHTS[thoughts])]
    messages = tuple(
        Message(role, text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    sample = Conversation(messages, "data.jsonl:1")
    expected = [_reasoned(name, known, tokenizer, sample, index) for index in (1, 3, 5)]
    assert _learnt(tokenizer, sample) == expected
    assert _learnt(tokenizer, sample, train_on="last-turn") == expected[-1:]
    counts = tokenize(samples_of(sample), tokenizer, TokenOptions(), cache=False).counts
    assert (counts.rows_kept, counts.chunks, counts.rows_by_turn) == (1, 3, 1)
    assert "1 of these learnt turn by turn" in counts.describe()
    if thoughts == "none":
        return
    # Learnt in one row, the answers would lose the reasoning that the template strips.
    with pytest.raises(DataError, match=r"shortens the answer of turn .*--train-on completion"):
        _learnt(tokenizer, sample, train_on="all")


def test_steps_of_one_answer_stay_in_one_row() -> None:
    """A row is not divided for reasoning that the template keeps, as between a question's calls."""
    known = Known(QWEN3, "<|im_end|>", bos=None, eos="<|im_end|>")
    thought = "<think>\nIt is {0}.\n</think>\n\nHello {0}x{0}."
    messages = (
        Message("user", "Ask"), Message("assistant", thought.format(1)),
        Message("tool", "42"), Message("assistant", thought.format(2)),
    )  # fmt: skip
    (learnt,) = _learnt(known.tokenizer(), Conversation(messages, "data.jsonl:1"))
    marked = "".join(c if i in learnt.marked else "¦" for i, c in enumerate(learnt.text))
    assert [part for part in marked.split("¦") if part] == [
        thought.format(n) + "<|im_end|>" for n in (1, 2)
    ]


# ---------------------------------------------------------------- tools

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


def _call(town: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"town": town, "days": 3}},
    }


def _with_tools(calls: int = 1) -> Conversation:
    towns = ("Paris", "Rome")[:calls]
    return Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "How is the weather?"),
            Message("assistant", "", tuple(_call(town) for town in towns)),
            *(Message("tool", f'{{"{town}": "sunny & warm"}}') for town in towns),
            Message("assistant", "It is sunny."),
            Message("user", "Thanks."),
            Message("assistant", "You are welcome."),
        ),
        "data.jsonl:1",
        (TOOL,),
    )


CALLS = {
    ("qwen2.5", 1): (
        '<tool_call>\n{"name": "get_weather", "arguments": {"town": "Paris", "days": 3}}\n'
        "</tool_call><|im_end|>"
    ),
    ("qwen2.5", 2): (
        '<tool_call>\n{"name": "get_weather", "arguments": {"town": "Paris", "days": 3}}\n'
        '</tool_call>\n<tool_call>\n{"name": "get_weather", "arguments": {"town": "Rome", '
        '"days": 3}}\n</tool_call><|im_end|>'
    ),
    ("llama-3.1", 1): (
        '{"name": "get_weather", "parameters": {"town": "Paris", "days": 3}}<|eot_id|>'
    ),
}


@pytest.mark.parametrize(("name", "calls"), CALLS)
def test_calls_are_learnt_and_results_are_not(assets: Path, name: str, calls: int) -> None:
    known = _known(assets)[name]
    tokenizer, sample = known.tokenizer(), _with_tools(calls)
    (learnt,) = _learnt(tokenizer, sample)
    text = _render(tokenizer, sample.messages, tools=[TOOL])
    assert learnt.text == ("<s>" if known.bos and not text.startswith("<s>") else "") + text
    assert "get_weather" in text.split("How is the weather?")[0]
    answers = [
        CALLS[name, calls],
        *(f"{t}{known.end}" for t in ("It is sunny.", "You are welcome.")),
    ]
    expected: set[int] = set()
    for answer in answers:
        # The description of the tools may show a call as an example; the answer comes later.
        start = learnt.text.rindex(answer)
        expected |= {*range(start, start + len(answer))}
    assert learnt.marked == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_TOOLS])
def test_tools_that_a_template_has_no_place_for_are_refused_by_name(
    assets: Path, name: str
) -> None:
    known = _known(assets)[name]
    whole = _with_tools()
    messages = whole.messages if known.system else whole.messages[1:]
    refused = {
        "leaves out the tools": (tuple(m for m in messages if not m.tool_calls), (TOOL,)),
        r"leaves out|refuses": (messages, ()),
    }
    for found, (turns, tools) in refused.items():
        turns = tuple(turn for turn in turns if turn.role != "tool") if tools else turns
        sample = Conversation(turns, "data.jsonl:1", tools)
        with pytest.raises(DataError, match=rf"^data.jsonl:1: the chat template ({found})"):
            _learnt(known.tokenizer(), sample)


AS_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.tool_calls is defined %}{% if m.content is defined %}"
    "{{ raise_exception('a call has no content') }}{% endif %}"
    "{% for call in m.tool_calls %}{{ call.function.name + ' ' + call.function.arguments }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_wants_calls_in_another_form_is_given_it() -> None:
    known = Known(AS_TEXT.replace("END", "'<|im_end|>\n'"), "<|im_end|>", bos=None)
    messages = _with_tools().messages[1:5]
    (learnt,) = _learnt(known.tokenizer(), Conversation(messages, "data.jsonl:1"))
    call = 'get_weather {"town": "Paris", "days": 3}<|im_end|>'
    assert "".join(learnt.text[i] for i in sorted(learnt.marked)) == (
        call + "It is sunny.<|im_end|>"
    )


def test_a_call_without_an_end_is_given_one_in_a_row_of_its_own() -> None:
    """A template that ends answers but no calls: the model would never stop after one."""
    end = "'' if m.tool_calls is defined or m.role == 'tool' else '<|im_end|>\n'"
    known = Known(AS_TEXT.replace("END", f"({end})"), "<|im_end|>", bos=None)
    messages = _with_tools().messages[1:5]
    rows = _learnt(known.tokenizer(), Conversation(messages, "data.jsonl:1"))
    assert ["".join(row.text[i] for i in sorted(row.marked)) for row in rows] == [
        'get_weather {"town": "Paris", "days": 3}</s>', "It is sunny.<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.1"])
def test_a_prompt_has_the_tools_that_were_learnt(assets: Path, name: str) -> None:
    tokenizer = _known(assets)[name].tokenizer()
    sample = _with_tools()
    renderer = Renderer(tokenizer)
    (rendered,) = renderer.render(sample)
    for index in _answers(sample):
        prompt = renderer.prompt_text(sample.messages[:index], tools=sample.tools)
        assert rendered.text.startswith(prompt)
        assert len(prompt) in rendered.answers


# ---------------------------------------------------------------- renderings


@pytest.mark.parametrize("number", range(7))
def test_golden_renderings_are_exact(assets: Path, number: int) -> None:
    entry = json.loads((assets / "templates/golden.json").read_text())[number]
    # Some templates have no end token, but every tokenizer here must; then no text contains it.
    tokenizer = make_tokenizer(
        bos_token=entry["bos_token"] or None,
        eos_token=entry["eos_token"] or "<|never|>",
        chat_template=entry["chat_template"],
    )
    messages = [Message(turn["role"], turn["content"]) for turn in entry["messages"]]
    from qlora_kit.data.chat_text import ChatWriter

    text = ChatWriter(tokenizer).write(
        messages, "data.jsonl:1", generation=entry["add_generation_prompt"]
    )
    assert text == entry["target"]

"""Rendering: the tokenizer's own template, the default template, and the characters to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import CHATML, chat, conversation, make_tokenizer
from transformers import AutoTokenizer

from qlora_kit.data.chat_text import wants_bos
from qlora_kit.data.shapes import Message, Pair, Text
from qlora_kit.data.template import Renderer
from qlora_kit.errors import DataError

QUESTION = "Hello, how are you?"
ANSWER = "I'm doing great. How can I help you today?"
FOUR_TURNS = conversation(
    ("user", QUESTION), ("assistant", ANSWER), ("user", "And now?"), ("assistant", "Yes {{ }}")
)


def _supervised(renderer: Renderer, sample: Any) -> list[str]:
    (rendered,) = renderer.render(sample)
    texts = [rendered.text[start:end] for start, end in rendered.spans]
    if rendered.append_eos:
        texts[-1] += "+EOS"
    return texts


# ---------------------------------------------------------------- the default template


def test_a_model_without_a_template_is_given_one() -> None:
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    sample = conversation(
        ("system", "Be kind."), *((m.role, m.content) for m in FOUR_TURNS.messages)
    )
    (rendered,) = renderer.render(sample)
    assert rendered.text == (
        f"<s>Be kind.\n\n### Instruction:\n{QUESTION}\n\n### Response:\n{ANSWER}</s>\n\n"
        "### Instruction:\nAnd now?\n\n### Response:\nYes {{ }}</s>"
    )
    assert _supervised(renderer, sample) == [ANSWER + "</s>", "Yes {{ }}</s>"]
    # The template saved with the tokenizer gives the text that was trained on.
    turns = [{"role": m.role, "content": m.content} for m in sample.messages]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == rendered.text


def test_the_default_template_gives_no_bos_where_none_is_wanted() -> None:
    tokenizer = make_tokenizer(bos_token="</s>")
    assert Renderer(tokenizer).render(chat("a", "b"))[0].text == (
        "### Instruction:\na\n\n### Response:\nb</s>"
    )


def test_the_prompt_is_what_training_starts_with() -> None:
    renderer = Renderer(make_tokenizer())
    sample = chat("a", "b")
    prompt = renderer.prompt_text(sample.messages[:1])
    assert prompt == "<s>### Instruction:\na\n\n### Response:\n"
    assert renderer.render(sample)[0].text.startswith(prompt)
    assert renderer.prompt_text("as it is") == "as it is"


# ---------------------------------------------------------------- pairs and texts


def test_pairs_and_texts_are_used_as_they_are() -> None:
    renderer = Renderer(make_tokenizer(chat_template=CHATML))
    assert _supervised(renderer, Pair("ab ", "cd ", "x:1")) == ["cd +EOS"]
    assert renderer.render(Pair("ab ", "cd ", "x:1"))[0].text == "ab cd "
    assert _supervised(renderer, Text("ab ", "x:1")) == ["ab +EOS"]


def test_training_on_all_supervises_everything() -> None:
    renderer = Renderer(make_tokenizer(chat_template=CHATML), train_on="all")
    assert _supervised(renderer, Pair("ab ", "cd ", "x:1")) == ["ab cd +EOS"]
    assert _supervised(renderer, chat("a", "b")) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    ]


# ---------------------------------------------------------------- real templates

GOLDEN_SUPERVISED = {
    "_base": [ANSWER + "<|im_end|>", "Yes {{ }}<|im_end|>"],
    "gpt2": [ANSWER + "</s>", "Yes {{ }}</s>"],
    "HuggingFaceH4/zephyr-7b-gemma-v0.1": [
        ANSWER + "<|im_end|>",
        "Yes {{ }}<|im_end|>\n<eos>",
    ],
    "mistralai/Mistral-7B-Instruct-v0.1": [ANSWER + "</s>", "Yes {{ }}</s>"],
    # Closes a turn only when the next one opens, with a token that is not its EOS here.
    "Qwen/Qwen1.5-72B-Chat": [ANSWER + "<|im_end|>", "Yes {{ }}+EOS"],
    "deepseek-ai/deepseek-llm-7b-chat": [" " + ANSWER + "</s>", " Yes {{ }}</s>"],
    "internlm/internlm2-chat-7b": [ANSWER + "<|im_end|>", "Yes {{ }}<|im_end|>\n</s>"],
}


def _golden(assets: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((assets / "templates/golden.json").read_text())
    return entries


@pytest.mark.parametrize("name", GOLDEN_SUPERVISED)
def test_golden_templates(assets: Path, name: str) -> None:
    entry = next(entry for entry in _golden(assets) if entry["name"] == name)
    eos = {"": "</s>", "<|endoftext|>": "</s>"}.get(entry["eos_token"], entry["eos_token"])
    if not eos.isascii():
        eos = "</s>"
    bos = entry["bos_token"] if entry["bos_token"].isascii() else "<s>"
    tokenizer = make_tokenizer(
        bos_token=bos or None, eos_token=eos, chat_template=entry["chat_template"]
    )
    target = entry["target"]
    for ours, theirs in ((eos, entry["eos_token"]), (bos, entry["bos_token"])):
        target = target.replace(theirs, ours) if theirs else target
    given = tokenizer.apply_chat_template(entry["messages"], tokenize=False)
    assert given == target
    renderer = Renderer(tokenizer)
    assert _supervised(renderer, FOUR_TURNS) == GOLDEN_SUPERVISED[name]
    turns = [{"role": m.role, "content": m.content} for m in FOUR_TURNS.messages]
    assert renderer.render(FOUR_TURNS)[0].text == tokenizer.apply_chat_template(
        turns, tokenize=False
    )


def test_a_turn_closed_by_the_next_one_is_supervised_up_to_its_eos(assets: Path) -> None:
    entry = next(entry for entry in _golden(assets) if entry["name"].startswith("Qwen/"))
    tokenizer = make_tokenizer(eos_token="<|im_end|>", chat_template=entry["chat_template"])
    assert _supervised(Renderer(tokenizer), FOUR_TURNS) == [ANSWER + "<|im_end|>", "Yes {{ }}+EOS"]


def _from_file(assets: Path, name: str) -> Any:
    template = (assets / "templates" / name).read_text()
    return make_tokenizer(
        chat_template=template, additional_special_tokens=["<|eot_id|>", "<｜end▁of▁sentence｜>"]
    )


def test_qwen_and_llama_templates(assets: Path) -> None:
    qwen = Renderer(_from_file(assets, "Qwen-Qwen2.5-7B-Instruct.jinja"))
    assert _supervised(qwen, FOUR_TURNS) == [ANSWER + "<|im_end|>", "Yes {{ }}<|im_end|>"]
    llama = Renderer(_from_file(assets, "meta-llama-Llama-3.1-8B-Instruct.jinja"))
    assert _supervised(llama, FOUR_TURNS) == [ANSWER + "<|eot_id|>", "Yes {{ }}<|eot_id|>"]


def test_a_template_that_opens_answers_otherwise_than_its_prompt_is_refused() -> None:
    template = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "SOLUTION: ' }}{% endif")
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(DataError, match=r"^data.jsonl:1: .* turn 2 .*; use --train-on all") as e:
        Renderer(tokenizer).render(chat("SECRET", "b"))
    assert "SECRET" not in str(e.value)
    (everything,) = Renderer(tokenizer, "all").render(chat("a", "b"))
    assert everything.spans == ((0, len(everything.text)),)


# ---------------------------------------------------------------- templates that do not fit

_ROLES = "{% for m in messages %}{{ m['role'] + ': ' + CONTENT + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("(m['content'] if loop.last else '...')", "leaves out turn 1"),
        ("(m['content'] if m['role'] != 'system' else '')", r"leaves out turn 1 \(the system's\)"),
    ],
)
@pytest.mark.parametrize("train_on", ["completion", "last-turn", "all"])
def test_a_template_that_leaves_turns_out_is_refused(
    content: str, found: str, train_on: Any
) -> None:
    template = _ROLES.replace("CONTENT", content)
    system = ("system", "Be brief.")
    sample = conversation(system, *((m.role, m.content) for m in FOUR_TURNS.messages))
    with pytest.raises(DataError, match=f"^data.jsonl:1: the chat template {found}"):
        Renderer(make_tokenizer(chat_template=template), train_on).render(sample)


def test_an_answer_that_the_template_changes_is_refused() -> None:
    template = _ROLES.replace("CONTENT", "m['content'].split('#')[0]") + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    sample = chat("a", "kept # SECRET")
    tokenizer = make_tokenizer(chat_template=template)
    for train_on, found in (
        ("completion", "changes"),
        ("last-turn", "changes"),
        ("all", "shorten"),
    ):
        with pytest.raises(
            DataError, match=f"^data.jsonl:1: .*{found}s? the answer of turn 2"
        ) as e:
            Renderer(tokenizer, train_on).render(sample)  # type: ignore[arg-type]
        assert "SECRET" not in str(e.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Only two roles!') }}", r"\(Only two roles!\)"),
        ("{{ messages[7]['content'] + 'x' }}", r"\(.*has no element 7\)"),
        ("{% for %}", r"\(.*\)"),
        ("{{ messages + 1 }}", r"\(can only concatenate .*\)"),
    ],
)
def test_a_template_that_fails_tells_place_and_reason(template: str, reason: str) -> None:
    renderer = Renderer(make_tokenizer(chat_template=template))
    with pytest.raises(
        DataError, match="^data.jsonl:1: the chat template refuses .*" + reason
    ) as e:
        renderer.render(chat("a", "b"))
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match=r"^the prompt: the chat template refuses"):
        renderer.prompt_text([Message("user", "a")])


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ({}, True),
        ({"bos_token": None}, False),
        ({"bos_token": "</s>"}, False),
        ({"bos_token": "</s>", "chat_template": CHATML}, False),
        ({"bos_token": "</s>", "chat_template": "{{ bos_token }}" + CHATML}, True),
        ({"bos_token": "</s>", "chat_template": "{{ raise_exception('no') }}"}, False),
    ],
)
def test_who_wants_a_bos(names: dict[str, Any], wanted: bool) -> None:
    assert wants_bos(make_tokenizer(**names)) is wanted


def test_real_tokenizers_want_a_bos(assets: Path, stories: Path) -> None:
    for folder in (stories, assets / "tokenizers/deepseek-llm-7b"):
        assert wants_bos(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def test_an_answer_ends_where_its_template_ends_it() -> None:
    from qlora_kit.data.template import end_token_ids

    chatml = make_tokenizer(chat_template=CHATML)
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert end_token_ids(chatml) == sorted({chatml.eos_token_id, end})
    assert end_token_ids(make_tokenizer(), [7, 8]) == sorted({make_tokenizer().eos_token_id, 7, 8})

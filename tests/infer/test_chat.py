"""A conversation: the cache changes no answer, and turns, adapters and limits are as they are told.

What it is compared with is `generate`, which computes every prompt from its first token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import fill_lora, load_folder

import qlora_kit as qk
from qlora_kit.data.asking import TextAsker
from qlora_kit.data.chat_template import choose_template
from qlora_kit.data.shapes import Message
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.infer.chat import Answer, Chat, Speakers, Voice
from qlora_kit.infer.generate import Sampling, generate
from qlora_kit.infer.kept_cache import KeptCache
from qlora_kit.infer.streamed_text import StreamedText, WithoutMargins
from qlora_kit.recipe.chatting import _OneAdapter

SAID = ("Spoken: two dollars", "and nine?", "Spoken: the second of May", "thank you")
SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def opened() -> Any:
    return qk.open_base(qk.BaseModelOptions(model="demo", bits=4))


@pytest.fixture(scope="module")
def voice(opened: Any) -> Voice:
    choose_template(opened.tokenizer, "alpaca")
    return Voice(opened.tokenizer, TextAsker(opened.tokenizer), is_raw=False)


@pytest.fixture
def chat_of(opened: Any, voice: Voice) -> Callable[..., Chat]:
    def chat(sampling: Sampling = SHORT, context: int | None = None) -> Chat:
        return Chat(opened.base, Speakers({None: voice}, lambda name: None), sampling, context)

    return chat


def say(chat: Chat, text: str) -> tuple[Answer, str]:
    """Say something; return the answer and what was told of it, which must be the same text."""
    pieces: list[str] = []
    answer = chat.say(text, pieces.append)
    assert "".join(pieces) == answer.text
    return answer, answer.text


def uncached(opened: Any, voice: Voice, turns: tuple[Message, ...], sampling: Sampling) -> str:
    ids = voice.asks.ids(turns, "a test")
    (text,) = generate(opened.base, voice.tokenizer, [ids], sampling)
    return text.strip()


# ---------------------------------------------------------------- the cache


def test_a_conversation_has_the_answers_that_it_has_without_a_cache(
    opened: Any, voice: Voice, chat_of: Callable[..., Chat]
) -> None:
    chat, before = chat_of(), 0
    for text in SAID:
        expected = uncached(opened, voice, (*chat.messages, Message("user", text)), SHORT)
        answer, found = say(chat, text)
        assert found == expected
        # All but the last tokens of what was seen before, which another tokenisation may join.
        assert before - 3 <= answer.kept_tokens < answer.prompt_tokens
        before = answer.prompt_tokens
    assert [m.role for m in chat.messages] == ["user", "assistant"] * len(SAID)


@pytest.mark.parametrize("name", ["tinyllama", "gemma-2-9b", "gpt2", "mixtral", "qwen3-8b"])
def test_texts_that_grow_part_and_shrink_are_continued_as_without_a_cache(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    base = load_folder(folder_of(name))
    ids = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    kept = KeptCache(base)
    # In this order: new, longer, another end, shorter, the same again, another beginning.
    for text in (ids[:20], ids[:30], ids[:25] + ids[3:9], ids[:10], ids[:10], ids[5:30]):
        found = continued(kept, text)
        assert found.ids == continued(KeptCache(base), text).ids
        assert found.kept < len(text)
    # What was written is kept too, all but its last token, which was never seen.
    seen = [*text, *found.ids]
    assert continued(kept, [*seen, *ids[:3]]).kept >= len(seen) - 1


def continued(cache: KeptCache, ids: list[int]) -> Any:
    return cache.continued(ids, [2], SHORT, 0, lambda new: None, lambda: False)


def test_the_same_seed_gives_the_same_conversation(chat_of: Callable[..., Chat]) -> None:
    hot = Sampling(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=7)
    conversations = []
    for _ in range(2):
        chat = chat_of(hot)
        conversations.append([say(chat, text)[1] for text in SAID])
    assert conversations[0] == conversations[1]
    greedy = chat_of()
    assert conversations[0] != [say(greedy, text)[1] for text in SAID]


# ---------------------------------------------------------------- turns


def test_what_is_taken_back_is_not_seen(
    opened: Any, voice: Voice, chat_of: Callable[..., Chat]
) -> None:
    chat = chat_of()
    _, first = say(chat, SAID[0])
    say(chat, SAID[1])
    assert chat.undo()
    assert chat.messages[1].content.strip() == first
    turns = (*chat.messages, Message("user", SAID[2]))
    assert say(chat, SAID[2])[1] == uncached(opened, voice, turns, SHORT)
    chat.clear()
    assert chat.messages == ()
    assert not chat.undo()


def test_the_system_is_told_first_and_stays(
    opened: Any, voice: Voice, chat_of: Callable[..., Chat]
) -> None:
    chat = chat_of()
    say(chat, SAID[0])
    chat.set_system("Write numbers.")
    turns = (*chat.messages, Message("user", SAID[1]))
    assert turns[0] == Message("system", "Write numbers.")
    assert say(chat, SAID[1])[1] == uncached(opened, voice, turns, SHORT)
    chat.clear()
    assert chat.messages == turns[:1]


def test_a_stopped_answer_stays_as_far_as_it_came(
    opened: Any, voice: Voice, chat_of: Callable[..., Chat]
) -> None:
    chat, pieces = chat_of(), []
    answer = chat.say(SAID[0], pieces.append, lambda: len(pieces) >= 2)
    assert answer.ended == "stopped"
    assert answer.new_tokens < SHORT.max_new_tokens
    assert "".join(pieces) == answer.text == chat.messages[1].content.strip()
    turns = (*chat.messages, Message("user", SAID[1]))
    assert say(chat, SAID[1])[1] == uncached(opened, voice, turns, SHORT)


def test_why_an_answer_ended(chat_of: Callable[..., Chat]) -> None:
    assert say(chat_of(Sampling(max_new_tokens=2)), SAID[0])[0].ended == "length"
    chat = chat_of(Sampling(max_new_tokens=60))
    assert say(chat, "Spoken: two dollars\nWritten:")[0].ended in ("end token", "length")


# ---------------------------------------------------------------- the context


def test_the_oldest_turns_are_left_out_where_the_context_is_full(
    opened: Any, voice: Voice, chat_of: Callable[..., Chat]
) -> None:
    chat = chat_of(context=100)
    chat.set_system("Be brief.")
    cut = 0
    for number in range(6):
        text = f"{SAID[0]} number {number}"
        seen = (*chat.messages[:1], *chat.messages[1 + cut :], Message("user", text))
        answer, found = say(chat, text)
        assert answer.prompt_tokens + answer.new_tokens <= 100
        if answer.cut:
            cut += answer.cut
            seen = (*chat.messages[:1], *chat.messages[1 + cut : -1])
        assert answer.prompt_tokens == len(voice.asks.ids(seen, "a test"))
        assert found == uncached(opened, voice, seen, SHORT)
    assert cut >= 4
    assert len(chat.messages) == 13, "the whole conversation is still there"


def test_a_text_that_is_continued_by_itself_sees_no_turns(opened: Any, voice: Voice) -> None:
    raw = Voice(voice.tokenizer, voice.asks, is_raw=True)
    speakers = Speakers({"turns": voice, "texts": raw}, lambda name: None)
    chat = Chat(opened.base, speakers, SHORT, 60)
    assert sum(say(chat, f"{SAID[0]} {number}")[0].cut for number in range(3)) >= 2
    chat.use("texts")
    answer, found = say(chat, SAID[0])
    ids = voice.asks.ids(SAID[0], "a test")
    assert (answer.prompt_tokens, answer.cut) == (len(ids), 0)
    assert found == next(generate(opened.base, voice.tokenizer, [ids], SHORT)).strip()
    with pytest.raises(DataError, match="/system: no chat template is used"):
        chat.set_system("Be brief.")


def test_an_answer_is_cut_where_the_context_ends(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of(Sampling(max_new_tokens=400, temperature=3.0), context=60)
    answer = chat.say(SAID[0], lambda piece: None)
    assert answer.ended == "context"
    assert answer.prompt_tokens + answer.new_tokens == 60


def test_a_text_that_is_too_long_leaves_the_conversation_as_it_was(
    chat_of: Callable[..., Chat],
) -> None:
    chat = chat_of(context=60)
    say(chat, SAID[0])
    before = chat.messages
    with pytest.raises(DataError, match="the model sees 60; expected room"):
        chat.say("one two three " * 40, lambda piece: None)
    assert chat.messages == before
    say(chat, SAID[1])


# ---------------------------------------------------------------- reasoning

# As of released reasoning models: the prompt opens the reasoning, and earlier turns are without it.
_REASONS = """{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
A: {{ m['content'].split('</think>')[-1].lstrip() }}</s>
{%- else -%}
{{ m['role'] }}: {{ m['content'] }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}A: <think>
{% endif -%}"""


def test_reasoning_of_earlier_turns_follows_the_template(opened: Any, tmp_path: Path) -> None:
    file = tmp_path / "reasons.jinja"
    file.write_text(_REASONS)
    tokenizer = qk.open_base(qk.BaseModelOptions(model="demo", bits=4)).tokenizer
    choose_template(tokenizer, str(file))
    voice = Voice(tokenizer, TextAsker(tokenizer), is_raw=False)
    chat = Chat(opened.base, Speakers({None: voice}, lambda name: None), SHORT, None)
    say(chat, SAID[0])
    content = chat.messages[1].content
    assert content.startswith("<think>\n"), "the tag that the prompt has is a part of the answer"
    turns = (*chat.messages, Message("user", SAID[1]))
    assert say(chat, SAID[1])[1] == uncached(opened, voice, turns, SHORT)
    thought = (chat.messages[0], Message("assistant", f"{content}</think>\n\nTwo."), turns[-1])
    asked = voice.tokenizer.decode(voice.asks.ids(thought, "a test"))
    assert content not in asked
    assert "A: Two." in asked


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def folders(opened: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    saved = {}
    for seed, name in enumerate(("one", "two")):
        adapter = qk.attach(opened.base, qk.LoraSpec(rank=4, targets=("all-linear",)), seed=seed)
        fill_lora(adapter, seed=seed, std=0.2)
        saved[name] = tmp_path_factory.mktemp(name)
        qk.save_adapter(adapter, saved[name], qk.BaseRecord.of(opened.base))
        qk.detach(adapter)
    return saved


def test_each_adapter_answers_as_it_does_alone(
    opened: Any, voice: Voice, folders: dict[str, Path]
) -> None:
    base = opened.base
    asked = (Message("user", SAID[0]),)
    alone: dict[str | None, str] = {None: uncached(opened, voice, asked, SHORT)}
    for name, folder in folders.items():
        adapter = qk.load_adapter(base, folder)
        alone[name] = uncached(opened, voice, asked, SHORT)
        qk.detach(adapter)
    assert len({*alone.values()}) == 3, "they differ, or the test says nothing"
    several = qk.load_adapters(base, folders)
    voices = dict.fromkeys(folders, voice)
    chat = Chat(base, Speakers(voices, several.set_adapter), SHORT, None)
    assert chat.speaker == "one"
    for name in ("two", None, "one", None, "two"):
        chat.use(name)
        assert say(chat, SAID[0])[1] == alone[name]
        chat.undo()
    with pytest.raises(ConfigError, match="no adapter is named 'three'; expected one, two, or off"):
        chat.use("three")
    assert chat.speaker == "two"
    several.detach()


def test_one_adapter_is_taken_off_and_put_back(
    opened: Any, voice: Voice, folders: dict[str, Path]
) -> None:
    asked = (Message("user", SAID[0]),)
    bare = uncached(opened, voice, asked, SHORT)
    adapter = qk.load_adapter(opened.base, folders["one"])
    chat = Chat(opened.base, Speakers({"one": voice}, _OneAdapter(adapter)), SHORT, None)
    own = say(chat, SAID[0])[1]
    chat.clear()
    for name, expected in ((None, bare), ("one", own), (None, bare)):
        chat.use(name)
        assert say(chat, SAID[0])[1] == expected
        chat.clear()
    chat.use("one")
    qk.detach(adapter)
    assert uncached(opened, voice, asked, SHORT) == bare


def test_an_adapter_that_replaces_parts_of_its_base_stays_on(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = load_folder(save_tiny(), 4)
    spec = qk.LoraSpec(rank=2, targets=("attention",), modules_to_save=("lm_head",))
    adapter = qk.attach(base, spec)
    qk.save_adapter(adapter, tmp_path, qk.BaseRecord.of(base))
    qk.detach(adapter)
    choose = _OneAdapter(qk.load_adapter(base, tmp_path))
    with pytest.raises(ConfigError, match="/adapter off: this adapter replaces parts of its base"):
        choose(None)
    choose("it")


# ---------------------------------------------------------------- text in pieces

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=40)


@given(TEXTS, st.lists(st.integers(1, 4)))
@settings(max_examples=60, deadline=None)
def test_pieces_are_whole_characters_and_together_the_text(text: str, sizes: list[int]) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    streamed, pieces = StreamedText(tokenizer), []
    while ids:
        size = sizes.pop() if sizes else 1
        pieces.append(streamed.add(ids[:size]))
        ids = ids[size:]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, streamed.end()]) == text


@given(st.lists(st.text(" \n\tab", max_size=4)))
def test_white_space_at_the_ends_is_left_out(parts: list[str]) -> None:
    shown = WithoutMargins()
    assert "".join(shown.add(part) for part in parts) == "".join(parts).strip()

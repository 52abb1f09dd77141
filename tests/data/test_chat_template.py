"""Choosing a chat template: built-in names and files are taken and stored, others refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import CHATML, chat, make_tokenizer

from qlora_kit import recipe
from qlora_kit.config import (
    EvaluateConfig,
    GenerateConfig,
    Layer,
    TokenOptions,
    TrainConfig,
    resolve,
)
from qlora_kit.data.chat_template import built_in_templates, choose_template
from qlora_kit.data.template import Renderer
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.events import Event, Notice

PLAIN = (
    "{% for m in messages %}{{ m['role'] + '> ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
)


def test_the_help_names_every_built_in_template() -> None:
    text = str(TokenOptions.model_fields["chat_template"].description)
    for name in built_in_templates():
        assert f"{name}," in text or f"{name};" in text


@pytest.mark.parametrize("name", built_in_templates())
def test_a_built_in_template_reads_the_same_however_white_space_is_treated(name: str) -> None:
    """transformers trims blocks; other readers of a tokenizer's template do not."""
    import jinja2

    turns = [{"role": role, "content": f" {role}\n"} for role in ("system", "user", "assistant")]
    given = {"messages": turns, "eos_token": "</s>", "add_generation_prompt": True}
    read = [
        jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim)
        .from_string(built_in_templates()[name])
        .render(**given)
        for trim in (False, True)
    ]
    assert read[0] == read[1]
    for turn in turns:
        assert turn["content"] in read[0]


@pytest.mark.parametrize("name", ["alpaca", "chatml", "mistral", "vicuna", "zephyr"])
def test_a_name_wins_over_the_tokenizers_own(name: str) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    choose_template(tokenizer, name)
    assert tokenizer.chat_template == "{{- bos_token -}}" + built_in_templates()[name]
    without = make_tokenizer(chat_template=PLAIN, bos_token=None)
    choose_template(without, name)
    assert without.chat_template == built_in_templates()[name]
    choose_template(tokenizer)
    assert tokenizer.chat_template.endswith(built_in_templates()[name])


def test_a_file_wins_over_the_tokenizers_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(PLAIN)
    tokenizer = make_tokenizer(chat_template=CHATML)
    (rendered,) = Renderer(tokenizer, chat_template=str(file)).render(chat("é", "b"))
    assert rendered.text == "user> é</s>assistant> b</s>"
    assert tokenizer.chat_template == PLAIN


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ("gemma", r"the tokenizer has no token <start_of_turn>, <end_of_turn>; .* pass alpaca,"),
        ("llama-3", r"the tokenizer has no token .*<\|eot_id\|>"),
        ("chatlm", r"no such file.*; expected a Jinja file or one of alpaca, .*mean chatml\?"),
        ("FOLDER", r"is a directory; expected a Jinja file"),
        ("EMPTY", r"empty; expected a Jinja template"),
        ("BINARY", r"not UTF-8"),
        ("LARGE", r"1,048,577 bytes; expected"),
        ("UNCLOSED", r"line 2: .*; expected a Jinja template; correct it"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path: Path, asked: str, fault: str) -> None:
    contents = {
        "EMPTY": b" \n", "BINARY": b"\xff\xfe\x00", "LARGE": b"x" * (1 + (1 << 20)),
        "UNCLOSED": b"{% for m in messages %}\n{% nonsense %}{% endfor %}",
    }  # fmt: skip
    if asked in contents:
        (tmp_path / asked).write_bytes(contents[asked])
    name = {"FOLDER": str(tmp_path)}.get(asked, asked)
    with pytest.raises(ConfigError, match=r"^--chat-template .*" + fault) as caught:
        choose_template(make_tokenizer(), str(tmp_path / asked) if asked in contents else name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_does_not_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.data import chat_template

    monkeypatch.setattr(chat_template, "PROBE_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for number, text in enumerate((loop, "{% if tools %}" + loop + "{% endif %}")):
        (tmp_path / str(number)).write_text(text)
        with pytest.raises(ModelError, match="does not finish"):
            choose_template(make_tokenizer(), str(tmp_path / str(number)))


def test_turns_that_a_built_in_template_has_no_place_for_are_refused_by_role() -> None:
    from data_fixtures import conversation

    from qlora_kit.errors import DataError

    for name in ("alpaca", "chatml", "mistral", "vicuna", "zephyr"):
        sample = conversation(("user", "a"), ("tool", "b"), ("assistant", "c"))
        with pytest.raises(DataError, match=r"no place for .* role tool"):
            Renderer(make_tokenizer(), chat_template=name).render(sample)


def test_what_is_learnt_has_the_names_of_the_peers() -> None:
    def train_on(**given: Any) -> str:
        return resolve(TrainConfig, [Layer("", given)]).train_on

    assert train_on(train_on="all-turns") == train_on() == "completion"
    assert train_on(train_on="last-turn") == "last-turn"
    assert resolve(TrainConfig, [Layer("", {"template": "chatml"})]).chat_template == "chatml"


# ---------------------------------------------------------------- from training to generation


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"question": f"{n} dollars", "answer": f"${n}.00"} for n in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


# A run that needs no rehearsal, and whose output no test looks at.
QUICK: dict[str, Any] = {"max_steps": 1, "rank": 2, "rehearse": False, "samples": 0}


@pytest.mark.usefixtures("simulated_once")
def test_an_adapter_keeps_the_template_it_was_trained_with(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}" + PLAIN)
    run = tmp_path / "run"
    train = TrainConfig(data=str(chats), output=run, chat_template=str(file), **QUICK)
    said: list[Event] = []
    recipe.train(train, said.append)
    notices = [event.text for event in said if isinstance(event, Notice)]
    assert any("8 qa rows" in text and "tokens/s" in text for text in notices), notices
    # The file is no longer needed.
    file.unlink()
    assert (run / "chat_template.jinja").read_text() == "{{ bos_token }}" + PLAIN

    heard: list[Event] = []
    recipe.evaluate(EvaluateConfig(adapter=run, data=str(chats)), heard.append)
    prompts: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        from qlora_kit.data import asking

        real = asking.prompt_ids
        patch.setattr(
            asking, "prompt_ids", lambda tok, text: prompts.append(text) or real(tok, text)
        )
        config = GenerateConfig(adapter=run, prompt="7 dollars", max_new_tokens=2)
        recipe.generate(config, heard.append)
        assert "user> 7 dollars" in prompts[-1]
        assert prompts[-1].endswith("assistant> ")
        assert not any("another chat template" in e.text for e in heard if isinstance(e, Notice))
        recipe.generate(config.model_copy(update={"chat_template": "vicuna"}), heard.append)
        assert prompts[-1].endswith("USER: 7 dollars ASSISTANT:")
    assert any("another chat template" in e.text for e in heard if isinstance(e, Notice))


@pytest.mark.usefixtures("simulated_once")
def test_resuming_with_another_template_is_refused(chats: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = {"data": str(chats), "output": run, **QUICK}
    recipe.train(TrainConfig(**base))
    with pytest.raises(ConfigError, match="chat_template was None and is now 'zephyr'") as caught:
        recipe.train(TrainConfig(**base, chat_template="zephyr", resume="latest"))
    assert "--allow-change tokenizer" in str(caught.value)
    assert len(caught.value.faults) == 1

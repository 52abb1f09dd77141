"""Tokenizers give back the text that they encoded, or are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qlora_kit as qk
from qlora_kit.errors import ModelError
from qlora_kit.events import Notice
from qlora_kit.model.tokenizer import (
    check_round_trip,
    load_tokenizer,
    lossy_characters,
    template_hash,
)

TEXTS = (
    "  leading and  double spaces ",
    "def f(x):\n\treturn x\n\n",
    "x = 12345.678 # ≤ 3 €",
    "你好，世界！",
    "Zürich? No: Zurich.",
)


def byte_tokenizer(*, decodes: bool = True, **tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; without its decoder it loses all spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*tokens.values(), *alphabet]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel() if decodes else decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def unchanged(tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.fixture(scope="module")
def deepseek(assets: Path) -> Any:
    return load_tokenizer(assets / "tokenizers" / "deepseek-llm-7b")


def test_deepseek_keeps_spaces_and_lines(deepseek: Any) -> None:
    changed = [text for text in TEXTS if not unchanged(deepseek, text)]
    assert changed == ["Zürich? No: Zurich."]  # see the next test


def test_letters_that_deepseek_loses_are_named(deepseek: Any) -> None:
    lost = lossy_characters(deepseek)
    assert lost == "ÀÁõö÷øùúûüýþÿ"
    assert len(lost) == 13
    assert not any(unchanged(deepseek, letter) for letter in lost)
    assert all(unchanged(deepseek, letter) for letter in "ÄÖÜßàáâãäåæçèéêëìíîïñòóô")


def test_deepseek_has_its_special_tokens(deepseek: Any) -> None:
    assert (deepseek.bos_token_id, deepseek.eos_token_id) == (100000, 100001)
    assert deepseek("Hello")["input_ids"][0] == 100000
    assert deepseek.pad_token_id is not None
    assert deepseek.padding_side == "right"


def test_the_tokenizer_of_stories_is_padded_by_its_unknown_token(stories: Path) -> None:
    tokenizer = load_tokenizer(stories)
    assert tokenizer.pad_token == tokenizer.unk_token == "<unk>"
    text = "Once upon a time, there was a little girl."
    assert unchanged(tokenizer, text)
    assert lossy_characters(tokenizer) == ""


def test_padding_is_the_own_token_else_unknown_else_end(tmp_path: Path) -> None:
    found = []
    for number, tokens in enumerate(
        (
            {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
            {"eos_token": "</s>", "unk_token": "<unk>"},
            {"eos_token": "</s>"},
        )
    ):
        byte_tokenizer(**tokens).save_pretrained(tmp_path / str(number))
        found.append(load_tokenizer(tmp_path / str(number)).pad_token)
    assert found == ["<pad>", "<unk>", "</s>"]


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    check_round_trip(byte_tokenizer(eos_token="</s>"), "good")
    byte_tokenizer(decodes=False, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"TheĠquick.*expected the same text"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    byte_tokenizer(unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(stories: Path, tmp_path: Path) -> None:
    shutil.copy(stories / "config.json", tmp_path)
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    byte_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_template_hash_is_that_of_the_text(deepseek: Any, stories: Path) -> None:
    expected = hashlib.sha256(deepseek.chat_template.encode()).hexdigest()
    assert template_hash(deepseek) == expected
    assert template_hash(load_tokenizer(stories)) is None


# ---------------------------------------------------------------- tokens that the model has not


def _demo_with(folder: Path, **numbers: Any) -> Path:
    """Copy the demo's model with other numbers in its config.json."""
    made = folder / "model"
    shutil.copytree(str(qk.find_model("demo").folder), made)
    content = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**content, **numbers}))
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"pad_token_id": 99_999}, "pad_token_id is 99999"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"bos_token_id": 99_999}, "bos_token_id is 99999"),
        ({"eos_token_id": 99_999}, "eos_token_id is 99999"),
        ({"eos_token_id": [2, 99_999]}, "eos_token_id is 99999"),
    ],
)
def test_special_tokens_beyond_the_vocabulary_are_left_out_and_told(
    tmp_path: Path, numbers: dict[str, Any], told: str
) -> None:
    folder, said = _demo_with(tmp_path, **numbers), list[Any]()
    opened = qk.open_base(qk.BaseModelOptions(model=str(folder)), said.append)
    tokens = json.loads((folder / "config.json").read_text())["vocab_size"]
    notices = [event.text for event in said if isinstance(event, Notice)]
    assert f"{folder}/config.json: {told}, and the model has {tokens} tokens: it is left out" in (
        notices
    )
    assert opened.base.digest == qk.open_base().base.digest, "its weights are the same"
    ((name, given),) = numbers.items()
    kept = getattr(opened.base.model.config, name)
    assert kept == ([2] if isinstance(given, list) else None)


def test_a_padding_token_that_the_model_has_not_is_replaced(tmp_path: Path) -> None:
    folder, said = _demo_with(tmp_path), list[Any]()
    tokenizer = load_tokenizer(folder)
    tokens = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{n}>" for n in range(tokens)]})
    tokenizer.pad_token = f"<{tokens - 1}>"
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id >= tokens
    opened = qk.open_base(qk.BaseModelOptions(model=str(folder)), said.append)
    assert opened.tokenizer.pad_token_id == opened.tokenizer.eos_token_id
    assert any("rows are padded with the end token instead" in str(event) for event in said)

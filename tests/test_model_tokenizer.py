"""Tokenizers give back the text they were given, or are refused."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_kit.errors import ModelError
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

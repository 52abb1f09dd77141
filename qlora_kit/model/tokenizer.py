"""The tokenizer of a model, checked before it is trusted.

Takes a folder; returns transformers' tokenizer, with a padding token set. A tokenizer that does
not give back its input (spaces lost, bytes replaced) is refused: a model trained with it would be
silently damaged.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ModelError
from qlora_kit.model.config_file import check_tokenizer_files
from qlora_kit.model.faults import model_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that lost characters in released tokenizers: leading and double spaces, newlines and tabs,
# digits, accents, CJK, an emoji made of several code points.
_ROUND_TRIP_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x  + 1\t# two spaces, a tab",
    "1234567890 3.14 -7",
    "café naïve 你好，世界 こんにちは",
    "👩‍🚀 flies",
)  # fmt: skip

# Ids are kept in 32 bits.
_MOST_TOKENS = 1 << 31


def load_tokenizer(
    folder: Path, *, writes: bool = True, is_exact: bool = True
) -> PreTrainedTokenizerBase:
    """Load and check the tokenizer of a model folder.

    The padding token is the tokenizer's own, or else its unknown token, or else its end token.
    Padding is masked by position and never by value, so an end token stays supervised.

    Args:
        folder: of the model.
        writes: whether the model writes text. The tokenizer of a model that only reads needs no
            end, and may lose what it does not tell apart, such as upper case.
        is_exact: whether texts have to come back as they were.

    Raises:
        ModelError: there is no tokenizer, it has no token to pad with, or, where the model writes,
            it has no end-of-sequence token or, where it is to be exact, fails `check_round_trip`.
    """
    # It imports torch, which whoever is handed a tokenizer does without, as `data.stream_worker`.
    from transformers import AutoTokenizer

    check_tokenizer_files(folder)
    with model_errors(f"{folder}: no usable tokenizer", "the files of one; restore them"):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if writes and tokenizer.eos_token_id is None:
            raise ModelError(f"{folder}: the tokenizer has no end-of-sequence token; set eos_token")
        if max(tokenizer.get_vocab().values(), default=0) >= _MOST_TOKENS:
            raise ModelError(
                f"{folder}: the tokenizer has tokens over {_MOST_TOKENS:,}; expected numbers "
                "counted from 0; restore tokenizer.json"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ModelError(f"{folder}: the tokenizer has no token to pad with; set pad_token")
        tokenizer.padding_side = "right"
        if writes and is_exact:
            check_round_trip(tokenizer, str(folder))
    return tokenizer


def check_round_trip(tokenizer: Any, name: str) -> None:
    """Encode and decode sample texts, and compare them with the originals.

    A vocabulary without bytes turns characters that it lacks into the unknown token. Only texts
    without an unknown token are compared.

    Raises:
        ModelError: a text comes back changed.
    """
    for text in _ROUND_TRIP_TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            continue
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.lstrip(" ") != text.lstrip(" "):
            raise ModelError(
                f"{name}: the tokenizer turns {text!r} into {back!r}; expected the same text; "
                "update transformers (5.22 or later) or restore tokenizer.json"
            )


def lossy_characters(tokenizer: Any) -> str:
    """Return the Latin letters that do not survive encoding and decoding.

    DeepSeek-LLM's tokenizer lists "ü", "ö", "ø" and ten others as added tokens, but decodes them
    as single bytes. The model was trained in this way, so lost letters are worth a notice and no
    refusal.
    """
    lost = []
    for letter in map(chr, range(0xC0, 0x100)):
        ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id not in ids and tokenizer.decode(ids).strip() != letter:
            lost.append(letter)
    return "".join(lost)


def template_hash(tokenizer: Any) -> str | None:
    """Return the SHA-256 of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    if template is None:
        return None
    return hashlib.sha256(str(template).encode()).hexdigest()

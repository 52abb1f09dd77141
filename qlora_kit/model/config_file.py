"""The JSON files of a model, checked before transformers builds anything from them.

A `config.json` comes from a stranger: its numbers decide how many layers are built and how much
memory is allocated, and some of its keys name code. Takes a file; returns its content. Never
imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError, first_line, raised_as
from qlora_kit.storage import check_no_pointer, strict_json

_MOST_FILE_BYTES = 1 << 26

# Files of a vocabulary, read where there is no tokenizer.json.
_VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w .+-]*")

# The largest released models have 126 layers, 53,248 wide, and 1,000,000,000 parameters in an
# embedding; positions go to ten million.
_BOUNDS = (
    (r"(num|n)_((en|de)coder_|hidden_)*layers?|(en|de)coder_layers", 0, 1024),
    (r"(num|n)_(.*_)?(experts|heads?)", 0, 1 << 16),
    (r"(.*_)?(hidden|intermediate|ffn|inner|embedding|model)_(size|dim)|(.*_)?(head_dim|lora_rank)"
     "|n_embd|n_inner|d_model|d_ff|ffn_dim", 1, 1 << 20),
    (r"(.*_)?vocab_size", 0, 1 << 24),
    (r"hidden_sizes", 1, 1 << 16),
    (r"depths", 1, 1024),
    (r"(original_)?max_position_embeddings|n_positions|n_ctx", 1, 1 << 28),
)  # fmt: skip


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`, and check the numbers that would be costly or dangerous later.

    Infinity is accepted, because released models have it; transformers reads it the same way.

    Raises:
        ModelError: the file is no JSON object, has a key twice, or has a number that no model has.
    """
    content = read_json_object(path)
    for key, value in _keys_and_values(content):
        _check_number(path, key, value)
    for key in ("quantization_config", "text_config"):
        if content.get(key) is not None and not isinstance(content[key], dict):
            raise ModelError(f"{path}: {key} is no object; expected one, or none; restore it")
    check_end_tokens(path, content)
    return content


def check_end_tokens(path: Path, content: dict[str, Any]) -> None:
    """Check the ids of the tokens that end an answer.

    Raises:
        ModelError: they are not whole numbers.
    """
    named = content.get("eos_token_id")
    for token in named if isinstance(named, list) else [named]:
        if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
            raise ModelError(
                f"{path}: eos_token_id is {str(token)[:40]}; expected a whole number; restore it"
            )


def ids_beyond(content: Mapping[str, Any], tokens: int) -> dict[str, list[int]]:
    """Return the special tokens that a configuration names and its vocabulary does not have.

    Args:
        content: the content of a `config.json`, or of its `text_config`.
        tokens: number of tokens in the vocabulary; ids are counted from 0.

    Returns:
        The ids beyond the vocabulary, by field.
    """
    found = {}
    for name in SPECIAL_IDS:
        beyond = [number for number in as_list(content.get(name)) if not 0 <= number < tokens]
        if beyond:
            found[name] = beyond
    return found


def as_list(ids: Any) -> list[int]:
    """Return the whole numbers of a field that may hold one, several or none."""
    each = ids if isinstance(ids, list) else [ids]
    return [number for number in each if isinstance(number, int)]


def check_tokenizer_files(folder: Path) -> None:
    """Check the files that transformers reads to load the tokenizer of a folder, if they exist.

    Raises:
        ModelError: `tokenizer_config.json` is no JSON object, has a template that is no text, or
            has a name that is a path; or see `read_model_config`.
    """
    if (folder / "config.json").is_file():
        read_model_config(folder / "config.json")
    has_json = (folder / "tokenizer.json").is_file()
    for name in ("tokenizer.json",) if has_json else _VOCABULARIES:
        check_no_pointer(folder / name, ModelError)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        _check_template_names(path, read_json_object(path))


def _check_template_names(path: Path, content: dict[str, Any]) -> None:
    given = content.get("chat_template")
    # Where there are several templates they have names, which become names of files when saved.
    named = given if isinstance(given, list) else [{"name": "default", "template": given or ""}]
    for template in named:
        is_named = isinstance(template, dict) and template.keys() == {"name", "template"}
        if not is_named or not all(isinstance(text, str) for text in template.values()):
            raise ModelError(f"{path}: chat_template is no text; expected one; restore it")
    names = [template["name"] for template in named]
    for name in (*names, *(content.get("fast_tokenizer_files") or ())):
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ModelError(
                f"{path}: names {str(name)[:80]!r}; expected a plain name; restore the file"
            )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that transformers will read as well.

    Raises:
        ModelError: the file is no JSON object, is too large, is nested too deeply, or has a key
            twice.
    """
    check_no_pointer(path, ModelError)

    def line(error: Exception) -> str:
        found = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        return f"{path}: {found}; expected a JSON object; restore it"

    with raised_as(ModelError, line, of=(RecursionError, OSError, ValueError)):
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise ValueError(f"more than {_MOST_FILE_BYTES:,} bytes")
        content = strict_json(path.read_bytes(), infinity=True)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    return content


def _keys_and_values(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value, at any depth."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            yield from value.items()
            waiting += value.values()


def _check_number(path: Path, key: str, value: Any) -> None:
    for pattern, least, most in _BOUNDS:
        if not re.fullmatch(pattern, key):
            continue
        # Some architectures have a number for each layer.
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if number is not None and not (is_number and least <= number <= most):
                raise ModelError(
                    f"{path}: {key} is {str(number)[:40]}; expected a whole number from {least} "
                    f"to {most:,}; restore it"
                )
        return


def names_encoder_decoder(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json, or of an entry of `configs/`, is an encoder-decoder's.

    transformers leaves out what every model of a family has.
    """
    is_of_family = content.get("model_type") in ("t5", "mt5")
    return content.get("is_encoder_decoder", is_of_family) is True


IMAGE_CLASSIFICATION = "AutoModelForImageClassification"
IMAGE_KINDS = ("vit", "convnext", "convnextv2", "resnet")
"""the kinds of models of images that are trained here, by transformers' `model_type`"""


def names_images(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of a model of images that is trained here."""
    return content.get("model_type") in IMAGE_KINDS


_CLASSIFIERS = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForImageClassification": "classify",
}


def classifying_task(architectures: Any) -> str | None:
    """Return the task of a classifier that the `architectures` of a config.json name.

    None where they name no classifier, whatever stands there.
    """
    named = architectures if isinstance(architectures, list) else []
    tasks = (
        task for name in named for end, task in _CLASSIFIERS.items() if str(name).endswith(end)
    )
    return next(tasks, None)

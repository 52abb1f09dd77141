"""Which chat template a tokenizer is used with: its own, a built-in one, or a file's.

Takes a tokenizer and what `--chat-template` was given; sets the tokenizer's `chat_template`,
so that it is saved with the adapter and generation uses the same. Never renders a sample.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from qlora_kit.data.chat_text import ChatWriter, special_tokens, wants_bos
from qlora_kit.data.probe import probe_template
from qlora_kit.data.shapes import Message
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.time_limit import TimeUp, time_limit

FOR_BASE_MODELS = "alpaca"
"""the built-in template of a tokenizer that has none"""

_FOLDER = Path(__file__).parent / "chat_templates"
# Put before a built-in template where rows begin with a BOS token.
_BOS = "{{- bos_token -}}"
# A token that is no token of the tokenizer would be spelled in several, and no answer would end.
_NEEDS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
_MOST_OF_AN_END = 40
# The longest templates of released models have 20 KB.
_MOST_BYTES = 1 << 20
_SECONDS_TO_COMPILE = 5.0


@cache
def built_in_templates() -> dict[str, str]:
    """Return the built-in templates by name, without a BOS token."""
    return {path.stem: path.read_text("utf-8") for path in sorted(_FOLDER.glob("*.jinja"))}


def choose_template(tokenizer: Any, asked: str | None = None) -> None:
    """Set the chat template a tokenizer is used with.

    Args:
        tokenizer: transformers' tokenizer.
        asked: a built-in name or a Jinja file; if None the tokenizer keeps its own, and one
            that has none is given `FOR_BASE_MODELS`.

    Raises:
        ConfigError: no such name or file, not a template, or a built-in one whose special
            tokens the tokenizer lacks.
        ModelError: the template takes too long or too much memory, see `probe_template`.
    """
    if asked is None and not tokenizer.chat_template:
        asked = FOR_BASE_MODELS
    if asked in built_in_templates():
        tokenizer.chat_template = _built_in(asked, tokenizer)
    elif asked is not None:
        tokenizer.chat_template = _read(asked)
    if not _is_built_in(tokenizer.chat_template):
        probe_template(tokenizer)
    if asked is not None:
        _check_syntax(tokenizer, asked)


def spelled_out_end(tokenizer: Any) -> str | None:
    """Return what the chat template writes after an answer where it is none of the tokens.

    Such an end is learnt as so many letters. None where the template ends an answer with a
    special token, or with nothing.
    """
    answer = "a1b2"
    turns = (Message("user", "a"), Message("assistant", answer))
    try:
        text = ChatWriter(tokenizer).write(turns, "a short conversation")
    except DataError:
        return None
    end = text.rpartition(answer)[2].strip()
    if not end or any(token in end for token in special_tokens(tokenizer)):
        return None
    return end[:_MOST_OF_AN_END]


def _built_in(name: str, tokenizer: Any) -> str:
    known = tokenizer.get_vocab()
    missing = [token for token in _NEEDS.get(name, ()) if token not in known]
    if missing:
        fitting = [name for name in built_in_templates() if {*_NEEDS.get(name, ())} <= {*known}]
        raise ConfigError(
            f"--chat-template {name}: the tokenizer has no token {', '.join(missing)}; expected "
            f"one made for this template; pass {', '.join(fitting)} or a file"
        )
    return (_BOS if wants_bos(tokenizer) else "") + built_in_templates()[name]


def _is_built_in(template: Any) -> bool:
    return str(template).removeprefix(_BOS) in built_in_templates().values()


def _read(asked: str) -> str:
    path = Path(asked)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"--chat-template {asked}: {path.stat().st_size:,} bytes; expected a Jinja "
                f"template of at most {_MOST_BYTES:,}; name another file"
            )
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--chat-template {asked}: not UTF-8 text; expected a Jinja template; save it as UTF-8"
        ) from error
    except OSError as error:
        names = [*built_in_templates()]
        near = difflib.get_close_matches(asked, names, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"--chat-template {asked}: {reason}; expected a Jinja file or one of "
            f"{', '.join(names)}{meant}"
        ) from error
    if not text.strip():
        raise ConfigError(f"--chat-template {asked}: empty; expected a Jinja template; fill it in")
    return text


def _check_syntax(tokenizer: Any, asked: str) -> None:
    """Compile the template once, so that a slip in it is told with its line."""
    import jinja2

    try:
        with time_limit(_SECONDS_TO_COMPILE):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        reason = str(error.message).splitlines()[0][:200]
        raise ConfigError(
            f"--chat-template {asked}: line {error.lineno}: {reason}; expected a Jinja "
            "template; correct it"
        ) from error
    except (TimeUp, Exception):
        # What it makes of turns is judged with the user's own.
        return

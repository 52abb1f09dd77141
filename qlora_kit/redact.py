"""Takes secrets out of text before it is shown or written.

`redacted` takes a text, `redacted_values` takes values for JSON or YAML, `one_line` takes the text
of an error. They know the forms of common tokens, and the values of this machine's own secrets:
environment variables named like a secret, and the token that `hf auth login` stored. Ordinary
text, hashes, commits, paths and hub ids stay as they are. Never raises, never uses the network.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

MARK = "[redacted]"

# Forms that nothing but a secret has. A prefix stands at the start of a word, and the text after it
# is longer than any word, so names such as `hf_model` and `sk-learn` are left alone.
_TOKENS = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        hf_(?:oauth_|jwt_)[A-Za-z0-9._-]{20,} | hf_[A-Za-z0-9]{20,} | api_org_[A-Za-z0-9]{20,}
        | sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}
        | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,}
        | wandb_v[0-9]+_[A-Za-z0-9_-]{20,}
    )""",
    re.VERBOSE,
)
# The text before the secret is kept, because it says where the secret was. `Path` turns the two
# slashes of a URL into one.
_AFTER = (
    re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^\s/@:]*:[^\s/@]+(?=@)"),
    re.compile(r"\b([Bb]earer\s+)(?=\S*[0-9]|\S{20})[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(
        r"([?&][\w.-]*(?:token|key|secret|signature|password|credential)=)[^\s&#'\"]+",
        re.IGNORECASE,
    ),
)
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|API_KEY|SECRET|SECRET_ACCESS_KEY)$|PASSWORD")
# A shorter value may be a word of ordinary text.
_LEAST_LENGTH = 8
# Line ends and escape sequences of a stranger's file name would rewrite the terminal, and the
# marks that turn the direction of writing would hide what a line says.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_MOST_TOKEN_FILE_BYTES = 4096


def redacted(text: str) -> str:
    """Return `text` with every secret in it replaced by `[redacted]`."""
    for secret in _known_secrets():
        text = text.replace(secret, MARK)
    for pattern in _AFTER:
        text = pattern.sub(rf"\g<1>{MARK}", text)
    return _TOKENS.sub(MARK, text)


def one_line(text: str) -> str:
    """Return `text` redacted, with every control character written as its escape sequence."""
    return redacted(_CONTROLS.sub(lambda found: repr(found[0])[1:-1], text))


def for_terminal(text: str) -> str:
    """Return `text` with its control characters written out, except line ends and tabs.

    What a model writes may hold sequences that would rewrite the terminal.
    """
    return _CONTROLS.sub(
        lambda found: found[0] if found[0] in "\n\t" else repr(found[0])[1:-1], text
    )


def redacted_values(value: Any) -> Any:
    """Return `value` with every text in it redacted: in paths, lists, tuples, mappings, records."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Path):
        return Path(redacted(str(value)))
    if isinstance(value, Mapping):
        return {redacted_values(key): redacted_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([redacted_values(item) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: redacted_values(getattr(value, f.name)) for f in fields(value)}
        )
    return value


def _known_secrets() -> list[str]:
    """Return this machine's secrets, in every form that a text may have them in; longest first."""
    forms = {form for secret in _secrets() for form in _forms(secret)}
    # One secret may be a part of another.
    return sorted(forms, key=len, reverse=True)


def _secrets() -> Iterator[str]:
    named = (value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper()))
    for value in (*named, _stored_token(_token_path())):
        if len(value.strip()) >= _LEAST_LENGTH:
            yield value.strip()


def _forms(secret: str) -> Iterator[str]:
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield repr(secret)[1:-1]
    yield quote(secret, safe="")


def _token_path() -> str:
    """Return the file in which huggingface_hub keeps the token of a login."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    return os.path.expandvars(os.path.expanduser(path))


@functools.cache
def _stored_token(path: str) -> str:
    try:
        if os.path.getsize(path) > _MOST_TOKEN_FILE_BYTES:
            return ""
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""

"""Repositories of the hub: their names, and what the hub's errors mean for the user.

`HubName` reads `owner/name`, `owner/name@revision` and `hub:owner/name@revision`. `hub_errors`
turns errors of huggingface_hub into one line. Uses no network.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import ConfigError, HubError, QloraKitError, said

PREFIX = "hub:"
"""stands before a name that is never that of a folder"""
MAIN = "main"
"""the branch of a repository that is meant where none is named"""
_NAME = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>(?!.*\.\.)[A-Za-z0-9_][\w./+-]*))?"
)
_MOST_CHARACTERS = 96
_FULL = (402, 413, 507)
_QUOTA = re.compile(r"quota|storage limit|storage space|limit exceeded", re.IGNORECASE)
_TRY_AGAIN = "the same command goes on where this one stopped"


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, perhaps at a revision.

    Attributes:
        id: owner/name.
        revision: commit, branch or tag; None for the newest commit of the main branch.
    """

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    @classmethod
    def of(cls, text: str, flag: str) -> HubName:
        """Read a name; it may have `hub:` before it.

        Raises:
            ConfigError: it is no name of a repository.
        """
        match = _NAME.fullmatch(text.removeprefix(PREFIX))
        if match is None or any(odd in match["id"] for odd in ("--", "..")) or _is_too_long(match):
            raise ConfigError(
                f"{flag}: found {text!r}; expected hub:owner/name, of letters, digits, '-', '_' "
                "and '.'; correct it"
            )
        return cls(match["id"], match["revision"])

    @classmethod
    def of_adapter(cls, value: Path | str) -> HubName | None:
        """Return the repository that `--adapter` names; None where it names a folder.

        A name without `hub:` is a folder if it is there, or if the folder it would be in is: a
        run that is spelt wrongly must not become a question to the hub.

        Raises:
            ConfigError: it begins with `hub:` and is no name of a repository.
        """
        text = str(value)
        if text.startswith(PREFIX):
            return cls.of(text, "--adapter")
        match = _NAME.fullmatch(text)
        if match is None or os.path.exists(text) or os.path.isdir(text.partition("/")[0]):
            return None
        return cls(match["id"], match["revision"])


def _is_too_long(match: re.Match[str]) -> bool:
    return any(len(part) > _MOST_CHARACTERS for part in match["id"].split("/"))


# ---------------------------------------------------------------- errors


def network_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a hub that is out of reach."""
    from huggingface_hub import errors

    found: list[type[Exception]] = [errors.OfflineModeIsEnabled]
    for package in ("httpx2", "httpx"):
        try:
            module: Any = __import__(package)
        except ImportError:
            continue
        found.append(module.HTTPError)
    return tuple(found)


@contextlib.contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turn each error of a request to the hub into one line.

    Args:
        repository: what the request is about, for the line.

    Raises:
        HubError: in place of an error of huggingface_hub, of the network, or of a server.
    """
    try:
        yield
    except QloraKitError:
        raise
    except Exception as error:
        raise HubError(f"{repository}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    from huggingface_hub import errors

    found: BaseException | None = error
    # Files are sent by threads, which wrap what went wrong.
    while found is not None and not isinstance(found, errors.HfHubHTTPError):
        if isinstance(found, (*network_errors(), ConnectionError, TimeoutError)):
            return (
                f"the hub is out of reach ({said(found)}); check the network and HF_ENDPOINT; "
                f"{_TRY_AGAIN}"
            )
        found = found.__cause__
    if found is not None:
        return _of_answer(found)
    if _QUOTA.search(str(error)):
        return _no_room(said(error))
    return f"the hub's client failed ({said(error)}); {_TRY_AGAIN}"


def _of_answer(error: Any) -> str:
    """Return the line for an answer of the hub that is an error."""
    status = error.response.status_code
    told = " ".join(str(error.server_message or "").split())[:160]
    also = f" ({told})" if told else ""
    if status == 401:
        return (
            f"the hub does not accept the token{also}; expected a valid one; correct HF_TOKEN, or "
            "run `hf auth login`"
        )
    if status in _FULL or (status == 403 and _QUOTA.search(told)):
        return _no_room(told)
    if status == 403:
        return (
            f"the token has no right to write here{also}; expected one with write access to this "
            "owner's repositories; make one on the hub, or name a repository of yours"
        )
    if status == 404:
        return f"the hub has no such repository, or hides it{also}; check the name and the token"
    if status in (409, 412):
        return f"the repository was changed meanwhile{also}; look at it, and push again"
    if status == 429:
        return f"the hub takes no more requests for now{also}; wait; {_TRY_AGAIN}"
    if status >= 500:
        return f"the hub has a fault (HTTP {status}){also}; {_TRY_AGAIN}"
    return f"the hub refuses the request (HTTP {status}){also}; check the name and the revision"


def _no_room(told: str) -> str:
    also = f" ({told})" if told else ""
    return (
        f"no storage left on the hub{also}; expected room for the files; delete repositories, or "
        "enlarge the account"
    )

"""The JSON of OpenAI's interface: requests are read and judged, answers are written.

Takes the bytes of a body; returns a `ChatBody` or a `CompletionBody`, or raises `Refusal` with the
status and the field. A field that would change the answer and is not served is refused, unless it
has the value that changes nothing; fields of type `_Ignored` are taken and change nothing.

Source: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_kit.data.shapes import Message
from qlora_kit.infer.serving.asked import Finished

MOST_BODY_BYTES = 1 << 20
_MOST_STOPS = 16
_MOST_STOP_CHARACTERS = 256
_MOST_OF_A_NAME = 64
_SEEDS = 2**63
# The interface's own default for the tokens of a completion.
_COMPLETION_TOKENS = 16


class Refusal(Exception):  # noqa: N818 - the request is at fault, not the program
    """A request is not answered.

    Args:
        status: of HTTP.
        message: one line for the caller.
        param: the field that is at fault.
        code: a name of the reason, as OpenAI's.
        retry_seconds: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_seconds = status, retry_seconds
        self.body = error_body(status, message, param, code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---------------------------------------------------------------- requests

# Values of a field that say the same as its absence.
_Zero = Annotated[float, Field(ge=0, le=0)] | None
_Empty = Annotated[list[Any], Field(max_length=0)] | None
_EmptyMapping = Annotated[dict[str, Any], Field(max_length=0)] | None
_Ignored = Any
_Stop = Annotated[str, Field(min_length=1, max_length=_MOST_STOP_CHARACTERS)]
Body = TypeVar("Body", bound="_Body")


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: _Ignored = None


class _Body(_Strict):
    """What both kinds of requests have."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: _Zero = None
    frequency_penalty: _Zero = None
    logit_bias: _EmptyMapping = None
    user: _Ignored = None
    metadata: _Ignored = None
    store: _Ignored = None
    service_tier: _Ignored = None
    safety_identifier: _Ignored = None
    prompt_cache_key: _Ignored = None
    prompt_cache_retention: _Ignored = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop or ())

    @property
    def chosen_seed(self) -> int:
        """The seed that was given, or one that nobody else has."""
        return secrets.randbelow(_SEEDS) if self.seed is None else self.seed % _SEEDS

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the answer; None where the request does not say."""
        return self.max_tokens


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart] | None = None
    name: _Ignored = None
    # An answer that a client sends back has these, empty.
    refusal: None = None
    function_call: None = None
    tool_calls: _Empty = None
    audio: None = None
    annotations: _Empty = None

    def as_message(self) -> Message:
        """Return the turn as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            return Message(role, "".join(part.text for part in self.content))
        return Message(role, self.content or "")


class _TextFormat(_Strict):
    type: Literal["text"]


class ChatBody(_Body):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[_Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: _Empty = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: _Empty = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: _Ignored = None
    response_format: _TextFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def most_tokens(self) -> int | None:
        """See `_Body`; the newer name goes before the older."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The turns, for a chat template."""
        return tuple(turn.as_message() for turn in self.messages)


_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionBody(_Body):
    """A request to `/v1/completions`: one prompt, a text or ids."""

    prompt: _Text | Annotated[list[_Text], Field(min_length=1, max_length=1)] | _Ids
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    @property
    def most_tokens(self) -> int | None:
        """See `_Body`; this kind of request has a small default."""
        return self.max_tokens or _COMPLETION_TOKENS

    @property
    def content(self) -> str | list[int]:
        """The prompt as one text, or as ids."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [part for part in self.prompt if isinstance(part, str)]
        return texts[0] if texts else [part for part in self.prompt if isinstance(part, int)]


_FIELDS = {
    name
    for kind in (ChatBody, CompletionBody, _Turn, _TextPart, _TextFormat, _StreamOptions)
    for name in kind.model_fields
}
# Fields that are taken where they change nothing.
_NEUTRAL = {
    "n", "presence_penalty", "frequency_penalty", "logit_bias", "refusal", "function_call",
    "tool_calls", "audio", "annotations", "logprobs", "top_logprobs", "tools", "tool_choice",
    "functions", "response_format", "modalities", "best_of", "echo", "suffix",
}  # fmt: skip
_EXPECTED: Mapping[str | int, str] = {
    "prompt": "one text, which is not empty, or a list of ids",
    "stop": f"a text, or up to {_MOST_STOPS}, of 1 to {_MOST_STOP_CHARACTERS} characters",
    "content": "a text, or a list of parts of type text",
}


def parsed(kind: type[Body], content: bytes) -> Body:
    """Return a request.

    Raises:
        Refusal: the body is no JSON, or a field is unknown, missing or of a wrong value.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _refused(error) from None


def _refused(error: ValidationError) -> Refusal:
    # Never the value that was found: clients log errors, and a prompt is private.
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    kind, place = first["type"], first["loc"]
    if kind == "json_invalid":
        return Refusal(400, "the body is no JSON; expected one object", code="invalid_json")
    if kind == "extra_forbidden":
        param = _param(place[:-1], str(place[-1])[:_MOST_OF_A_NAME])
        return Refusal(400, f"{param}: not known here; leave it out", param, "unknown_parameter")
    param = _param(place)
    if kind == "missing":
        return Refusal(400, f"{param}: missing; expected it", param, "missing_parameter")
    if any(part in _NEUTRAL for part in place):
        return Refusal(
            400, f"{param}: not served with this value; leave it out", param, "unsupported_value"
        )
    expected = next((_EXPECTED[part] for part in place if part in _EXPECTED), None)
    # pydantic says what it expected: "Input should be a valid integer".
    expected = expected or first["msg"].partition(" should ")[2].removeprefix("be ")
    return Refusal(400, f"{param or 'the body'}: expected {expected}", param, "invalid_value")


def _param(place: Sequence[str | int], *more: str) -> str | None:
    """Return a place as callers write it; names of the members of a union are left out."""
    kept = [str(part) for part in place if isinstance(part, int) or part in _FIELDS]
    return ".".join((*kept, *more)) or None


# ---------------------------------------------------------------- answers


@dataclass(frozen=True)
class Writer:
    """Writes the answer to one request.

    Attributes:
        model: the name that was asked.
        prompt_tokens: tokens of the prompt.
        is_chat: whether it is a chat's answer.
        id: of the answer.
        created: seconds since 1970.
    """

    model: str
    prompt_tokens: int
    is_chat: bool
    id: str
    created: int

    @classmethod
    def new(cls, model: str, prompt_tokens: int, *, is_chat: bool) -> Writer:
        """Return a writer with an id of its own."""
        kind = "chatcmpl" if is_chat else "cmpl"
        return cls(
            model, prompt_tokens, is_chat, f"{kind}-{secrets.token_hex(12)}", int(time.time())
        )

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """Return the answer as one object."""
        if self.is_chat:
            said: dict[str, Any] = {
                "message": {"role": "assistant", "content": text, "refusal": None}
            }
        else:
            said = {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finished.reason}
        return self._object("", [choice], usage=self.usage(finished))

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.is_chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """Return some more text of a stream."""
        return self._chunk({"content": text} if self.is_chat else {}, text)

    def closing(self, finished: Finished, *, with_usage: bool) -> list[dict[str, Any]]:
        """Return the end of a stream."""
        end = [self._chunk({}, reason=finished.reason)]
        if with_usage:
            end.append(self._object(".chunk", [], usage=self.usage(finished)))
        return end

    def usage(self, finished: Finished) -> dict[str, int]:
        """Return the counts of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": finished.tokens,
            "total_tokens": self.prompt_tokens + finished.tokens,
        }

    def _chunk(
        self, delta: Mapping[str, str], text: str = "", reason: str | None = None
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self.is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return self._object(".chunk", [choice])

    def _object(
        self, suffix: str, choices: Sequence[Mapping[str, Any]], **more: Any
    ) -> dict[str, Any]:
        # A stream of completions has no kind of object of its own.
        kind = f"chat.completion{suffix}" if self.is_chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "choices": choices, **more,
        }  # fmt: skip


def event_of(content: Mapping[str, Any]) -> str:
    """Return an event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


LAST_EVENT = "data: [DONE]\n\n"

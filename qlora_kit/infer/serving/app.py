"""The addresses of the server, and who may use them.

Takes the models that are served and the engine that answers; returns an application of starlette.
Every error is JSON in OpenAI's form. Neither prompts nor answers are logged.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qlora_kit.data.asking import Asks
from qlora_kit.errors import QloraKitError
from qlora_kit.events import Announce, LogLine
from qlora_kit.infer.generate import Sampling
from qlora_kit.infer.serving.asked import Asked, Failed, Finished, Heard, Piece, QueueFull
from qlora_kit.infer.serving.engine import Answer, Engine
from qlora_kit.infer.serving.protocol import (
    LAST_EVENT,
    MOST_BODY_BYTES,
    Body,
    ChatBody,
    CompletionBody,
    Refusal,
    Writer,
    error_body,
    event_of,
    parsed,
)
from qlora_kit.infer.serving.server import is_loopback

_SECONDS_OF_A_BODY = 30.0
_PAGE = Path(__file__).parent / "page.html"
# A report has neither scripts nor anything from elsewhere; its pictures are in it.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class ServedModel:
    """A name that requests may ask for.

    Attributes:
        name: the name.
        adapter: name of the adapter in the set; None for the model as it is loaded.
        asks: turns prompts into ids, by the model's own chat template.
        tokenizer: its own tokenizer.
        ends: ids that end its answers.
        chats: whether it has a chat template; otherwise it continues texts alone.
        report: the page of its run; None without one.
    """

    name: str
    adapter: str | None
    asks: Asks
    tokenizer: Any
    ends: frozenset[int]
    chats: bool
    report: Path | None = None


@dataclass(frozen=True)
class Served:
    """All that the server answers with.

    Attributes:
        models: the models by name.
        engine: answers requests.
        most_tokens: tokens that a prompt and its answer may have together.
        vocabulary: ids are below this.
        seconds: the longest time of a request.
        is_local: whether callers must call this machine by a name of its own.
        api_key: the key that callers must show; None where none is asked for.
        announce: receives lines of the log.
    """

    models: Mapping[str, ServedModel]
    engine: Engine
    most_tokens: int
    vocabulary: int
    seconds: float
    is_local: bool
    api_key: str | None
    announce: Announce

    def app(self) -> Starlette:
        """Return the application."""
        page = _PAGE.read_text("utf-8")
        return Starlette(
            routes=[
                Route("/", self._guarded(lambda _: _page(page))),
                Route("/health", self._answered(self._health)),
                Route("/v1/models", self._guarded(self._list)),
                Route("/v1/models/{name:path}", self._guarded(self._one)),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
                Route("/reports/{name:path}", self._guarded(self._report)),
            ],
            exception_handlers={HTTPException: _said_by_status},
        )

    # ------------------------------------------------------------ who may

    def _guarded(
        self, work: Callable[[Request], Awaitable[Response]]
    ) -> Callable[..., Awaitable[Response]]:
        async def with_key(request: Request) -> Response:
            self._check_key(request)
            return await work(request)

        return self._answered(with_key)

    def _answered(
        self, work: Callable[[Request], Awaitable[Response]]
    ) -> Callable[..., Awaitable[Response]]:
        """Return an endpoint that answers errors as JSON, and never with a traceback."""

        async def endpoint(request: Request) -> Response:
            try:
                self._check_host(request)
                return await work(request)
            except Refusal as refusal:
                return _refused(refusal)
            except ClientDisconnect:
                return Response(status_code=499)
            except QloraKitError as error:
                return JSONResponse(error_body(400, error.faults[0]), 400, _HEADERS)
            except Exception as error:
                name = type(error).__name__
                self.announce(LogLine(f"{request.url.path[:64]!r}: failed ({name})"))
                return JSONResponse(error_body(500, f"failed ({name})"), 500, _HEADERS)

        return endpoint

    def _check_host(self, request: Request) -> None:
        """Refuse pages of other sites, which reach a loopback address by a name of their own."""
        named = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]")
        if self.is_local and not is_loopback(named):
            raise Refusal(
                403, "this server listens on this machine alone; expected Host: localhost"
            )

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        given = _key_in(request.headers.get("authorization", ""))
        if not hmac.compare_digest(given, self.api_key.encode()):
            raise Refusal(401, "no valid API key; give it as Bearer", code="invalid_api_key")

    # ------------------------------------------------------------ what is there

    async def _health(self, _: Request) -> Response:
        running, waiting = self.engine.counts()
        is_alive = self.engine.is_alive
        said = {"status": "ok" if is_alive else "stopped", "running": running, "waiting": waiting}
        return JSONResponse(said, 200 if is_alive else 503, _HEADERS)

    async def _list(self, _: Request) -> Response:
        models = [self._described(model) for model in self.models.values()]
        return JSONResponse({"object": "list", "data": models}, headers=_HEADERS)

    async def _one(self, request: Request) -> Response:
        return JSONResponse(
            self._described(self._model(request.path_params["name"])), headers=_HEADERS
        )

    async def _report(self, request: Request) -> Response:
        model = self._model(request.path_params["name"])
        if model.report is None:
            raise Refusal(404, f"{model.name}: its folder has no report.html")
        page = await asyncio.to_thread(model.report.read_text, "utf-8")
        return HTMLResponse(page, headers={**_HEADERS, "Content-Security-Policy": _REPORT_POLICY})

    def _described(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "qlora-kit",
            "chat": model.chats,
            "report": model.report is not None,
            "max_model_len": self.most_tokens,
        }

    def _model(self, name: str) -> ServedModel:
        model = self.models.get(name)
        if model is None:
            known = ", ".join(self.models)
            raise Refusal(
                404, f"no such model; expected one of {known}", "model", "model_not_found"
            )
        return model

    # ------------------------------------------------------------ answers

    async def _chat(self, request: Request) -> Response:
        body = await _body(request, ChatBody)
        model = self._model(body.model)
        if not model.chats:
            raise Refusal(
                400, f"{model.name}: continues texts, and has no chat template; use "
                "/v1/completions, or start the server with --chat-template", "model",
            )  # fmt: skip
        ids = model.asks.ids(body.prompt_messages, "messages")
        return await self._answer(request, body, model, ids)

    async def _complete(self, request: Request) -> Response:
        body = await _body(request, CompletionBody)
        model = self._model(body.model)
        content = body.content
        ids = model.asks.ids(content, "prompt") if isinstance(content, str) else content
        return await self._answer(request, body, model, ids)

    async def _answer(
        self, request: Request, body: ChatBody | CompletionBody, model: ServedModel, ids: list[int]
    ) -> Response:
        asked = self._asked(body, model, ids)
        heard: asyncio.Queue[Heard] = asyncio.Queue()
        answer = self._submitted(asked, heard)
        writer = Writer.new(model.name, len(ids), is_chat=isinstance(body, ChatBody))
        if body.stream:
            events = _events(writer, answer, heard, with_usage=body.wants_usage)
            return StreamingResponse(events, headers=_HEADERS, media_type="text/event-stream")
        text, ended = await _while_there(request, answer, _all_of(heard))
        if isinstance(ended, Failed):
            raise Refusal(ended.status, ended.reason)
        return JSONResponse(writer.whole(text, ended), headers=_HEADERS)

    def _asked(self, body: ChatBody | CompletionBody, model: ServedModel, ids: list[int]) -> Asked:
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        if not ids:
            raise Refusal(400, f"{param}: no token; expected a text", param, "invalid_value")
        if max(ids) >= self.vocabulary:
            raise Refusal(
                400, f"{param}: an id above {self.vocabulary - 1}; expected ids of the model",
                param, "invalid_value",
            )  # fmt: skip
        room = self.most_tokens - len(ids)
        wanted = body.most_tokens or max(room, 1)
        if wanted > room:
            raise Refusal(
                400, f"{param}: {len(ids)} tokens, and {wanted} for the answer; expected at most "
                f"{self.most_tokens} together; shorten the prompt, or ask for fewer", param,
                "context_length_exceeded",
            )  # fmt: skip
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p
        return Asked(
            tuple(ids),
            Sampling(wanted, temperature, top_p, body.chosen_seed),
            model.tokenizer,
            model.adapter,
            model.ends,
            body.stops,
            self.seconds,
            model.name,
        )

    def _submitted(self, asked: Asked, heard: asyncio.Queue[Heard]) -> Answer:
        loop = asyncio.get_running_loop()

        def hear(what: Heard) -> None:
            # The loop is closed where the server has ended at once.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(heard.put_nowait, what)

        try:
            return self.engine.submit(asked, hear)
        except QueueFull as full:
            raise Refusal(
                429, str(full), code="queue_full", retry_seconds=full.retry_seconds
            ) from None


# ---------------------------------------------------------------- pieces to responses


async def _all_of(heard: asyncio.Queue[Heard]) -> tuple[str, Finished | Failed]:
    texts: list[str] = []
    while isinstance(what := await heard.get(), Piece):
        texts.append(what.text)
    return "".join(texts), what


async def _while_there(
    request: Request, answer: Answer, whole: Awaitable[tuple[str, Finished | Failed]]
) -> tuple[str, Finished | Failed]:
    """Return the whole answer; cancel it when the caller goes away.

    Raises:
        ClientDisconnect: the caller has gone.
    """
    writing = asyncio.ensure_future(whole)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if writing.done():
            return writing.result()
        raise ClientDisconnect
    finally:
        answer.cancel()
        writing.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    writer: Writer, answer: Answer, heard: asyncio.Queue[Heard], *, with_usage: bool
) -> AsyncIterator[str]:
    """Yield the events of a stream; when the caller goes away, starlette ends this generator."""
    try:
        for each in writer.opening():
            yield event_of(each)
        while isinstance(what := await heard.get(), Piece):
            yield event_of(writer.piece(what.text))
        if isinstance(what, Failed):
            yield event_of(error_body(what.status, what.reason))
            return
        for each in writer.closing(what, with_usage=with_usage):
            yield event_of(each)
        yield LAST_EVENT
    finally:
        answer.cancel()


# ---------------------------------------------------------------- bodies and errors


async def _body(request: Request, kind: type[Body]) -> Body:
    # A page of another site may send forms and plain text anywhere, but JSON only where it is let.
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Refusal(415, "expected Content-Type: application/json")
    content = bytearray()
    try:
        async with asyncio.timeout(_SECONDS_OF_A_BODY):
            async for chunk in request.stream():
                content += chunk
                if len(content) > MOST_BODY_BYTES:
                    raise Refusal(413, f"the body is over {MOST_BODY_BYTES:,} bytes; shorten it")
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {_SECONDS_OF_A_BODY:g} s") from None
    return parsed(kind, bytes(content))


def _key_in(header: str) -> bytes:
    """Return the key of a header: a bearer's, or the password that a browser asks for."""
    kind, _, given = header.partition(" ")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(given, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return given.strip().encode() if kind.lower() == "bearer" else b""


def _refused(refusal: Refusal) -> Response:
    headers = dict(_HEADERS)
    if refusal.retry_seconds is not None:
        headers["Retry-After"] = str(refusal.retry_seconds)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="qlora-kit: the API key is the password"'
    if refusal.status in (408, 413):
        # The rest of the body is not read.
        headers["Connection"] = "close"
    return JSONResponse(refusal.body, refusal.status, headers)


async def _said_by_status(_: Request, error: Exception) -> Response:
    """Answer an address or a method that is not there."""
    assert isinstance(error, HTTPException)
    headers = {**_HEADERS, **(error.headers or {})}
    said = error_body(error.status_code, f"{error.detail.lower()}; /v1/models lists what is here")
    return JSONResponse(said, error.status_code, headers)


# ---------------------------------------------------------------- the page


async def _page(text: str) -> Response:
    """Return the page; its policy admits its own script and style by their hashes, no others."""
    kinds = {"script": "script-src", "style": "style-src"}
    allowed = "; ".join(f"{kinds[tag]} 'sha256-{_hash_of(text, tag)}'" for tag in kinds)
    policy = (
        f"default-src 'none'; {allowed}; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={**_HEADERS, "Content-Security-Policy": policy})


def _hash_of(page: str, tag: str) -> str:
    inside = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()

"""A server for tests: models with adapters, the process, and what is asked of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import PROJECT
from tiny_models import fill_lora, load_folder

ADAPTERS = {"tom": "alpaca", "lily": "vicuna"}
"""the adapters, and the chat template of each"""
REPORT = "<!DOCTYPE html><title>The report of {name}</title><p>Its loss was 1.5"
PROMPTS = [
    "Once upon a time", "The girl", "Tom had a big red ball and", "Lily was sad. She",
    "One day a dog", "Mum said", "In the park there was a very old tree that", "He ran",
]  # fmt: skip
_SECONDS = 120.0


@dataclass(frozen=True)
class Models:
    """A base with a folder for each adapter."""

    base: Path
    adapters: dict[str, Path]

    @property
    def arguments(self) -> list[str]:
        """The options that name them, computed in fp32."""
        named = [f"--adapter={name}={folder}" for name, folder in self.adapters.items()]
        as_trained = ["--bits", "16", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
        return [*named, "--model", str(self.base), *as_trained]


def make_models(folder: Path, stories: Path) -> Models:
    """Make two adapters of a small real model, each with a chat template of its own."""
    import qlora_kit as qk
    from qlora_kit.data.chat_template import choose_template
    from qlora_kit.model.tokenizer import load_tokenizer

    made = Models(folder / "stories", {name: folder / name for name in ADAPTERS})
    shutil.copytree(stories, made.base)
    base = load_folder(made.base, 16)
    for seed, (name, template) in enumerate(ADAPTERS.items()):
        adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)), seed=seed)
        fill_lora(adapter, seed=seed, std=0.01)
        made.adapters[name].mkdir()
        qk.save_adapter(adapter, made.adapters[name], qk.BaseRecord.of(base))
        qk.detach(adapter)
        tokenizer = load_tokenizer(made.base, writes=True, is_exact=True)
        choose_template(tokenizer, template)
        tokenizer.save_pretrained(made.adapters[name])
        (made.adapters[name] / "report.html").write_text(REPORT.format(name=name))
    return made


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    log_file: Path
    port: int = 0

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that it has said."""
        return self.log_file.read_text("utf-8", "replace")

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Send a body, as JSON unless it is bytes; return the status, the JSON and the headers."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content, {"Content-Type": "application/json", **headers})

    def get(self, path: str, **headers: str) -> tuple[int, Any, Any]:
        """Ask for an address; return the status, the JSON or text, and the headers."""
        return self.ask("GET", path, None, headers)

    def ask(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str]
    ) -> tuple[int, Any, Any]:
        """Send any request."""
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(text) if is_json else text, answer.headers

    def connection(self) -> http.client.HTTPConnection:
        """Open a connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)

    def wait_for(self, pattern: str, begun: int = 0) -> re.Match[str]:
        """Wait until the log has a text, after so many characters."""
        end = time.monotonic() + _SECONDS
        while (found := re.search(pattern, self.log[begun:])) is None:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.02)
        return found

    def ended(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(_SECONDS)


@contextlib.contextmanager
def server(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start a server on a free port, and end it after the block."""
    log = folder / f"log-{time.monotonic_ns()}"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_kit", "serve", "--port", "0", *arguments],
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **(environment or {})},
        )
    started = Server(process, log)
    try:
        started.port = int(started.wait_for(r"listening on http://[^ ]*:(\d+)")[1])
        yield started
    finally:
        process.kill()
        process.wait()

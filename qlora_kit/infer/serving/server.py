"""The socket and the signals of the server.

Takes an application; serves it until a signal, and lets running answers end first.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from qlora_kit.errors import ConfigError, EnvironmentFault, reason

_MOST_CONNECTIONS = 1024


@contextlib.contextmanager
def listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that has its address, so that a taken port is known before a model is loaded.

    Args:
        host: a name or an address.
        port: 0 for any that is free.

    Raises:
        ConfigError: the host is not one of this machine.
        EnvironmentFault: the port is taken, or not allowed.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--host {host}: no such host; expected an address of this machine, such as 127.0.0.1"
        ) from error
    with socket.socket(family, kind) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except OSError as error:
            raise EnvironmentFault(
                f"--port {port} on {host}: {reason(error)}; expected a free one; choose another, "
                "or 0 for any"
            ) from error
        yield made


def is_loopback(host: str) -> bool:
    """Whether a name or an address is that of the own machine, which no other can reach."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests; at a second signal, end at once."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)


def run_until_stopped(app: Starlette, listening: socket.socket, seconds: float) -> None:
    """Serve until SIGINT or SIGTERM; requests that have begun are answered first.

    The signal is then raised again, for whoever handled signals before.

    Args:
        app: the application.
        listening: see `listening_socket`.
        seconds: the longest time that running answers are given.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(seconds)),
    )
    _Server(config).run(sockets=[listening])

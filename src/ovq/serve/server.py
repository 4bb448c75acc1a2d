"""Sockets, signals and logs: runs an application until it is told to end."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from ovq.serve.limits import Limits


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address.

    Example:
        >>> is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ValueError: If the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"expected a host and a port that this machine can listen on, found {host}:{port} ({error})"
        ) from error


def url_of(listener: socket.socket) -> str:
    """The base URL of clients, for a socket that listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class _Server(uvicorn.Server):
    """uvicorn, which says when it is ready."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def run(
    app: Any,
    listener: socket.socket,
    *,
    limits: Limits,
    shutdown_seconds: int,
    on_ready: Callable[[], None],
    log_level: str = "warning",
) -> None:
    """Serve until SIGINT or SIGTERM. Requests that are under way are then answered, and new ones are not.

    Args:
        app: The application.
        listener: From `bound`.
        limits: `max_connections` matters here.
        shutdown_seconds: How long to wait for requests that are under way; a second signal ends them at once.
        on_ready: Is called once requests are answered.
        log_level: Of uvicorn's logs on standard error; `"info"` for a line per request.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_level=log_level,
        server_header=False,
        # Longer than clients keep idle connections (5 s in httpx), so that clients close them: a request may
        # otherwise meet a connection that the server is closing.
        timeout_keep_alive=75,
        limit_concurrency=limits.max_connections,
        timeout_graceful_shutdown=shutdown_seconds,
    )
    _Server(config, on_ready).run(sockets=[listener])

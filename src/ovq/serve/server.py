"""Sockets, signals and logs: runs an application until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ovq.serve.errors import APIError, bad_request
from ovq.serve.limits import Limits
from ovq.serve.responses import error_response


def is_loopback(listener: socket.socket) -> bool:
    """Whether a bound socket can only be reached from this machine."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that refuses connections until a server listens on it; port 0 takes a free port.

    ValueError if the address cannot be used.
    """
    with _errors_naming(host, port), contextlib.ExitStack() as stack:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = stack.enter_context(socket.socket(family))
        # As `socket.create_server`, which would listen: a client would then wait for the model to load.
        if sys.platform != "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
        stack.pop_all()
    return bound


def listen(bound: socket.socket) -> None:
    """Accept connections from now on; ValueError if another server came first.

    uvicorn would do it too, but fail with a traceback.
    """
    with _errors_naming(*bound.getsockname()[:2]):
        bound.listen()


@contextlib.contextmanager
def _errors_naming(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"expected a host and a port that this machine can listen on, found {host}:{port} ({error})"
        ) from error


def url_of(listener: socket.socket) -> str:
    """The base URL for clients of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


_BACKLOG = 256
"""Connections that wait to be accepted, which then happens to all of them at once."""

_MOST_REFUSED = 64
"""Connections too many that get an error; further ones are closed without an answer."""

_SPARE_FILES = 512
"""Files that connections leave to the two above, to uploads, and to all else."""


def connections_within_files(wanted: int) -> int:
    """How many of `wanted` connections there are files for. Raises the soft limit of this process if need be.

    ValueError if there are too few for a server.
    """
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited, needed = resource.RLIM_INFINITY, wanted + _SPARE_FILES
    files = needed if hard == unlimited else min(hard, needed)
    if files <= _SPARE_FILES:
        raise ValueError(
            f"expected a limit of more than {_SPARE_FILES} open files (ulimit -Hn), found {files}"
        )
    if soft != unlimited and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files - _SPARE_FILES


_GRACE_SECONDS = 5
"""Seconds beyond the limits of a request or of the shutdown, so that an error response can be sent."""


class _Connection(H11Protocol):
    """uvicorn's connection, aborted if a client sends no request, stalls while sending it, or does not read.

    uvicorn itself only limits the time that connections wait for the next request. At its limit of
    connections it also refuses requests on those it has. Its own errors are not in the form of OpenAI's.
    """

    limits: Limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        num_refused = len(self.connections) - self.limits.max_connections
        if num_refused > 0:
            self.app = self._refuse
        if num_refused > _MOST_REFUSED:
            transport.abort()
        self._stage: tuple[Any, ...] = ()
        self._since = 0.0
        self._check_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request, and close the connection."""
        response = error_response(bad_request("expected an HTTP request, found otherwise"))
        response.headers["connection"] = "close"
        for event in (
            h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        """The application of a connection too many, which still answers health checks."""
        if scope["path"] == "/health":
            await self.config.loaded_app(scope, receive, send)
            return
        most = self.limits.max_connections
        error = APIError(
            503,
            f"expected at most {most} open connections, found more",
            kind="server_error",
            code="too_many_connections",
            retry=True,
        )
        self.logger.warning("refused a request: %s", error.message)
        response = error_response(error)
        response.headers["connection"] = "close"
        await response(scope, receive, send)

    def _check_time(self) -> None:
        """Called about every second: abort the connection if it has been in one stage for too long."""
        now, limits = self.loop.time(), self.limits
        is_answering = self.cycle is not None and not self.cycle.response_complete
        is_waiting, is_closing = self.timeout_keep_alive_task is not None, self.transport.is_closing()
        stage = (self.cycle, is_answering, is_waiting, is_closing)
        if stage != self._stage:
            self._stage, self._since = stage, now
        limit = limits.read_seconds
        if is_answering:
            limit += limits.request_seconds + _GRACE_SECONDS
        elif self.app == self._refuse:
            limit = min(limit, _GRACE_SECONDS)
        elif is_waiting and not is_closing:
            limit = self.timeout_keep_alive + _GRACE_SECONDS
        if now - self._since >= limit:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(min(1.0, limit / 8), self._check_time)


class Server(uvicorn.Server):
    """Serves until SIGINT, SIGTERM or SIGHUP. Running requests are then completed, and new ones are refused.

    Args:
        config: see `uvicorn_config`.
        on_ready: called once the server answers requests.
        on_end: called in a thread when running requests are to end with an error: `shutdown_seconds` of the
            config after the signal, or at a second one.
    """

    def __init__(
        self, config: uvicorn.Config, *, on_ready: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_ready, self._on_end = on_ready, on_end
        self._is_hurried = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. The second hurries; at more, uvicorn would leave tasks, with a traceback."""
        if self.should_exit:
            self._is_hurried = True
        else:
            super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]  # uvicorn names a narrower type
        """Handle SIGHUP like the signals of uvicorn."""
        # There is none on Windows.
        number = getattr(signal, "SIGHUP", None)
        is_main = threading.current_thread() is threading.main_thread()
        with super().capture_signals():
            if number is None or not is_main or signal.getsignal(number) is signal.SIG_IGN:
                yield
                return
            before = signal.signal(number, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(number, before)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        loop = asyncio.get_running_loop()
        assert self.config.timeout_graceful_shutdown is not None
        end = loop.time() + self.config.timeout_graceful_shutdown - _GRACE_SECONDS
        while loop.time() < end and not self._is_hurried:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self._on_end)


def uvicorn_config(
    app: Any, limits: Limits, shutdown_seconds: int = 30, log_level: str = "warning"
) -> uvicorn.Config:
    """The configuration of uvicorn.

    After `shutdown_seconds` for running requests, uvicorn cancels what an application has not ended in
    `_GRACE_SECONDS` more. The `log_level` `"info"` gives a line per request.
    """
    return uvicorn.Config(
        app,
        lifespan="on",
        # One HTTP implementation, whatever is installed, and no websockets, whose connections outlive it.
        http=type("Connection", (_Connection,), {"limits": limits}),
        ws="none",
        backlog=_BACKLOG,
        log_level=log_level,
        server_header=False,
        # Longer than clients keep idle connections (5 s in httpx), so that clients close them: a request may
        # otherwise meet a connection that the server is closing.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=shutdown_seconds + _GRACE_SECONDS,
    )

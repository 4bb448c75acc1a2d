"""`Guard`: refuses requests with a wrong key, method or host, or a too large body, before they are parsed."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.routing import Match

from ovq.serve.errors import APIError, ClientGone, shown
from ovq.serve.limits import Limits
from ovq.serve.responses import error_response

_JSON = "application/json"
UPLOAD = "application/octet-stream"
"""Content type of uploads."""
# The route that itself reads bodies of this type, in pieces and within limits of its own.
_UPLOAD_ROUTE = ("POST", "/v1/contexts")

_MOST_DISCARDING_SECONDS = 5


class Guard:
    """An ASGI middleware around all routes.

    Args:
        app: The application.
        routes: Its routes.
        limits: `max_body_bytes` and `read_seconds` are for every request except uploads, whatever its route,
            method and type.
        api_key: Key that clients must send as `Authorization: Bearer KEY`; None for no key.
        hosts: Allowed values of the header `Host`, or None for all. A page of another site in a browser can
            reach a server on the same machine (DNS rebinding), but not under these names.
    """

    def __init__(
        self,
        app: Any,
        *,
        routes: Sequence[Any],
        limits: Limits,
        api_key: str | None,
        hosts: Sequence[str] | None,
    ) -> None:
        self._app, self._routes, self._limits, self._hosts = app, routes, limits, hosts
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seconds = min(self._limits.read_seconds, _MOST_DISCARDING_SECONDS)
        receive, send = _after_the_body(receive, send, seconds)
        headers, other_methods = Headers(scope=scope), self._find_route(scope)
        try:
            self._check_host(headers)
            # Health checks come from programs without a key.
            if scope["path"] != "/health":
                self._check_key(headers)
            if other_methods:
                found = f"for {shown(scope['path'])}, found {shown(scope['method'])}"
                message = f"expected {' or '.join(other_methods)} {found}"
                raise APIError(405, message, allow=other_methods)
            kind = content_type(headers)
            if kind != UPLOAD or (scope["method"], scope["path"]) != _UPLOAD_ROUTE:
                if scope["method"] in ("POST", "PUT", "PATCH") and kind != _JSON:
                    # Browsers let pages of any site send some other types without a preflight.
                    raise APIError(415, f"Content-Type: expected {_JSON}, found {shown(kind)}")
                receive = await self._with_body(receive, headers)
        except APIError as error:
            response = error_response(error)
            if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
                # The body was not read, so the connection cannot be reused.
                response.headers["connection"] = "close"
            await response(scope, receive, send)
        except ClientGone:
            return
        else:
            await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is None:
            return
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if name.lower() not in self._hosts:
            raise APIError(
                421,
                f"Host: expected one of {list(self._hosts)}, as the server has no key, found {shown(host)}",
                code="wrong_host",
            )

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # A comparison in constant time.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            raise APIError(
                401, "expected the API key of this server as a bearer token", code="invalid_api_key"
            )

    def _find_route(self, scope: Any) -> Sequence[str]:
        """Note the route of a request for the metrics; returns its methods if that of the request is none."""
        allow: set[str] = set()
        for route in self._routes:
            match, of_route = route.matches(scope)
            if match is not Match.NONE:
                scope["route"] = of_route.get("route")
            if match is Match.FULL:
                return ()
            if match is Match.PARTIAL:
                allow |= route.methods
        return sorted(allow)

    async def _with_body(self, receive: Any, headers: Headers) -> Any:
        """Read the body; returns a `receive` function that replays it."""
        largest = self._limits.max_body_bytes
        check_size(headers, largest=largest)
        deadline = asyncio.get_running_loop().time() + self._limits.read_seconds
        body = b"".join([data async for data in body_pieces(receive, largest=largest, deadline=deadline)])
        unread: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return unread.pop() if unread else await receive()

        return replayed


def _after_the_body(receive: Any, send: Any, seconds: float) -> tuple[Any, Any]:
    """`receive` and `send` for an application that may respond without having read the body.

    The rest is discarded, for at most `seconds`, before the response ends. A connection that is closed with
    bytes unread is reset, and the client may lose the response.
    """
    is_whole = False

    async def received() -> Any:
        nonlocal is_whole
        message = await receive()
        # Also if the client has disconnected.
        is_whole = not message.get("more_body", False)
        return message

    async def discard() -> None:
        while not is_whole:
            await received()

    async def sent(message: Any) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_last and not is_whole:
            await send({**message, "more_body": True})
            message = {"type": "http.response.body"}
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(discard(), seconds)
        await send(message)

    return received, sent


def content_type(headers: Headers) -> str:
    """The content type of a body, without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def check_size(headers: Headers, *, largest: int) -> None:
    """Raise APIError if a request announces a body of more than `largest` bytes, before any of it is read.

    Clients that wait for `100 Continue` then do not send it.
    """
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > largest:
        raise _too_large(largest)


async def body_pieces(receive: Any, *, largest: int, deadline: float) -> AsyncGenerator[bytes, None]:
    """Stream the body of a request, which must have arrived by `deadline`, by the clock of the event loop.

    Raises:
        APIError: If the body is larger than `largest` bytes, or late.
        ClientGone: If the client has disconnected.
    """
    size, is_whole = 0, False
    while not is_whole:
        try:
            message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise APIError(408, "expected the whole request in time, found part of it") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        data = message.get("body", b"")
        size += len(data)
        if size > largest:
            raise _too_large(largest)
        yield data
        is_whole = not message.get("more_body", False)


def _too_large(largest: int) -> APIError:
    return APIError(413, f"expected a body of at most {largest} bytes, found more", code="body_too_large")

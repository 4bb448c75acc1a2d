"""What is refused before a request is looked at: a wrong key, a foreign host, a body that is too large."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Collection, Sequence
from typing import Any

from ovq.serve.errors import APIError
from ovq.serve.limits import Limits

_JSON = "application/json"
UPLOAD = "application/octet-stream"
"""The type of bodies that some routes read by themselves, piece by piece."""


class Guard:
    """An ASGI middleware around all routes.

    Args:
        app: The application.
        limits: `max_body_bytes` and `read_seconds` matter here. They hold for every request, whatever its
            route, method and type.
        api_key: What clients must send as `Authorization: Bearer KEY`; None for no key.
        hosts: Names that the header `Host` may have, or None for all. A page of another site that a browser
            shows can reach a server on the same machine, but not under these names.
        uploads: Method and path of the routes that read bodies of the type `UPLOAD` by themselves, within
            limits of their own.
    """

    def __init__(
        self,
        app: Any,
        *,
        limits: Limits,
        api_key: str | None,
        hosts: Sequence[str] | None,
        uploads: Collection[tuple[str, str]],
    ) -> None:
        self._app, self._limits, self._hosts, self._uploads = app, limits, hosts, uploads
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        try:
            self._check_host(headers)
            # Health is asked for by programs that have no key.
            if scope["path"] != "/health":
                self._check_key(headers)
            kind = headers.get("content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
            is_upload = kind == UPLOAD and (scope["method"], scope["path"]) in self._uploads
            if not is_upload:
                if scope["method"] in ("POST", "PUT", "PATCH") and kind != _JSON:
                    # Browsers send other types for pages of any site without asking.
                    raise APIError(415, f"Content-Type: expected {_JSON}, found {kind[:80]!r}")
                receive = await self._with_body(receive, headers)
        except APIError as error:
            await _send(error, send, has_body=_has_body(headers))
        except _Disconnected:
            return
        else:
            await self._app(scope, receive, send)

    def _check_host(self, headers: dict[str, bytes]) -> None:
        if self._hosts is None:
            return
        host = headers.get("host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if name.lower() not in self._hosts:
            raise APIError(
                421,
                f"Host: expected one of {list(self._hosts)}, as the server has no key, found {host[:80]!r}",
                code="wrong_host",
            )

    def _check_key(self, headers: dict[str, bytes]) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", b"").partition(b" ")
        # In a time that does not depend on how much of the key is right.
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise APIError(
                401, "expected the API key of this server as a bearer token", code="invalid_api_key"
            )

    async def _with_body(self, receive: Any, headers: dict[str, bytes]) -> Any:
        """Read the body, and return what gives it again."""
        largest = self._limits.max_body_bytes
        declared = headers.get("content-length", b"0")
        if declared.isdigit() and int(declared) > largest:
            raise body_too_large(largest)
        body, is_whole = bytearray(), False
        deadline = asyncio.get_running_loop().time() + self._limits.read_seconds
        while not is_whole:
            message = await next_message(receive, deadline)
            if message["type"] == "http.disconnect":
                raise _Disconnected
            body += message.get("body", b"")
            if len(body) > largest:
                raise body_too_large(largest)
            is_whole = not message.get("more_body", False)
        first: list[Any] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Any:
            return first.pop() if first else await receive()

        return again


class _Disconnected(Exception):
    """The client went away before its request was complete."""


async def next_message(receive: Any, deadline: float) -> Any:
    """The next message from a client.

    Raises:
        APIError: If it does not come before the deadline, by the clock of the event loop.
    """
    try:
        return await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
    except asyncio.TimeoutError:
        raise APIError(408, "expected the whole request in time, found part of it") from None


def body_too_large(largest: int) -> APIError:
    """The request has more bytes than the server takes."""
    return APIError(413, f"expected a body of at most {largest} bytes, found more", code="body_too_large")


def _has_body(headers: dict[str, bytes]) -> bool:
    return headers.get("content-length", b"0") != b"0" or "transfer-encoding" in headers


async def _send(error: APIError, send: Any, *, has_body: bool) -> None:
    """Answer with an error before the body was read, so that nothing else can come over this connection."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": _JSON, "content-length": str(len(body)), **error.headers}
    if has_body:
        headers["connection"] = "close"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

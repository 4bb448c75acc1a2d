"""Errors in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MOST_SHOWN = 80


class ClientGone(Exception):
    """The client has disconnected: `status` is what servers log then, and never sent."""

    status = 499


class APIError(Exception):
    """An error response with the HTTP status, and `type` (the `kind`), `param` and `code` in the body.

    `retry` says whether the same request may succeed later. OpenAI's clients retry after some statuses unless
    told not to. `allow` are the methods of the route, for status 405.

    Example:
        >>> APIError(404, "no such thing", code="not_found").body
        {'error': {'message': 'no such thing', 'type': 'invalid_request_error', 'param': None, \
'code': 'not_found'}}
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
        allow: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry, self.allow = param, code, retry, allow

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers about retries, the connection, authentication and methods."""
        headers = {"x-should-retry": "true" if self.retry else "false"}
        if self.retry:
            headers["retry-after"] = "1"
        if self.status in (408, 413):
            # The rest of the body has not been read, so the connection cannot be reused.
            headers["connection"] = "close"
        if self.allow:
            headers["allow"] = ", ".join(self.allow)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def shown(value: Any) -> str:
    """A value of a request for an error message: its beginning, as it may be megabytes.

    Example:
        >>> shown("slot"), len(shown("slot" * 100))
        ("'slot'", 83)
    """
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> APIError:
    """The error for an invalid request."""
    return APIError(400, message, param=param, code=code)


def bad_field(place: str, message: str, *, code: str | None = None) -> APIError:
    """The error for an invalid field of a request, or a place in it such as `messages.0.content`."""
    return bad_request(f"{place}: {message}", param=place.partition(".")[0], code=code)


def shutting_down() -> APIError:
    """The error for requests during shutdown."""
    return APIError(503, "the server is shutting down", kind="server_error", code="shutting_down", retry=True)


def timed_out(seconds: float) -> APIError:
    """The error for an answer that took longer than the limit of a server."""
    message = f"the answer was not complete after {seconds:g} seconds, the limit of this server"
    return APIError(504, message, kind="server_error", code="timeout")


def not_stored() -> APIError:
    """The error for an upload that the server's disk has no room for; its cause is logged."""
    message = "the server could not store the upload, see its log"
    return APIError(500, message, kind="server_error", code="upload_not_stored")


def failed() -> APIError:
    """The error for a bug in the server; its cause is logged and not sent to the client."""
    return APIError(500, "the server failed, see its log", kind="server_error", code="internal_error")

"""Refusals in the form that OpenAI's clients know."""

from __future__ import annotations

from typing import Any


class ClientGone(Exception):
    """Nobody is there to read an answer."""


class APIError(Exception):
    """An answer other than the one that was asked for.

    Args:
        status: HTTP status.
        message: What was expected and what was found.
        kind: `type` in the body.
        param: The field of the request that it is about.
        code: A name for programs.
        retry: Whether the same request may succeed later. OpenAI's clients repeat requests after some
            statuses by themselves unless they are told not to.

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
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry = param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say whether to try again, and how."""
        headers = {"x-should-retry": "true" if self.retry else "false"}
        if self.retry:
            headers["retry-after"] = "1"
        if self.status in (408, 413):
            # The rest of the body has not been read, so nothing else can come over this connection.
            headers["connection"] = "close"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> APIError:
    """The request cannot be answered as it is."""
    return APIError(400, message, param=param, code=code)


def bad_field(param: str, message: str, *, code: str | None = None) -> APIError:
    """The request cannot be answered because of one of its fields."""
    return bad_request(f"{param}: {message}", param=param, code=code)


def shutting_down() -> APIError:
    """The server ends."""
    return APIError(503, "the server is shutting down", kind="server_error", code="shutting_down", retry=True)


def failed() -> APIError:
    """A fault of ours; what it is goes to the log and not to the client."""
    return APIError(500, "the server failed, see its log", kind="server_error", code="internal_error")

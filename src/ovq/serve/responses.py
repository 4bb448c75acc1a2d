"""Responses: errors, and an event stream that always cleans up when the client disconnects."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse

from ovq.serve.errors import APIError


def error_response(error: APIError) -> JSONResponse:
    """The HTTP response for an error."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class EventStream(StreamingResponse):
    """Sends server-sent events, which end when the client disconnects. `close` is called in any case."""

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        # So that proxies such as nginx do not buffer events.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send until the events end; starlette's own method would consume messages that `events` needs."""
        try:
            async with contextlib.aclosing(self._events):
                try:
                    await self.stream_response(send)
                except APIError as error:
                    # Its event has been sent, after another status, so the metrics find its own here.
                    scope["failed_with"] = error.status
                    await send({"type": "http.response.body"})
        except OSError:
            # Some servers raise this when the client has disconnected.
            return
        finally:
            # A generator that never started does not run its own cleanup.
            self._close()

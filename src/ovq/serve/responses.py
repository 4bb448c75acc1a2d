"""Responses: errors, and a stream of events that ends its work whenever, and however, the client goes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse

from ovq.serve.errors import APIError


def error_response(error: APIError) -> JSONResponse:
    """The answer that says what was wrong."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class EventStream(StreamingResponse):
    """Sends server-sent events as they come.

    Args:
        events: What to send. They end by themselves when the client has gone.
        close: Is called at the end, whatever it is.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        # Proxies such as nginx would collect events before they pass them on.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send until the events end; starlette's own method would take messages that the events wait for."""
        try:
            async with contextlib.aclosing(self._events):
                await self.stream_response(send)
        except OSError:
            # How some servers say that the client has gone.
            return
        finally:
            # A generator that never began has no end of its own.
            self._close()

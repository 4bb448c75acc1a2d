"""A response of server-sent events that ends its work whenever, and however, the client goes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: What to send.
        close: Is called at the end, whatever it is.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        # Proxies such as nginx would collect events before they pass them on.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        # The length of a stream is not known.
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send until the events end; they end by themselves when the client has gone."""
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            # How some servers say that the client has gone.
            return
        finally:
            # A generator that never began has no end of its own.
            self._close()

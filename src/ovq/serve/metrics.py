"""Metrics of a server in the format of Prometheus."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ovq.serve.answers import Piece
from ovq.serve.contexts import Contexts
from ovq.serve.engine import Engine
from ovq.serve.errors import ClientGone

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics(Collector):
    """The metrics of one server."""

    def __init__(self, engine: Engine, contexts: Contexts) -> None:
        self._engine, self._contexts = engine, contexts
        # A registry of its own: servers and tests in one process must not share numbers.
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "ovq_requests",
            "Requests by route and status, of a stream the one it ended with; 499: the client went away.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "ovq_request_seconds",
            "Time until a request was answered completely.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "ovq_first_token_seconds",
            "Time until the first token of an answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """All metrics that are not counted by requests."""
        scheduler = self._engine.scheduler
        counts = scheduler.counts
        for name, text, count in (
            ("prompt_tokens", "Tokens of prompts and documents read.", counts.prompt_tokens),
            (
                "known_tokens",
                "Tokens of prompts not read, as a state after them was cached.",
                counts.known_tokens,
            ),
            ("prefixes_evicted", "States of prefixes dropped to make room.", scheduler.prefixes.num_evicted),
            ("generated_tokens", "Tokens generated.", counts.generated_tokens),
            ("steps", "Steps in which running answers grew by a token.", counts.steps),
            ("answers_finished", "Answers that were completed.", counts.finished),
            (
                "jobs_cancelled",
                "Prompts and documents given up, as their clients disconnected or time was up.",
                counts.cancelled,
            ),
            ("jobs_failed", "Prompts and documents that an error ended.", counts.failed),
        ):
            yield CounterMetricFamily(f"ovq_{name}", text, value=count)
        for name, text, value in (
            ("rows_running", "Answers that are being generated or begun.", scheduler.num_rows),
            ("jobs_waiting", "Prompts and documents that wait for their turn.", self._engine.num_waiting),
            ("state_bytes", "Bytes of the memories of running answers.", scheduler.state_bytes),
            ("prefixes", "States of prefixes kept.", len(scheduler.prefixes)),
            ("prefix_bytes", "Bytes of states of prefixes kept.", scheduler.prefixes.nbytes),
            ("contexts", "Contexts kept.", len(self._contexts)),
            ("context_bytes", "Bytes of the memories of contexts.", self._contexts.nbytes),
        ):
            yield GaugeMetricFamily(f"ovq_{name}", text, value=value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    async def timed(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """Pass pieces on, and record the time until the first one."""
        start, is_first = time.monotonic(), True
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if is_first:
                    self._first_token.observe(time.monotonic() - start)
                    is_first = False
                yield piece


class Metered:
    """An ASGI middleware that counts requests, including refused ones."""

    def __init__(self, app: Any, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, is_complete = time.monotonic(), ClientGone.status, False

        async def send_and_note_status(message: Any) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                is_complete = not message.get("more_body", False)
            await send(message)

        async def receive_and_note_end() -> Any:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect" and not is_complete:
                # A stream has begun with another one.
                status = ClientGone.status
            return message

        try:
            await self._app(scope, receive_and_note_end, send_and_note_status)
        except Exception:
            status = 500
            raise
        finally:
            # The declared path, as names of contexts would make unboundedly many labels.
            route = getattr(scope.get("route"), "path", "other")
            # An `EventStream` that an error ended had begun with the status 200.
            self._metrics.request(route, scope.get("failed_with", status), time.monotonic() - start)

"""The answers to a request as a stream of pieces, until completion, client disconnect or timeout."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from ovq.hf.streaming import TextStream
from ovq.serve.engine import Engine
from ovq.serve.errors import APIError, ClientGone, bad_request, failed, timed_out
from ovq.serve.grammars import GrammarFault
from ovq.serve.jobs import BeginEvent, Event, FailEvent, Generation, Job, TokenEvent
from ovq.serve.texts import StopSequences, Texts
from ovq.serve.tools import ToolCall, ToolCalls

_log = logging.getLogger("ovq.serve")

Receive = Callable[[], Awaitable[Any]]
"""ASGI's function that returns the next message from the client."""


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """The next part of an answer.

    Attributes:
        text: Text, maybe empty: a character may need more tokens, and a stop sequence may have begun.
        events: The tokens of the piece; none at the end.
        finish_reason: In the last piece of an answer `"stop"`, `"tool_calls"` or `"length"`; else None.
        calls: Tool calls that this piece completes.
    """

    choice: int
    text: str
    events: Sequence[TokenEvent] = ()
    finish_reason: str | None = None
    calls: Sequence[ToolCall] = ()

    @staticmethod
    def joined(pieces: Sequence[Piece]) -> Piece:
        """One piece from all pieces of an answer."""
        return dataclasses.replace(
            pieces[-1],
            text="".join(piece.text for piece in pieces),
            events=[event for piece in pieces for event in piece.events],
            calls=[call for piece in pieces for call in piece.calls],
        )


@dataclasses.dataclass
class Usage:
    """Token counts of a request: `context_tokens` are of the document read before its prompts, once for all
    requests, and `known_tokens` are prompt tokens that were not read, as a state after them was cached."""

    prompt_tokens: int = 0
    context_tokens: int = 0
    completion_tokens: int = 0
    known_tokens: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """The usage object of the API; `context_tokens` is our addition."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.known_tokens},
            "context_tokens": self.context_tokens,
        }


class Answers:
    """The jobs of one request, from submission to the last event.

    Closing `events` cancels incomplete jobs, so no row is computed for a client that has disconnected.

    `receive` reports when the client disconnects; `deadline` is by the clock of the event loop.
    """

    def __init__(self, engine: Engine, receive: Receive, deadline: float) -> None:
        self._engine, self._receive, self._deadline = engine, receive, deadline
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._end: Exception | None = None
        self._jobs: Sequence[Job] = ()

    def deliver(self, events: list[Event]) -> None:
        """Pass events from the engine's thread to the event loop."""
        # The loop may have ended before the engine.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, events)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit the jobs to the engine; see `Engine.submit`."""
        self._engine.submit(jobs)
        self._jobs = jobs

    async def events(self) -> AsyncGenerator[Event, None]:
        """The events of all jobs; never ends, as the caller knows which event is the last.

        Raises:
            APIError: If a job failed, or the deadline has passed.
            ClientGone: If the client has disconnected.
        """
        timeout = timed_out(self._engine.limits.request_seconds)
        timer = self._loop.call_at(self._deadline, self._finish, timeout)
        disconnect = asyncio.create_task(self._await_disconnect())
        try:
            while True:
                for event in await self._queue.get():
                    # Ahead of queued events, which nobody is going to read.
                    if self._end is not None:
                        raise self._end
                    if isinstance(event, FailEvent):
                        raise _as_api_error(event.error)
                    yield event
        finally:
            timer.cancel()
            disconnect.cancel()
            self.cancel()

    def cancel(self, *, choice: int | None = None) -> None:
        """Cancel the jobs, or only the answer `choice`."""
        for job in self._jobs:
            self._engine.cancel(job, choice=choice)

    async def _await_disconnect(self) -> None:
        await disconnected(self._receive)
        self._finish(ClientGone())

    def _finish(self, reason: Exception) -> None:
        self._end = self._end or reason
        # Wakes `events`.
        self._queue.put_nowait([FailEvent(error=reason)])


class _Answer:
    """One answer while it is generated: its text, up to a stop sequence, and its tool calls."""

    def __init__(self, choice: int, stream: TextStream, stops: Sequence[str], calls: ToolCalls) -> None:
        self._choice, self._stream, self._stop, self._calls = choice, stream, StopSequences(stops), calls

    def push(self, event: TokenEvent) -> Piece:
        """The piece for one more token."""
        text = self._stop.push("" if event.is_end else self._stream.push(event.token))
        return self._piece(text, [event], None)

    def finish(self, reason: str) -> Piece:
        """The last piece."""
        text = self._stop.push(self._stream.finish()) + self._stop.finish()
        return self._piece(text, [], reason)

    def _piece(self, text: str, events: Sequence[TokenEvent], reason: str | None) -> Piece:
        reason = "stop" if self._stop.is_stopped else reason
        text, calls = self._calls.push(text)
        if reason is not None:
            more, last = self._calls.finish()
            text, calls = text + more, calls + last
        elif self._calls.is_complete:
            reason = "stop"
        if reason == "stop" and self._calls.num_calls:
            reason = "tool_calls"
        return Piece(choice=self._choice, text=text, events=events, finish_reason=reason, calls=calls)


async def pieces(
    answers: Answers,
    jobs: Sequence[Generation],
    texts: Texts,
    stops: Sequence[str],
    usage: Usage,
    make_calls: Callable[[], ToolCalls] = ToolCalls,
) -> AsyncGenerator[Piece, None]:
    """The answers to submitted jobs, as pieces of text; errors as of `Answers.events`.

    Args:
        answers: Source of the events.
        jobs: The jobs that were submitted to `answers`.
        texts: Decodes tokens.
        stops: Stop sequences; they are not part of the answer.
        usage: Its counts are updated.
        make_calls: Makes the parser of tool calls for an answer; by default there are no tools.
    """
    unfinished = {
        choice: _Answer(choice, texts.stream(job.tokens), stops, make_calls())
        for job in jobs
        for choice in job.choices
    }
    async with contextlib.aclosing(answers.events()) as events:
        async for event in events:
            if isinstance(event, BeginEvent):
                usage.known_tokens += event.num_known
            elif isinstance(event, TokenEvent) and event.choice in unfinished:
                usage.completion_tokens += 1
                answer = unfinished[event.choice]
                piece = answer.push(event)
                yield piece
                if piece.finish_reason is not None:
                    answers.cancel(choice=event.choice)
                elif event.finish_reason is not None:
                    yield answer.finish(event.finish_reason)
                else:
                    continue
                del unfinished[event.choice]
            if not unfinished:
                return


def _as_api_error(error: Exception) -> APIError:
    if isinstance(error, APIError):
        return error
    if isinstance(error, GrammarFault):
        return bad_request(
            f"expected a schema that answers can be kept to, found one that is too much for it ({error})",
            code="invalid_json_schema",
        )
    _log.error("a request failed", exc_info=error)
    return failed()

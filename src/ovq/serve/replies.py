"""Answers as OpenAI's objects: complete, or as server-sent events."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ovq.serve.answers import ClientGone, Piece, Usage
from ovq.serve.errors import APIError
from ovq.serve.jobs import TokenEvent, TokenLogprobs
from ovq.serve.texts import Offsets, Texts
from ovq.serve.tools import ToolCall


class CompletionForm:
    """The objects of `/v1/completions`."""

    param, prefix, whole_object, chunk_object = "prompt", "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._offsets: dict[int, Offsets] = defaultdict(lambda: Offsets(texts))

    def first(self, choice: int) -> None:
        """None: there is no chunk before the text."""
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A choice in a chunk, or, from the joined pieces, in a complete answer."""
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    whole = chunk

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not (found := _with_logprobs(piece)):
            return None
        text = self._texts.token_text
        return {
            "tokens": [text(event.token) for event, _ in found],
            "token_logprobs": [logprobs.logprob for _, logprobs in found],
            # Parts of characters have the same text; the most likely one wins.
            "top_logprobs": [
                {text(token): logprob for token, logprob in reversed(logprobs.top)} for _, logprobs in found
            ],
            "text_offset": [self._offsets[piece.choice].push(event.token) for event, _ in found],
        }


class ChatForm:
    """The objects of `/v1/chat/completions`."""

    param, prefix = "messages", "chatcmpl"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def first(self, choice: int) -> dict[str, Any]:
        """The choice in the chunk before the text."""
        return self._choice(Piece(choice=choice, text=""), delta={"role": "assistant", "content": ""})

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A choice in a chunk."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in piece.calls]
        return self._choice(piece, delta=delta)

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A choice in a complete answer, from the joined pieces."""
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.calls:
            message |= {"content": piece.text or None, "tool_calls": [_call(call) for call in piece.calls]}
        return self._choice(piece, message=message)

    def _choice(self, piece: Piece, **said: Any) -> dict[str, Any]:
        logprobs = self._logprobs(piece)
        return {"index": piece.choice, **said, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        def one(token: int, logprob: float, *, is_end: bool = False) -> dict[str, Any]:
            # The joined bytes are the text, to which an end token adds nothing.
            found = b"" if is_end else self._texts.token_bytes(token)
            return {"token": self._texts.token_text(token), "logprob": logprob, "bytes": list(found)}

        content = [
            one(event.token, logprobs.logprob, is_end=event.is_end)
            | {"top_logprobs": [one(token, logprob) for token, logprob in logprobs.top]}
            for event, logprobs in _with_logprobs(piece)
        ]
        return {"content": content, "refusal": None} if content else None


Form = CompletionForm | ChatForm
"""The objects of an endpoint."""


def _with_logprobs(piece: Piece) -> list[tuple[TokenEvent, TokenLogprobs]]:
    return [(event, event.logprobs) for event in piece.events if event.logprobs is not None]


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


async def whole(
    pieces: AsyncGenerator[Piece, None], form: Form, choices: Sequence[int], usage: Usage, *, model: str
) -> dict[str, Any]:
    """The complete answer to a request, from all pieces of all its `choices`."""
    by_choice: dict[int, list[Piece]] = defaultdict(list)
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            by_choice[piece.choice].append(piece)
    return _head(form.prefix, form.whole_object, model) | {
        "choices": [form.whole(Piece.joined(by_choice[choice])) for choice in choices],
        "usage": usage.fields,
    }


async def stream(
    pieces: AsyncGenerator[Piece, None],
    form: Form,
    choices: Sequence[int],
    usage: Usage,
    *,
    model: str,
    includes_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events. An APIError is the last of them, and is then raised.

    `includes_usage` adds a last chunk with the token counts.
    """
    head = _head(form.prefix, form.chunk_object, model)
    # As OpenAI does: null in all chunks but the last, if usage is requested.
    tail: dict[str, Any] = {"usage": None} if includes_usage else {}
    try:
        for choice in choices:
            if (first := form.first(choice)) is not None:
                yield _event(head | {"choices": [first]} | tail)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                # The reason comes by itself, as OpenAI's: to clients, what comes with it is no longer part of
                # the answer. Theirs would not say that a call is complete.
                chunk = form.chunk(piece) | {"finish_reason": None}
                if piece.text or piece.calls or chunk["logprobs"]:
                    yield _event(head | {"choices": [chunk]} | tail)
                if piece.finish_reason is not None:
                    last = Piece(choice=piece.choice, text="", finish_reason=piece.finish_reason)
                    yield _event(head | {"choices": [form.chunk(last)]} | tail)
    except APIError as error:
        yield _event(error.body)
        raise
    except ClientGone:
        return
    if includes_usage:
        yield _event(head | {"choices": [], "usage": usage.fields})
    yield b"data: [DONE]\n\n"


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def _event(content: dict[str, Any]) -> bytes:
    # Without newlines, which would end an event, and in ASCII, which no proxy can corrupt.
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()

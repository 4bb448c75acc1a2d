"""Answers in the form of OpenAI's objects: whole, or as server-sent events."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from ovq.serve.answers import ClientGone, Piece, Usage
from ovq.serve.errors import APIError
from ovq.serve.jobs import TokenEvent
from ovq.serve.texts import Offsets, Texts
from ovq.serve.tools import ToolCall


class Form(Protocol):
    """How the objects of an endpoint look."""

    prefix: str
    whole_object: str
    chunk_object: str

    def first(self, choice: int) -> dict[str, Any] | None:
        """The choice in a chunk before all text, if there is one."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A choice in a chunk."""

    def whole(
        self, choice: int, text: str, events: Sequence[TokenEvent], reason: str, calls: Sequence[ToolCall]
    ) -> dict[str, Any]:
        """A choice in a complete answer."""


class CompletionForm:
    """The objects of `/v1/completions`.

    Args:
        texts: Makes text of tokens.
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._offsets: dict[int, Offsets] = defaultdict(lambda: Offsets(texts))

    def first(self, choice: int) -> None:
        """See `Form.first`."""
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """See `Form.chunk`."""
        return self._choice(piece.choice, piece.text, piece.events, piece.finish_reason)

    def whole(
        self, choice: int, text: str, events: Sequence[TokenEvent], reason: str, calls: Sequence[ToolCall]
    ) -> dict[str, Any]:
        """See `Form.whole`."""
        return self._choice(choice, text, events, reason)

    def _choice(
        self, index: int, text: str, events: Sequence[TokenEvent], reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, events)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, choice: int, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        found: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for event in events:
            if event.logprobs is None:
                continue
            found["tokens"].append(self._texts.token_text(event.token))
            found["token_logprobs"].append(event.logprobs.logprob)
            # Parts of characters have the same text; then the likeliest counts.
            top = [(self._texts.token_text(token), logprob) for token, logprob in event.logprobs.top]
            found["top_logprobs"].append(dict(reversed(top)))
            found["text_offset"].append(self._offsets[choice].push(event.token))
        return found if found["tokens"] else None


class ChatForm:
    """The objects of `/v1/chat/completions`.

    Args:
        texts: Makes text of tokens.
    """

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def first(self, choice: int) -> dict[str, Any]:
        """See `Form.first`."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """See `Form.chunk`."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in piece.calls]
        return {
            "index": piece.choice,
            "delta": delta,
            "logprobs": self._logprobs(piece.events),
            "finish_reason": piece.finish_reason,
        }

    def whole(
        self, choice: int, text: str, events: Sequence[TokenEvent], reason: str, calls: Sequence[ToolCall]
    ) -> dict[str, Any]:
        """See `Form.whole`."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        return {
            "index": choice,
            "message": message,
            "logprobs": self._logprobs(events),
            "finish_reason": reason,
        }

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        def one(token: int, logprob: float, *, is_end: bool = False) -> dict[str, Any]:
            # Joined, the bytes are the text, to which a token that ends it adds nothing.
            found = b"" if is_end else self._texts.token_bytes(token)
            return {"token": self._texts.token_text(token), "logprob": logprob, "bytes": list(found)}

        content = [
            one(event.token, event.logprobs.logprob, is_end=event.is_end)
            | {"top_logprobs": [one(token, logprob) for token, logprob in event.logprobs.top]}
            for event in events
            if event.logprobs is not None
        ]
        return {"content": content, "refusal": None} if content else None


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


async def whole(
    found: AsyncGenerator[Piece, None], form: Form, choices: Sequence[int], usage: Usage, *, model: str
) -> dict[str, Any]:
    """The complete answer, once all its pieces are there.

    Args:
        found: The pieces.
        form: How the object looks.
        choices: The names of all answers.
        usage: What the pieces are counted in.
        model: The name of the model.
    """
    texts: dict[int, list[str]] = defaultdict(list)
    events: dict[int, list[TokenEvent]] = defaultdict(list)
    calls: dict[int, list[ToolCall]] = defaultdict(list)
    reasons: dict[int, str] = {}
    async with contextlib.aclosing(found):
        async for piece in found:
            texts[piece.choice].append(piece.text)
            calls[piece.choice] += piece.calls
            events[piece.choice] += piece.events
            if piece.finish_reason is not None:
                reasons[piece.choice] = piece.finish_reason
    return _head(form.prefix, form.whole_object, model) | {
        "choices": [form.whole(c, "".join(texts[c]), events[c], reasons[c], calls[c]) for c in choices],
        "usage": usage.fields,
    }


async def stream(
    found: AsyncGenerator[Piece, None],
    form: Form,
    choices: Sequence[int],
    usage: Usage,
    *,
    model: str,
    includes_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, which may end with an error in their middle.

    Arguments are those of `whole`; `includes_usage` adds a last chunk with the numbers of tokens.
    """
    head = _head(form.prefix, form.chunk_object, model)
    # As OpenAI does: null in all chunks but the last, if the numbers are asked for.
    tail: dict[str, Any] = {"usage": None} if includes_usage else {}
    try:
        for choice in choices:
            if (first := form.first(choice)) is not None:
                yield _event(head | {"choices": [first]} | tail)
        async with contextlib.aclosing(found):
            async for piece in found:
                chunk = form.chunk(piece)
                if piece.text or piece.calls or piece.finish_reason or chunk["logprobs"]:
                    yield _event(head | {"choices": [chunk]} | tail)
    except APIError as error:
        yield _event(error.body)
        return
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
    # Without the newlines that would end an event, and in ASCII, which no proxy can spoil.
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()

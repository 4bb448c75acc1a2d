"""Encoding and decoding of text, and stop sequences in a model's output."""

from __future__ import annotations

import codecs
import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from ovq.byte_tokens import token_bytes
from ovq.hf.streaming import TextStream
from ovq.prompts import chat_text, check_chat_template, check_ids, document_ids, encode, ids_after
from ovq.serve.errors import bad_request
from ovq.serve.tools import match_start, tools_as_text

LONG = 2**16
"""Characters above which the texts of a request are long: megabytes take a tokenizer seconds."""


class Offsets:
    """Character offsets of the tokens of an answer in its text.

    Example:
        >>> offsets = Offsets(Texts(None, vocab_size=50))
        >>> [offsets.push(token) for token in (12, 7, 33)]
        [0, 3, 5]
    """

    def __init__(self, texts: Texts) -> None:
        self._texts, self._decoder = texts, codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def push(self, token: int) -> int:
        """Offset of the next token; for a part of a character, offset of the character."""
        begin = self._length + (len(self._texts.separator) if self._length else 0)
        held, added = self._decoder.getstate()[0], self._texts.token_bytes(token)
        self._length = begin + len(self._decoder.decode(added))
        try:
            codecs.utf_8_decode(held + added[:1])
        except UnicodeDecodeError:
            # The token begins after what replaces the bytes held: one character, or one for each half.
            return begin + len(held.decode("utf-8", "replace"))
        return begin


class Texts:
    """Thread-safe tokenizer of a model; without one, text is token ids: `"12 7 33"`.

    Example:
        >>> Texts(None, vocab_size=50).encode("12 7", param="prompt", is_start=True)
        [12, 7]
    """

    def __init__(self, tokenizer: Any | None, *, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        # transformers' tokenizers cannot encode in two threads at a time.
        self._lock, self._lock_of_long = threading.Lock(), threading.Lock()
        self._bytes: dict[int, bytes] = {}

    @property
    def separator(self) -> str:
        """Separator between tokens: a space in a text of ids, else empty."""
        return " " if self._tokenizer is None else ""

    @cached_property
    def _has_tools_in_template(self) -> bool:
        """Whether the chat template supports tools."""
        message = {"role": "user", "content": "a"}
        tool = {"type": "function", "function": {"name": "b", "description": "c", "parameters": {}}}
        try:
            with_tool, without = (
                chat_text([message], self._tokenizer, name="messages", tools=tools) for tools in ([tool], [])
            )
        except ValueError:
            return False
        return with_tool != without

    @cached_property
    def _tokenizer_of_long(self) -> Any:
        with self._lock:
            return copy.deepcopy(self._tokenizer)

    @contextlib.contextmanager
    def locked(self, *, is_long: bool = False) -> Iterator[Any]:
        """The tokenizer, for one thread at a time; for long texts another, so that others do not wait."""
        with self._lock_of_long if is_long else self._lock:
            yield self._tokenizer_of_long if is_long else self._tokenizer

    def encode(
        self, text: str | list[int], *, param: str, is_start: bool, is_long: bool = False
    ) -> list[int]:
        """The tokens of a text, which may be token ids; see `ovq.prompts.encode`. `is_long`: see `locked`.

        Raises:
            APIError: If there is no token, or one outside the vocabulary; names the field `param`.
        """
        about: dict[str, Any] = {"vocab_size": self._vocab_size, "name": param}
        with _as_api_errors(param):
            if not isinstance(text, str):
                check_ids(text, **about)
                return text
            with self.locked(is_long=is_long) as tokenizer:
                return encode(text, tokenizer, is_start=is_start, **about)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        *,
        read: Sequence[int] = (),
        is_long: bool = False,
    ) -> list[int]:
        """The tokens of a chat prompt, rendered by the model's chat template up to the start of the answer.

        Args:
            messages: Messages in the form of chat templates.
            tools: Tools that the model may call. A template without support for tools gets them as text,
                like all calls and results in the messages (`ovq.serve.tools.tools_as_text`).
            read: Tokens of the prompt that a context has read, which are left out.
            is_long: See `locked`.

        Raises:
            APIError: If there is no template, it refuses these messages, or they do not follow `read`.
        """
        with _as_api_errors("messages", code="no_chat_template", hint=": use /v1/completions"):
            check_chat_template(self._tokenizer, name="messages")
        has_tools = tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
        if has_tools and not self._has_tools_in_template:
            messages, tools = tools_as_text(messages, tools), ()
        with _as_api_errors("messages"):
            text = chat_text(messages, self._tokenizer, name="messages", tools=tools)
        # The template has marked the beginning of the text.
        ids = self.encode(text, param="messages", is_start=False, is_long=is_long)
        with _as_api_errors("messages"):
            return ids_after(read, ids, name="messages")

    def document(self, text: str, *, is_long: bool = False) -> tuple[list[int], list[dict[str, str]]]:
        """The tokens of a document before a chat, and its messages; see `ovq.prompts.document_ids`.

        `is_long`: see `locked`.

        Raises:
            APIError: If there is no chat template, or no token.
        """
        with _as_api_errors("chat", code="no_chat_template"):
            check_chat_template(self._tokenizer, name="chat")
        with _as_api_errors("text"), self.locked(is_long=is_long) as tokenizer:
            return document_ids(text, tokenizer, vocab_size=self._vocab_size, name="text")

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """An incremental decoder for the tokens that follow a prompt."""
        return TextStream(self._tokenizer, prompt=prompt)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; empty for a special token."""
        if self._tokenizer is None:
            return str(token).encode()
        # Answers with logprobs ask for many tokens at each step.
        if token not in self._bytes:
            self._bytes[token] = token_bytes(self._tokenizer, token)
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """The text of a token: replacement characters for parts of characters, names of special tokens."""
        text = self.token_bytes(token).decode(errors="replace")
        return text or self._tokenizer.decode([token])  # type: ignore[union-attr]  # ids have a text


@contextlib.contextmanager
def _as_api_errors(param: str, *, code: str | None = None, hint: str = "") -> Iterator[None]:
    """Context manager that turns a ValueError about a field of a request into an APIError."""
    try:
        yield
    except ValueError as error:
        raise bad_request(f"{error}{hint}", param=param, code=code) from error


class StopSequences:
    """Passes text up to the first stop sequence, and holds back what may become one.

    Example:
        >>> stops = StopSequences(["end"])
        >>> stops.push("the e"), stops.push("ve"), stops.push(" is the e"), stops.push("nd of")
        ('the ', 'ev', 'e is the ', '')
        >>> stops.is_stopped
        True
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        # None of them is empty.
        self._sequences, self._held = sequences, ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown after `text` was added."""
        if self.is_stopped:
            return ""
        whole = self._held + text
        if places := [place for sequence in self._sequences if (place := whole.find(sequence)) >= 0]:
            self.is_stopped, self._held = True, ""
            return whole[: min(places)]
        end = match_start(whole, self._sequences)
        self._held = whole[end:]
        return whole[:end]

    def finish(self) -> str:
        """The text held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

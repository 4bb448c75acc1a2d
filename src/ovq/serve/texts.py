"""Encoding and decoding of text, and stop sequences in a model's output."""

from __future__ import annotations

import codecs
import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from ovq.byte_tokens import token_bytes
from ovq.hf.streaming import IdStream, TextStream
from ovq.serve.errors import bad_field
from ovq.serve.tools import begun, told_in_text

AnyTextStream = IdStream | TextStream
"""The text of tokens that arrive one by one."""


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
        self._length = begin + len(self._decoder.decode(self._texts.token_bytes(token)))
        return begin


class Texts:
    """Thread-safe tokenizer of a model; without one, text is token ids: `"12 7 33"`.

    Args:
        tokenizer: A tokenizer of transformers, or None.
        vocab_size: Token ids must be smaller.

    Example:
        >>> Texts(None, vocab_size=50).encode("12 7", param="prompt", is_start=True)
        [12, 7]
    """

    def __init__(self, tokenizer: Any | None, *, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        # transformers' tokenizers cannot encode in two threads at a time.
        self._lock = threading.Lock()

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
            return self._rendered([message], []) != self._rendered([message], [tool])
        except Exception:
            # Templates are programs that may raise any exception.
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[Any]:
        """The tokenizer, for one thread at a time."""
        with self._lock:
            yield self._tokenizer

    def encode(self, text: str, *, param: str, is_start: bool) -> list[int]:
        """The tokens of a text.

        Args:
            text: The text.
            param: The field of the request that it comes from, for errors.
            is_start: Whether a text begins here, so that the tokenizer marks its beginning.

        Raises:
            APIError: If there is no token, or one outside the vocabulary.
        """
        if self._tokenizer is None:
            words = text.split()
            if not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
                wanted = "expected token ids such as '12 7 33' (the model has no tokenizer)"
                raise bad_field(param, f"{wanted}, found {text[:80]!r}")
            return self.checked([int(word) for word in words], param=param)
        with self._lock:
            # Not verbose: models here may read more tokens than the tokenizer's maximum.
            found = self._tokenizer(text, add_special_tokens=is_start, verbose=False)
        return self.checked(found["input_ids"], param=param)

    def checked(self, ids: Sequence[int], *, param: str) -> list[int]:
        """The token ids, as a list.

        Raises:
            APIError: If there is none, or one outside the vocabulary.
        """
        if not ids:
            raise bad_field(param, "expected at least one token, found none")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            found = f"{min(ids)} to {max(ids)}"
            raise bad_field(param, f"expected token ids from 0 to {self._vocab_size - 1}, found {found}")
        return list(ids)

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The tokens of a chat prompt, rendered by the model's chat template up to the start of the answer.

        Args:
            messages: Messages in the form of chat templates.
            tools: Tools that the model may call. A template without support for tools gets them as text,
                like all calls and results in the messages (`ovq.serve.tools.told_in_text`).

        Raises:
            APIError: If there is no template, or it refuses these messages.
        """
        if self._tokenizer is None or not self._tokenizer.chat_template:
            found = "no tokenizer" if self._tokenizer is None else "a tokenizer without one"
            raise bad_field(
                "messages",
                f"expected a model whose tokenizer has a chat template, found {found}: use /v1/completions",
                code="no_chat_template",
            )
        try:
            has_tools = tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
            if has_tools and not self._has_tools_in_template:
                messages, tools = told_in_text(messages, tools), ()
            text = self._rendered(messages, tools)
        except Exception as error:
            # Templates are programs that may raise any exception.
            wanted = "expected what the model's chat template takes"
            raise bad_field("messages", f"{wanted}, found otherwise ({error})") from error
        # The template has marked the beginning of the text.
        return self.encode(text, param="messages", is_start=False)

    def _rendered(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
        )

    def stream(self, prompt: Sequence[int]) -> AnyTextStream:
        """An incremental decoder for the tokens that follow a prompt."""
        return IdStream() if self._tokenizer is None else TextStream(self._tokenizer, prompt=prompt)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; empty for a special token."""
        return str(token).encode() if self._tokenizer is None else token_bytes(self._tokenizer, token)

    def token_text(self, token: int) -> str:
        """The text of a token: replacement characters for parts of characters, names of special tokens."""
        text = self.token_bytes(token).decode(errors="replace")
        return text or self._tokenizer.decode([token])  # type: ignore[union-attr]  # ids have a text


class StopSequences:
    """Passes text up to the first stop sequence, and holds back what may become one.

    Args:
        sequences: The sequences, none of them empty.

    Attributes:
        is_stopped: Whether one of them has occurred.

    Example:
        >>> stops = StopSequences(["end"])
        >>> stops.push("the e"), stops.push("ve"), stops.push(" is the e"), stops.push("nd of")
        ('the ', 'ev', 'e is the ', '')
        >>> stops.is_stopped
        True
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = [sequence for sequence in sequences if sequence]
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown after `text` was added."""
        if self.is_stopped:
            return ""
        whole = self._held + text
        if places := [place for sequence in self._sequences if (place := whole.find(sequence)) >= 0]:
            self.is_stopped, self._held = True, ""
            return whole[: min(places)]
        end = begun(whole, self._sequences)
        self._held = whole[end:]
        return whole[:end]

    def finish(self) -> str:
        """The text held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

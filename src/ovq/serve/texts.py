"""Text to tokens and back, and stop sequences in what a model writes."""

from __future__ import annotations

import codecs
import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

from ovq.hf.byte_tokens import token_bytes
from ovq.hf.streaming import TextStream
from ovq.serve.errors import bad_request
from ovq.serve.tools import told_in_text


class AnyTextStream(Protocol):
    """The text of tokens that arrive one by one."""

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""

    def finish(self) -> str:
        """The text that was held back."""


class IdStream:
    """The stream of a model without tokenizer: ids, with spaces between them.

    Example:
        >>> stream = IdStream()
        >>> stream.push(12), stream.push(7), stream.finish()
        ('12', ' 7', '')
    """

    def __init__(self) -> None:
        self._separator = ""

    def push(self, token: int) -> str:
        """See `AnyTextStream.push`."""
        text, self._separator = f"{self._separator}{token}", " "
        return text

    def finish(self) -> str:
        """See `AnyTextStream.finish`."""
        return ""


class Offsets:
    """Where the tokens of an answer are in its text, in characters.

    Args:
        texts: Makes text of tokens.

    Example:
        >>> offsets = Offsets(Texts(None, vocab_size=50))
        >>> [offsets.push(token) for token in (12, 7, 33)]
        [0, 3, 5]
    """

    def __init__(self, texts: Texts) -> None:
        self._texts, self._decoder = texts, codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def push(self, token: int) -> int:
        """Where the next token begins; where its character does if it is a part of one."""
        begin = self._length + (len(self._texts.separator) if self._length else 0)
        self._length = begin + len(self._decoder.decode(self._texts.token_bytes(token)))
        return begin


class Texts:
    """The tokenizer of a model, for the threads of a server; without one, text is token ids: `"12 7 33"`.

    Args:
        tokenizer: One of transformers, or None.
        vocab_size: Token ids must be smaller.

    Example:
        >>> Texts(None, vocab_size=50).encode("12 7", param="prompt", is_start=True)
        [12, 7]
    """

    def __init__(self, tokenizer: Any | None, *, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        # The tokenizers of transformers refuse to encode in two threads at a time.
        self._lock = threading.Lock()

    @property
    def separator(self) -> str:
        """What is between two tokens, in a text of ids."""
        return " " if self._tokenizer is None else ""

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be turned into a prompt."""
        return self._tokenizer is not None and bool(self._tokenizer.chat_template)

    @cached_property
    def _has_tools_in_template(self) -> bool:
        """Whether the chat template tells a model of tools by itself."""
        message = {"role": "user", "content": "a"}
        tool = {"type": "function", "function": {"name": "b", "description": "c", "parameters": {}}}
        try:
            return self._rendered([message], []) != self._rendered([message], [tool])
        except Exception:
            # Templates are programs, which refuse by any exception.
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
            APIError: If there is no token, or one that the model does not know.
        """
        if self._tokenizer is None:
            words = text.split()
            if not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
                raise bad_request(
                    f"{param}: expected token ids such as '12 7 33' (the model has no tokenizer), "
                    f"found {text[:80]!r}",
                    param=param,
                )
            return self.checked([int(word) for word in words], param=param)
        with self._lock:
            # Not verbose: models here may read more tokens than the tokenizer expects.
            found = self._tokenizer(text, add_special_tokens=is_start, verbose=False)
        return self.checked(found["input_ids"], param=param)

    def checked(self, ids: Sequence[int], *, param: str) -> list[int]:
        """Token ids that came as such, or were made from text.

        Raises:
            APIError: If there is none, or one that the model does not know.
        """
        if not ids:
            raise bad_request(f"{param}: expected at least one token, found none", param=param)
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise bad_request(
                f"{param}: expected token ids from 0 to {self._vocab_size - 1}, "
                f"found {min(ids)} to {max(ids)}",
                param=param,
            )
        return list(ids)

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The prompt that the model's chat template makes of messages, up to where the answer begins.

        Args:
            messages: As templates take them.
            tools: What the model may call. A template that knows no tools gets them as text, with all calls
                and results in the messages (`ovq.serve.tools.told_in_text`).

        Raises:
            APIError: If there is no template, or it refuses these messages.
        """
        if not self.has_chat_template:
            found = "no tokenizer" if self._tokenizer is None else "a tokenizer without one"
            raise bad_request(
                f"messages: expected a model whose tokenizer has a chat template, found {found}: "
                "use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        try:
            has_tools = tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
            if has_tools and not self._has_tools_in_template:
                messages, tools = told_in_text(messages, tools), ()
            text = self._rendered(messages, tools)
        except Exception as error:
            # Templates are programs, which refuse by any exception.
            raise bad_request(
                f"messages: expected what the model's chat template takes, found otherwise ({error})",
                param="messages",
            ) from error
        # A template marks the beginning by itself.
        return self.encode(text, param="messages", is_start=False)

    def _rendered(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
        )

    def stream(self, prompt: Sequence[int]) -> AnyTextStream:
        """The text of the tokens that follow a prompt."""
        return IdStream() if self._tokenizer is None else TextStream(self._tokenizer, prompt=prompt)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text; none if it is a special token."""
        return str(token).encode() if self._tokenizer is None else token_bytes(self._tokenizer, token)

    def token_text(self, token: int) -> str:
        """A token as text; parts of a character are replacement characters, special tokens their names."""
        text = self.token_bytes(token).decode(errors="replace")
        return text or self._tokenizer.decode([token])  # type: ignore[union-attr]  # ids have a text


class StopSequences:
    """Lets text through up to the first of some sequences; what may become one of them is held back.

    Args:
        sequences: The sequences, none of them empty.

    Attributes:
        is_stopped: Whether one of them has come.

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
        """The text that may be shown after more has come."""
        if not self._sequences or self.is_stopped:
            return "" if self.is_stopped else text
        whole = self._held + text
        places = [place for sequence in self._sequences if (place := whole.find(sequence)) >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return whole[: min(places)]
        longest = max(map(len, self._sequences)) - 1
        num_held = next(
            (
                n
                for n in range(min(longest, len(whole)), 0, -1)
                if any(sequence.startswith(whole[-n:]) for sequence in self._sequences)
            ),
            0,
        )
        self._held = whole[len(whole) - num_held :]
        return whole[: len(whole) - num_held]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

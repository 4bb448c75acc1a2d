"""Prompts as token ids: texts, token ids in text, and chats, checked with errors that name their source."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

# Tokenizers join what comes before a message with some of its first characters.
_BEGINNINGS = ("a", "\n\n1", " (")


def encode(
    text: str, tokenizer: Any | None, *, vocab_size: int, name: str, is_start: bool = True
) -> list[int]:
    """The token ids of a text, or in it if there is no tokenizer, checked against the model's vocabulary.

    Args:
        name: The option or field that the text came from, which errors name.
        is_start: Whether a text begins here, so that the tokenizer marks its beginning.

    Example:
        >>> encode("12 7\\n33", None, vocab_size=66, name="--prompt")
        [12, 7, 33]
    """
    if tokenizer is not None:
        # Not verbose: models here may read more tokens than the tokenizer's maximum.
        ids = tokenizer(text, add_special_tokens=is_start, verbose=False)["input_ids"]
    else:
        words = text.split()
        # An id of more digits is in no vocabulary, and Python does not read one of thousands.
        if not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
            raise ValueError(
                f"{name}: expected token ids such as '12 7 33' (the model has no tokenizer), "
                f"found {text[:80]!r}"
            )
        ids = [int(word) for word in words]
    check_ids(ids, vocab_size=vocab_size, name=name)
    return ids


def check_ids(ids: Sequence[int], *, vocab_size: int, name: str) -> None:
    """Raise ValueError, naming the source, if there is no token id, or one outside the vocabulary.

    Example:
        >>> check_ids([3, 8], vocab_size=8, name="prompt")
        Traceback (most recent call last):
        ValueError: prompt: expected token ids from 0 to 7, found 8
    """
    if not ids:
        raise ValueError(f"{name}: expected at least one token, found none")
    for found in (min(ids), max(ids)):
        if not 0 <= found < vocab_size:
            raise ValueError(f"{name}: expected token ids from 0 to {vocab_size - 1}, found {found}")


def check_chat_template(tokenizer: Any | None, *, name: str) -> None:
    """Raise ValueError, naming the source, unless a model's tokenizer has a chat template.

    Example:
        >>> check_chat_template(None, name="--chat")
        Traceback (most recent call last):
        ValueError: --chat: expected a model whose tokenizer has a chat template, found no tokenizer
    """
    if tokenizer is None or not tokenizer.chat_template:
        found = "no tokenizer" if tokenizer is None else "a tokenizer without one"
        raise ValueError(f"{name}: expected a model whose tokenizer has a chat template, found {found}")


def chat_text(
    messages: Sequence[dict[str, Any]], tokenizer: Any, *, name: str, tools: Sequence[dict[str, Any]] = ()
) -> str:
    """The prompt for messages, rendered by the model's chat template up to the start of the answer.

    ValueError, naming the source, if the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # Templates are programs that may raise any exception.
        raise ValueError(
            f"{name}: expected messages that the model's chat template accepts, found others ({error})"
        ) from error


def chat_ids(messages: Sequence[dict[str, Any]], tokenizer: Any, *, vocab_size: int, name: str) -> list[int]:
    """The token ids of `chat_text`; the chat template marks the beginning of the text itself."""
    text = chat_text(messages, tokenizer, name=name)
    return encode(text, tokenizer, vocab_size=vocab_size, name=name, is_start=False)


def ids_after(read: Sequence[int], ids: Sequence[int], *, name: str) -> list[int]:
    """The token ids of a chat that follow those which a context has read of it.

    ValueError, naming the source of the messages, if the chat does not begin with them, or ends there.

    Example:
        >>> ids_after([5, 6], [5, 6, 7], name="--prompt")
        [7]
    """
    if [*ids[: len(read)]] != [*read] or len(ids) == len(read):
        raise ValueError(
            f"{name}: expected messages that go on from those of the context as it read them, found others"
        )
    return [*ids[len(read) :]]


def document_ids(
    text: str, tokenizer: Any, *, vocab_size: int, name: str, system: str | None = None
) -> tuple[list[int], list[dict[str, str]]]:
    """The token ids of a document before a chat, and the messages of the chat that they render.

    The document ends the system message, as models heed it less before all messages (docs/use/convert.md,
    "Chat"). There it stands, without a message, only if a template refuses system messages or moves them
    later, as some of Mistral's do.
    """
    messages = [{"role": "system", "content": text if system is None else f"{system}\n\n{text}"}]
    later = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    chats = [[*messages, {"role": "user", "content": first}] for first in _BEGINNINGS]
    chats.append([*messages, *later, later[0]])
    about: dict[str, Any] = {"vocab_size": vocab_size, "name": name}
    try:
        texts = [chat_text(chat, tokenizer, name=name) for chat in chats]
        same = os.path.commonprefix(texts)  # noqa: RUF071  (of texts, not of paths)
        shared = _shared_ids(texts, same, tokenizer, **about)
    except ValueError:
        same, shared = "", []
    # Most templates render the text as it is; others may change it.
    if text.strip() and text.strip() in same:
        return shared, messages
    alone = encode(text, tokenizer, **about)
    return (shared, messages) if len(shared) >= len(alone) else (alone, [])


def _shared_ids(texts: Sequence[str], same: str, tokenizer: Any, **about: Any) -> list[int]:
    """The token ids with which those of all texts begin; `same` is their beginning, `about` is for `encode`.

    Tokenizers divide texts at special tokens, so what precedes the last one that all texts share is not
    tokenized once per text, but once, and once more to check that the tokens are those of the whole.
    """
    start = same[: max([0, *map(same.rfind, tokenizer.all_special_tokens)])]
    # Some tokenizers make no token of spaces alone.
    start = start if start.strip() else ""
    first = encode(start, tokenizer, is_start=False, **about) if start else []
    rest = [encode(x[len(start) :], tokenizer, is_start=False, **about) for x in texts]
    ids = [first + x for x in rest]
    if start and ids[0] != encode(texts[0], tokenizer, is_start=False, **about):
        ids = [encode(x, tokenizer, is_start=False, **about) for x in texts]
    return [x[0] for x in itertools.takewhile(lambda x: len({*x}) == 1, zip(*ids, strict=False))]


def note_of_chat(messages: list[dict[str, str]], tokens: list[int]) -> str:
    """The note of a context that has read a chat: its messages, and the tokens read of them."""
    return json.dumps({"messages": messages, "tokens": tokens}) if messages else ""


def chat_of_note(
    note: str, *, num_tokens: int, is_chat: bool = True
) -> tuple[list[dict[str, str]], list[int]]:
    """The messages and tokens of `note_of_chat`; empty for a document. `num_tokens`: of the context.

    Notes of any text are allowed beside a document, unless what goes on from it `is_chat`.
    """
    if not note:
        return [], []
    try:
        found = json.loads(note)
        messages = [{name: str(m[name]) for name in ("role", "content")} for m in found["messages"]]
        tokens = [int(token) for token in found["tokens"]]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        problem = f"expected a chat that was saved, found another note ({error!r})"
    else:
        if len(tokens) <= num_tokens:
            return messages, tokens
        problem = f"expected a chat of {num_tokens} tokens at most, found {len(tokens)}"
    if is_chat:
        raise ValueError(problem)
    return [], []

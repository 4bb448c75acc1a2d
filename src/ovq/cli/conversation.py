"""`Conversation`: the messages of a chat, and the states from which the next answer continues.

Each prompt contains all messages, rendered by the chat template. The part that a state has read is not read
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ovq.prompts import chat_ids, chat_of_note, note_of_chat

if TYPE_CHECKING:
    from ovq.hf import Context
    from ovq.hf.cache import StateCache
    from ovq.hf.streaming import Sampling

# States after the prompt and after the answer of the last two turns. Templates may remove reasoning from an
# answer once it is not the last, so that the next turn continues from the state before that answer.
_MOST_STATES = 4

# Tokens of a message read at a time, between which Ctrl-C stops it.
_PIECE = 512


class _State(NamedTuple):
    """A cache that has read the first `num_tokens` tokens of the conversation."""

    num_tokens: int
    cache: StateCache


class Conversation:
    """A chat with a model that has a chat template.

    Args:
        model: an OVQ model or a converted one.
        tokenizer: its tokenizer, which has a chat template.
        max_tokens: most tokens of an answer; 0 for no limit.
        seed: random seed. Each turn derives its own, so that a saved chat continues as it would have.

    Attributes:
        messages: the messages so far, in the form of chat templates.
        num_reread: number of tokens of earlier turns that the last turn had to read again.
        num_written: number of tokens of the last answer.
        is_cut: whether `max_tokens` has ended the last answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        sampling: Sampling,
        max_tokens: int,
        seed: int = 0,
        system: str | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._sampling, self._max_tokens, self._seed = sampling, max_tokens, seed
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.num_reread = self.num_written = 0
        self.is_cut = False
        # Tokens read of the messages, after those of a context.
        self._tokens: list[int] = []
        self._states = [_State(num_tokens=0, cache=model.make_cache())]

    @property
    def cache(self) -> StateCache:
        """The cache of all tokens read so far; do not change it."""
        return self._states[-1].cache

    def continue_from(self, context: Context) -> None:
        """Continue after a document, or from a saved chat; replaces the messages so far.

        ValueError if the context's note is not that of a chat.
        """
        messages, tokens = chat_of_note(context.note, num_tokens=context.num_tokens)
        # After a document, the system message stays.
        self.messages = messages if context.note else [m for m in self.messages if m["role"] == "system"]
        self._tokens = tokens
        self._states = [_State(num_tokens=len(tokens), cache=context.cache())]

    def load(self, path: Path) -> Context:
        """Load a context from a file and continue from it as `continue_from` does; returns the context."""
        from ovq.hf import load_context

        context = load_context(path, self._model)
        try:
            self.continue_from(context)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return context

    def as_context(self) -> Context:
        """The chat as a context, to be saved; ValueError if nothing has been read."""
        from ovq.hf import Context

        # A state from which any next message can continue.
        ids = self._ids([*self.messages, {"role": "user", "content": "?"}])
        state = self._longest_state(ids)
        return Context.of(self._model, state.cache, note=note_of_chat(self.messages, ids[: state.num_tokens]))

    def answer(self, text: str, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Generate the answer to a message, in pieces of text; then adds both to the messages.

        `is_stopped` is called after every token, and while the message is read; True ends the answer. Without
        a token of it, the message is forgotten. ValueError if the chat template refuses the message.
        """
        import torch

        from ovq.hf.streaming import stream_text, stream_tokens

        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(messages)
        state = self._longest_state(ids)
        cache = state.cache.snapshot()
        self.num_reread, self.is_cut = len(self._tokens) - state.num_tokens, False
        # Later states have read tokens that the prompt no longer has.
        del self._states[self._states.index(state) + 1 :]
        self._tokens = ids[: state.num_tokens]
        ends = self._model.generation_config.eos_token_id
        tokens = stream_tokens(
            self._model,
            ids[state.num_tokens :],
            cache=cache,
            sampling=self._sampling,
            eos_token_id=ends,
            generator=torch.Generator(self._model.device).manual_seed((self._seed + len(messages)) % 2**63),
            prefill_chunk_size=_PIECE,
            is_stopped=is_stopped,
        )
        written: list[int] = []
        pieces: list[str] = []

        def noted() -> Iterator[int]:
            for token in islice(tokens, self._max_tokens or None):
                if not written:
                    self._add_state(ids, cache.snapshot())
                written.append(token)
                yield token

        for piece in stream_text(noted(), self._tokenizer, prompt=ids):
            pieces.append(piece)
            yield piece
        self.num_written = len(written)
        if not written:
            return
        is_end = written[-1] in (ends if isinstance(ends, list) else [ends])
        self.is_cut = len(written) == self._max_tokens and not (is_end or is_stopped())
        # The last token has not been read by the cache.
        self._add_state([*ids, *written[:-1]], cache)
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        vocab_size = self._model.config.vocab_size
        return chat_ids(messages, self._tokenizer, vocab_size=vocab_size, name="message")

    def _add_state(self, tokens: list[int], cache: StateCache) -> None:
        """Keep the state after these tokens; only the first and the last `_MOST_STATES` states are kept."""
        self._tokens = tokens
        self._states.append(_State(num_tokens=len(tokens), cache=cache))
        del self._states[1:-_MOST_STATES]

    def _longest_state(self, ids: list[int]) -> _State:
        """The state after the longest prefix of a prompt, without its last token."""
        known = ids[:-1]
        found = [s for s in self._states if self._tokens[: s.num_tokens] == known[: s.num_tokens]]
        if not found:
            raise ValueError(
                "message: expected a chat template that renders the saved messages as they were read, found "
                "other tokens"
            )
        return found[-1]

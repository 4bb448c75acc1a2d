"""Constrained decoding with llguidance: answers that are JSON of a schema, or tool calls."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovq.serve.errors import bad_field
from ovq.serve.texts import Texts
from ovq.serve.tools import CLOSE, OPEN

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_CHARACTERS = 2**16
_LONGEST_FAULT = 200
_PLACE = re.compile(r"\n *\d+ \| |\n<state>")
"""Separates llguidance's error message from the place in the grammar or text that follows it."""
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it, on one line: with free whitespace, a model may write spaces without end."""


class GrammarFault(Exception):
    """A grammar has become too large during an answer, or no token of the model fits."""


class Constraint:
    """The tokens that an answer may continue with, by a grammar.

    Args:
        matcher: llguidance's state of the answer in its grammar.
        ends: End tokens; allowed where the grammar is complete.
    """

    def __init__(self, matcher: LLMatcher, *, vocab_size: int, ends: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self.ends = matcher, vocab_size, ends

    def copied(self) -> Constraint:
        """An independent copy, for another answer."""
        return Constraint(self._matcher.deep_copy(), vocab_size=self._vocab_size, ends=self.ends)

    @property
    def is_complete(self) -> bool:
        """Whether only an end token may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """Mask `[vocab_size]` of the tokens that may come next; at least one is True."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def push(self, token: int) -> None:
        """Advance by one token, and `check`."""
        self._matcher.consume_token(token)
        self.check()

    def check(self) -> None:
        """Raise `GrammarFault` if the answer cannot be completed."""
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            message = _PLACE.split(self._matcher.get_error(), maxsplit=1)[0]
            words = message.rpartition("failed to compile JSON schema: ")[2].split()
            message = " ".join(words)[:_LONGEST_FAULT]
            raise GrammarFault("nothing fits it" if message.startswith("NoExtension") else message)


class Grammars:
    """Compiles constraints for the answers of a model; without `ends`, the tokenizer's end token is one."""

    def __init__(self, texts: Texts, *, vocab_size: int, ends: frozenset[int]) -> None:
        self._texts, self._vocab_size, self._ends = texts, vocab_size, ends
        # One compilation at a time: each may take a core for a second, and many may be requested at once.
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compiled(self, grammar: str, *, param: str) -> Constraint:
        """The constraint for a grammar from `grammar_of`. Thread-safe, as it may take a second.

        Raises:
            APIError: If llguidance is not installed, or does not support the grammar or the tokenizer.
        """
        if len(grammar) > _MOST_CHARACTERS:
            wanted = f"expected schemas of at most {_MOST_CHARACTERS} characters"
            raise bad_field(param, f"{wanted}, found {len(grammar)}")
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise bad_field(
                param,
                f"expected llguidance on the server, found no module {error.name}: pip install 'ovq[serve]'",
                code="unsupported_parameter",
            ) from error
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._read_tokenizer(param)
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
            found = Constraint(matcher, vocab_size=self._vocab_size, ends=self._ends)
            try:
                found.check()
                # Compute the first mask here, as all other answers would wait for it in a step.
                found.allowed()
                found.check()
            except GrammarFault as fault:
                message = f"expected a schema that llguidance takes, found another one ({fault})"
                raise bad_field(param, message, code="invalid_json_schema") from fault
        return found

    def _read_tokenizer(self, param: str) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        with self._texts.locked() as tokenizer:
            self._ends = self._ends or frozenset({tokenizer.eos_token_id} - {None})
            try:
                if not self._ends:
                    raise ValueError("no token ends a text")
                return from_tokenizer(tokenizer, n_vocab=self._vocab_size, eos_token=sorted(self._ends))
            except ValueError as error:
                message = f"expected a model whose tokenizer llguidance takes, found another ({error})"
                raise bad_field(param, message, code="unsupported_parameter") from error


def grammar_of(schema: Mapping[str, Any] | None, tools: Mapping[str, Mapping[str, Any]]) -> str:
    """The grammar, in llguidance's Lark, of a JSON value of a schema or of one call of one of the tools.

    Args:
        schema: Schema of the value; None to allow only calls.
        tools: Schemas of the arguments, by tool name.

    Example:
        >>> print(grammar_of(None, {"now": {"type": "object"}}))
        start: call
        call: "<tool_call>\\n" (tool_0) "\\n</tool_call>"
        tool_0: "{\\"name\\": \\"now\\", \\"arguments\\": " %json {...} "}"
    """
    alternatives: Collection[str] = ["call"] * bool(tools) + ["value"] * (schema is not None)
    lines = [f"start: {' | '.join(alternatives)}"]
    if tools:
        names = " | ".join(f"tool_{place}" for place in range(len(tools)))
        begin, end = json.dumps(f"{OPEN}\n"), json.dumps(f"\n{CLOSE}")
        lines.append(f"call: {begin} ({names}) {end}")
    for place, (name, parameters) in enumerate(tools.items()):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
        # A separate %json each, because references in a schema start at its root.
        lines.append(f'tool_{place}: {head} {_json(parameters)} "}}"')
    if schema is not None:
        lines.append(f"value: {_json(schema)}")
    return "\n".join(lines)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _WRITING})}"

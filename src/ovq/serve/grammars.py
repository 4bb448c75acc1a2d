"""Answers that keep to a grammar: JSON of a schema, or calls of tools. llguidance does the work."""

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
"""After what is wrong, llguidance shows where in the grammar, or where it was in a text."""
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it, on one line: a model that may write spaces may write them without end."""


class GrammarFault(Exception):
    """A grammar has become too large while an answer was written, or no token of the model fits."""


class Constraint:
    """What an answer may say next.

    Args:
        matcher: Where in its grammar the answer is.
        vocab_size: Of the model.
        ends: Tokens that end a text; allowed where the grammar is complete.
    """

    def __init__(self, matcher: LLMatcher, *, vocab_size: int, ends: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self.ends = matcher, vocab_size, ends

    def copied(self) -> Constraint:
        """The same, for an answer of its own."""
        return Constraint(self._matcher.deep_copy(), vocab_size=self._vocab_size, ends=self.ends)

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but an end."""
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """`[vocab_size]`, True for the tokens that may come next, of which there is at least one."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def push(self, token: int) -> None:
        """Go on by a token.

        Raises:
            GrammarFault: See there.
        """
        self._matcher.consume_token(token)
        self.check()

    def check(self) -> None:
        """Raise a `GrammarFault` if the answer cannot be completed."""
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            message = _PLACE.split(self._matcher.get_error(), maxsplit=1)[0]
            words = message.rpartition("failed to compile JSON schema: ")[2].split()
            message = " ".join(words)[:_LONGEST_FAULT]
            raise GrammarFault("nothing fits it" if message.startswith("NoExtension") else message)


class Grammars:
    """Makes constraints for the answers of a model.

    Args:
        texts: The tokenizer of the model.
        vocab_size: Of the model.
        ends: Tokens that end a text; that of the tokenizer if there is none.
    """

    def __init__(self, texts: Texts, *, vocab_size: int, ends: frozenset[int]) -> None:
        self._texts, self._vocab_size, self._ends = texts, vocab_size, ends
        # One at a time: what takes a core for a second may be asked for many times at once.
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compiled(self, grammar: str, *, param: str) -> Constraint:
        """The constraint of a grammar from `grammar_of`; in any thread, as it may take a second.

        Raises:
            APIError: If llguidance is not installed, or takes neither the grammar nor the tokenizer.
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
                # Here rather than in the first step of an answer, for which all others would wait.
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
    """The grammar of a JSON value of a schema, or of one call of one of some tools, in llguidance's Lark.

    Args:
        schema: Of the value; None if only a call will do.
        tools: The schemas of the arguments, by the names of the tools.

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
        # A schema of its own each, whose references begin at its root.
        lines.append(f'tool_{place}: {head} {_json(parameters)} "}}"')
    if schema is not None:
        lines.append(f"value: {_json(schema)}")
    return "\n".join(lines)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _WRITING})}"

"""Tool calls in text: describing tools to a model, and parsing calls in its output.

The format is that of Hermes and Qwen, with which most models with tools are trained:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Collection, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# In JSON, a string begins after one of four characters; other quotes outside of strings open none.
_MARKS = re.compile(rf'\\["\\]|(?P<opener>[{{\[,:]\s*)?"|{CLOSE}')

_TOOL_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The text of Qwen's chat template, verbatim."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a tool, with its index in the answer, the text of a JSON object as `arguments`, and the id by
    which a message of the role `tool` refers to it."""

    index: int
    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class ToolCalls:
    """Incremental parser that extracts tool calls from an answer; anything else remains text.

    Args:
        names: Names of the tools; without any, all is text.
        is_single: Whether the answer ends with its first call.

    Attributes:
        num_calls: Number of calls found so far.

    Example:
        >>> calls = ToolCalls(["add"])
        >>> calls.push("Let me see. <tool_"), calls.push('call>{"name": "add", "argum')
        (('Let me see.', []), ('', []))
        >>> _, (call,) = calls.push('ents": {"a": 1}}</tool_call>')
        >>> call.name, call.arguments, calls.finish()
        ('add', '{"a": 1}', ('', []))
    """

    def __init__(self, names: Collection[str] = (), *, is_single: bool = False) -> None:
        # A tuple, because a model may write an unhashable value as a name.
        self._names, self._is_single = tuple(names), is_single
        self._held = ""
        # Of the JSON in what is held, so that a text is scanned once, however it comes.
        self._num_scanned, self._is_in_string = 0, False
        # Whether the JSON up to a closing tag inside a string was right.
        self._is_right = False
        self.num_calls = 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._is_single and self.num_calls > 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that may be shown after `text` was added, and the calls completed by it."""
        if not self._names or self.is_complete:
            return ("" if self.is_complete else text), []
        self._held += text
        shown, found = "", []
        while (begin := self._held.find(OPEN)) >= 0 and not self.is_complete:
            after, calls = self._first_call(begin + len(OPEN))
            if after is None:
                break
            before = self._held[:begin].rstrip() if calls else self._held[:after]
            shown, self._held = shown + before, self._held[after:]
            found += calls
        if self.is_complete:
            self._held = ""
        # Hold back the space before a call, which may have begun.
        end = len(self._held[: begin if begin >= 0 else match_start(self._held, [OPEN])].rstrip())
        shown, self._held = shown + self._held[:end], self._held[end:]
        return shown, found

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text and calls held back, at the end of the stream. The last call needs no closing tag."""
        held, self._held = self._held, ""
        calls = self._named(_json(held.strip().removeprefix(OPEN))) if OPEN in held else []
        return ("" if calls else held), calls

    def _first_call(self, begin: int) -> tuple[int | None, list[ToolCall]]:
        """End of the call whose JSON starts at `begin` (None if incomplete), and its calls, if valid."""
        end = begin + self._num_scanned
        for mark in _MARKS.finditer(self._held, end):
            end = mark.end()
            if mark[0].endswith('"') and mark[0][0] != "\\":
                self._is_in_string = not self._is_in_string and mark["opener"] is not None
            elif mark[0] == CLOSE:
                text = self._held[begin : mark.start()]
                # A closing tag inside a string of the arguments does not count.
                if self._is_in_string and (self._is_right or _ends_in_string(text)):
                    self._is_right = True
                    continue
                self._num_scanned, self._is_in_string, self._is_right = 0, False, False
                return end, self._named(_json(text))
        # The end may be the beginning of a mark.
        self._num_scanned = max(end, len(self._held.rstrip()) - len(CLOSE)) - begin
        return None, []

    def _named(self, value: Any) -> list[ToolCall]:
        """The calls in a JSON value, which is one call or a list of calls; empty for anything else."""
        found: list[ToolCall] = []
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, dict) or one.get("name") not in self._names:
                return []
            arguments = one.get("arguments", {})
            if not isinstance(arguments, dict):
                return []
            try:
                text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
                # Lone surrogates cannot be sent.
                text.encode()
            except ValueError:
                return []
            found.append(ToolCall(index=self.num_calls + len(found), name=one["name"], arguments=text))
            if self._is_single:
                break
        self.num_calls += len(found)
        return found


def _ends_in_string(text: str) -> bool:
    """Whether a text is the beginning of JSON that ends within a string."""
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        return getattr(error, "msg", "").startswith("Unterminated string")
    return False


def _json(text: str) -> Any:
    """The JSON value in a text; None if it is invalid."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def match_start(text: str, sequences: Sequence[str]) -> int:
    """Index from which the end of a text may be the beginning of one of the sequences.

    Example:
        >>> match_start("to be", ["end", "bed"]), match_start("to be ", ["end", "bed"])
        (3, 6)
    """
    longest = max(map(len, sequences), default=0)
    starts = range(max(0, len(text) - longest), len(text))
    return next((n for n in starts if any(one.startswith(text[n:]) for one in sequences)), len(text))


def tools_as_text(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages for a chat template without support for tools, with tools, calls and results as text.

    Tools are described at the end of the system message, which is added if there is none; calls are in the
    assistant's messages, and results in messages of the user, as in Qwen's template.
    """
    found: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        message, is_result = dict(message), message["role"] == "tool"
        if is_result:
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            message = {"role": "user", "content": content}
        if calls := message.pop("tool_calls", None):
            called = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            texts = [f"{OPEN}\n{text}\n{CLOSE}" for text in called]
            message["content"] = "\n".join(filter(None, [message["content"], *texts]))
        if is_result and was_result:
            found[-1]["content"] += f"\n{message['content']}"
        else:
            found.append(message)
        was_result = is_result
    if tools:
        description = _TOOL_PROMPT.format(
            tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        )
        if found and found[0]["role"] == "system":
            found[0]["content"] += f"\n\n{description}"
        else:
            found.insert(0, {"role": "system", "content": description})
    return found

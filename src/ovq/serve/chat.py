"""The fields of chat requests: messages, tools, and the response format."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic_core import from_json

from ovq.serve.bodies import ListOf, Request
from ovq.serve.errors import bad_field, shown
from ovq.serve.grammars import grammar_of
from ovq.serve.schemas import MOST_TOP_LOGPROBS, GenerationRequest

_MOST_TOOLS = 128
_OF_HELPERS = "added to answers by helpers of clients, and ignored when an answer is sent back"

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""Names of tools and schemas, with OpenAI's pattern."""


class TextPart(Request):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Request):
    """The function and arguments of a call in an earlier answer."""

    name: str
    arguments: str
    parsed_arguments: Any = Field(None, exclude=True, description=_OF_HELPERS)


class Call(Request):
    """A call of a tool in an earlier answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: Any = Field(None, exclude=True, description=_OF_HELPERS)


class Message(Request):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[TextPart] | None = Field(
        None, description="text or a list of parts of the type 'text'"
    )
    name: str | None = None
    tool_calls: ListOf[Call] | None = None
    tool_call_id: str | None = None
    parsed: Any = Field(None, exclude=True, description=_OF_HELPERS)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: (None, []) for name in ("annotations", "audio", "function_call", "refusal")
    }

    def for_template(self, place: int) -> dict[str, Any]:
        """The message at index `place` in the form of chat templates, where arguments of calls are objects.

        APIError for missing text, arguments that are no object, or calls or results in a wrong role.
        """
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                found = f"found it in one of the role {self.role!r}"
                wanted = f"expected it in messages of the role {role!r}"
                raise bad_field(f"messages.{place}.{field}", f"{wanted}, {found}")
        content = self.content
        if content is None and not self.tool_calls:
            raise bad_field(f"messages.{place}.content", "expected text, found none")
        text = content if isinstance(content, str) else "".join(part.text for part in content or [])
        # OpenAI's newer name for the same role, which templates, such as Qwen's, leave out without a word.
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [
                call.model_dump() | {"function": _called(call.function, f"messages.{place}.tool_calls.{i}")}
                for i, call in enumerate(self.tool_calls)
            ]
        given = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {name: value for name, value in given.items() if value is not None}


def _called(function: CalledFunction, place: str) -> dict[str, Any]:
    """A called function, with its arguments parsed into an object."""
    try:
        arguments = from_json(function.arguments, allow_inf_nan=False)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        found = shown(function.arguments)
        raise bad_field(f"{place}.function.arguments", f"expected a JSON object, found {found}")
    return {"name": function.name, "arguments": arguments}


class Function(Request):
    """Name, description and argument schema of a tool."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Request):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    @property
    def for_template(self) -> dict[str, Any]:
        """The tool in the form of chat templates."""
        about = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": self.type, "function": about | {"parameters": self.schema_of_arguments}}

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """The JSON schema of the arguments; if not given, that of no arguments."""
        nothing = {"properties": {}, "additionalProperties": False}
        return {"type": "object", **(self.function.parameters or nothing)}


class NamedFunction(Request):
    """Name of the function that must be called."""

    name: ToolName


class NamedTool(Request):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JSONSchema(Request):
    """The JSON schema of an answer."""

    name: ToolName
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Request):
    """Whether an answer is JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for any text.

        APIError for a schema without its type, or the type without a schema.
        """
        if (self.json_schema is None) == (self.type == "json_schema"):
            found = "none" if self.json_schema is None else f"one beside the type {self.type!r}"
            message = f"expected a schema for the type 'json_schema' alone, found {found}"
            raise bad_field("response_format.json_schema", message)
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: ListOf[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    tools: ListOf[Tool] | None = Field(None, max_length=_MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="'none', 'auto', 'required' or {'type': 'function', 'function': {'name': NAME}}"
    )
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationRequest.unsupported,
        "audio": (None,),
        "function_call": (None, "none"),
        "functions": (None, []),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
    }
    parts: ClassVar[dict[str, type[Request]]] = {"messages": Message}

    def check_together(self) -> None:
        """See `GenerationRequest.check_together`."""
        super().check_together()
        if self.top_logprobs and not self.logprobs:
            raise bad_field("top_logprobs", "expected logprobs true beside it, found false")

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest.num_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> dict[str, Tool]:
        """The tools that the model may call, by name; APIError for two with the same name."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        found = {tool.function.name: tool for tool in tools}
        if len(found) < len(tools):
            names = [tool.function.name for tool in tools]
            raise bad_field("tools", f"expected a name of its own for each, found {names}")
        return found

    @property
    def grammar(self) -> str | None:
        """The grammar that constrains answers; None for any text.

        APIError for contradictory fields, or argument schemas that are not of type object.
        """
        offered = self.offered
        schema = None if self.response_format is None else self.response_format.schema_of_answer
        is_forced = self.tool_choice not in (None, "none", "auto")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in offered:
                raise bad_field("tool_choice", f"expected one of the tools {[*offered]}, found {name!r}")
            offered = {name: offered[name]}
        if is_forced and not offered:
            raise bad_field("tools", "expected at least one for this tool_choice, found none")
        if is_forced and schema is not None:
            raise bad_field(
                "response_format", "expected the type 'text' where a tool must be called, found another one"
            )
        if schema is None and not is_forced:
            return None
        if self.ignore_eos:
            raise bad_field(
                "ignore_eos", "expected false for JSON and where a tool must be called, found true"
            )
        schemas = {name: tool.schema_of_arguments for name, tool in offered.items()}
        for name, one in schemas.items():
            if one["type"] != "object":
                found = f"{one['type']!r} for {name!r}"
                raise bad_field("tools", f"expected parameters of the type 'object', found {found}")
        return grammar_of(schema, schemas)

"""The fields of requests: OpenAI's, as far as they are supported, and a few of our own.

A field that would change the answer in a way that is not supported is refused, unless it has the value that
changes nothing. A field that nobody knows is refused too: it may be misspelt.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ovq.hf.streaming import Sampling
from ovq.serve.errors import APIError, bad_request

_MOST_TOP_LOGPROBS = 20
_MOST_STOPS = 16
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

ContextName = Annotated[str, Field(pattern=_NAME)]
"""Names of contexts. They are keys of a table and never parts of a path."""

AnyRequest = TypeVar("AnyRequest", bound="Request")


class Request(BaseModel):
    """What all requests share: types as JSON has them, and no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    #: Fields of OpenAI's that are not supported, and the values with which they change nothing.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}


class StreamOptions(Request):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Request):
    """What completions and chats have in common.

    `context`, `top_k`, `min_p` and `ignore_eos` are our own (`extra_body` of OpenAI's client).
    """

    model: str
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = Field(None, description="a sequence or a list of sequences")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: str | None = None
    context: ContextName | None = None
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    ignore_eos: bool = False

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "logit_bias": (None, {}),
        # These say what becomes of an answer elsewhere, and nothing about it.
        "metadata": (None, {}),
        "store": (None, False),
    }

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; with temperature 0 the likeliest, whatever the other fields say.

        Raises:
            APIError: A number that is not finite.
        """
        if self.temperature == 0:
            return Sampling()
        try:
            return Sampling(
                temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p
            )
        except ValueError as error:
            raise bad_request(str(error), param=str(error).partition(":")[0]) from error

    @property
    def stops(self) -> list[str]:
        """The stop sequences.

        Raises:
            APIError: An empty one, or too many.
        """
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(found) > _MOST_STOPS or not all(found):
            raise bad_request(
                f"stop: expected at most {_MOST_STOPS} sequences, none of them empty, found {found}",
                param="stop",
            )
        return found

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report with each token; None for no logprobs."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="text, a list of token ids, or a list of either"
    )
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=_MOST_TOP_LOGPROBS)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationRequest.unsupported,
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
    }

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest.num_logprobs`."""
        return self.logprobs


class TextPart(Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Request):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="text or a list of parts of the type 'text'")
    name: str | None = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: (None, [])
        for name in ("annotations", "audio", "function_call", "refusal", "tool_calls", "tool_call_id")
    }

    @property
    def for_template(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message = {"role": self.role, "content": text}
        return message if self.name is None else message | {"name": self.name}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_TOP_LOGPROBS)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationRequest.unsupported,
        "audio": (None,),
        "function_call": (None, "none"),
        "functions": (None, []),
        "modalities": (None, ["text"]),
        "parallel_tool_calls": (None, True, False),
        "reasoning_effort": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
    }

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest.num_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ContextRequest(Request):
    """`POST /v1/contexts` with JSON: a document to read, as text or as token ids."""

    name: ContextName
    text: str | None = None
    token_ids: list[int] | None = None


def parsed(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """The request in a body.

    Raises:
        APIError: If the body is not JSON, or a field is missing, unknown, not supported or out of range.

    Example:
        >>> parsed(CompletionRequest, b'{"model": "m", "prompt": "a", "echo": false}').max_tokens
        16
        >>> parsed(CompletionRequest, b'{"model": "m", "prompt": "a", "echo": true}')
        Traceback (most recent call last):
        ovq.serve.errors.APIError: echo: expected False, as nothing else is supported, found True
    """
    from pydantic_core import from_json

    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"expected a body of JSON, found otherwise ({error})") from error
    if not isinstance(fields, dict):
        raise bad_request(f"expected a JSON object, found {type(fields).__name__}")
    _drop_neutral(kind, fields, "")
    if isinstance(messages := fields.get("messages"), list):
        for place, message in enumerate(messages):
            if isinstance(message, dict):
                _drop_neutral(Message, message, f"messages.{place}.")
    try:
        # Anew from JSON, because only there do strict types accept an object for a model.
        return kind.model_validate_json(_as_json(fields))
    except ValidationError as error:
        raise _refusal(error, kind) from error


def _as_json(fields: dict[str, Any]) -> bytes:
    from pydantic_core import to_json

    return to_json(fields)


def _drop_neutral(kind: type[Request], fields: dict[str, Any], prefix: str) -> None:
    """Take fields out that are not supported and change nothing; refuse those that would."""
    for name in kind.unsupported.keys() & fields.keys():
        value, neutral = fields.pop(name), kind.unsupported[name]
        # In Python, False and 0 are equal, and so are 0 and 0.0, which JSON's writers may mix up.
        if value not in neutral:
            raise bad_request(
                f"{prefix}{name}: expected {neutral[-1]!r}, as nothing else is supported, found {value!r}",
                param=f"{prefix}{name}",
                code="unsupported_parameter",
            )


def _refusal(error: ValidationError, kind: type[Request]) -> APIError:
    """The first of the errors, in the form "expected ..., found ..."."""
    first = error.errors(include_url=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    # Of a union, pydantic names each alternative with what speaks against it; a description says it better.
    fields, depth = kind.model_fields, 1
    if param == "messages" and len(first["loc"]) > 2:
        fields, depth = Message.model_fields, 3
    name = str(first["loc"][depth - 1]) if first["loc"] else ""
    description = fields[name].description if name in fields else None
    is_union = description is not None and len(first["loc"]) > depth
    place = ".".join(map(str, first["loc"][:depth] if is_union else first["loc"]))
    if first["type"] == "extra_forbidden":
        return bad_request(f"{place}: expected fields of this request, found an unknown one", param=param)
    if first["type"] == "missing":
        return bad_request(f"{place}: expected this field, found none", param=param)
    message = first["msg"].removeprefix("Input should be ").removeprefix("List should have ")
    message = message.partition(" after validation")[0]
    if is_union:
        return bad_request(f"{place}: expected {description}, found something else", param=param)
    found = repr(first["input"])
    found = found if len(found) <= 80 else f"{found[:80]}..."
    return bad_request(f"{place}: expected {message}, found {found}", param=param)

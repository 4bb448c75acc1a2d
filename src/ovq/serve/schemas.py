"""The fields of requests: the supported ones of OpenAI, and a few of our own. For chats see `chat.py`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ovq.hf.streaming import Sampling
from ovq.serve.bodies import ListOf, Request
from ovq.serve.errors import bad_field, shown

MOST_TOP_LOGPROBS = 20
_MOST_STOPS = 16


class StreamOptions(Request):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Request):
    """Common fields of completions and chats.

    `context`, `top_k`, `min_p` and `ignore_eos` are our own (`extra_body` of OpenAI's client).
    """

    model: str
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | ListOf[str] | None = Field(None, description="a sequence or a list of sequences")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: str | None = None
    # Hints for a cache and for abuse detection, which do not change an answer.
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    context: str | None = None
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    ignore_eos: bool = False

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "logit_bias": (None, {}),
        # These concern what happens around an answer, not its content.
        "metadata": (None, {}),
        "service_tier": (None, "default", "auto"),
        "store": (None, False),
    }

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; with temperature 0 greedily, whatever the other fields are.

        APIError for a number that is not finite or out of range.
        """
        if self.temperature == 0:
            return Sampling()
        try:
            return Sampling(
                temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p
            )
        except ValueError as error:
            param, _, message = str(error).partition(": ")
            raise bad_field(param, message) from error

    @property
    def stops(self) -> list[str]:
        """The stop sequences; APIError for an empty one, or too many."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(found) > _MOST_STOPS or not all(found):
            wanted = f"expected at most {_MOST_STOPS} sequences, none of them empty"
            raise bad_field("stop", f"{wanted}, found {shown(found)}")
        return found

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to report with each token; None for no logprobs."""
        raise NotImplementedError

    def check_together(self) -> None:
        """Raise APIError if a field is set without another field that it requires."""
        if self.stream_options is not None and not self.stream:
            raise bad_field("stream_options", "expected stream true beside it, found false")

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: str | ListOf[int] | ListOf[str] | ListOf[ListOf[int]] = Field(
        description="text, a list of token ids, or a list of either"
    )
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

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


class ContextRequest(Request):
    """`POST /v1/contexts` with JSON: a document to read, as text or as token ids."""

    name: str
    text: str | None = None
    token_ids: ListOf[int] | None = None
    chat: bool = Field(False, description="whether chats go on from the text, as their system message")

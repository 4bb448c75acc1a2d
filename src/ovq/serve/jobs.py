"""Jobs for the model, and the events with which it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ovq.hf.context import Context
from ovq.hf.streaming import Sampling
from ovq.serve.grammars import Constraint


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log probabilities of a token and of the most likely tokens at its position.

    Attributes:
        logprob: Log probability of the token, before temperature and other processors.
        top: The most likely tokens with their log probabilities, in descending order.
    """

    logprob: float
    top: Sequence[tuple[int, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """The next token of the answer with index `choice`. An end token (`is_end`) adds no text.

    The last token has a `finish_reason`: `"length"` after `max_tokens` tokens, `"stop"` for an end token, or
    at the end of a constraint's grammar.
    """

    choice: int
    token: int
    is_end: bool = False
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeginEvent:
    """The first `num_known` tokens of a prompt are not read, as their state was cached."""

    num_known: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextEvent:
    """A document has been read."""

    context: Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailEvent:
    """The job failed with this error."""

    error: Exception


Event = BeginEvent | TokenEvent | ContextEvent | FailEvent


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """Tokens for the model to read.

    Attributes:
        tokens: `[T]` ids, at least 1.
        deliver: Called with the events of a step, in the thread that runs the model; equal for the jobs of a
            request alone.
        is_cancelled: Whether the job is cancelled. Set it through `Engine.cancel`.
    """

    tokens: Sequence[int]
    deliver: Callable[[list[Event]], None]
    is_cancelled: bool = False

    @property
    def num_rows(self) -> int:
        """Number of batch rows that it takes."""
        return 1


@dataclasses.dataclass(eq=False, kw_only=True)
class Reading(Job):
    """A document to read into a context."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Generation(Job):
    """A prompt to be continued.

    Attributes:
        max_tokens: Most tokens of each answer.
        context: The context that the prompt continues from.
        seed: Answer `i` of this job draws from a `torch.Generator` with the seed `seed + i`; None for a
            random seed.
        choices: Indices of the answers in events, such as 0, 1, 2 for three answers.
        num_logprobs: Number of most likely tokens to report per token, or None for no logprobs at all.
        constraint: Constraint of the answers; each answer gets its own copy.
        cancelled_choices: Indices of answers that have ended in their text, as at a stop sequence.
    """

    max_tokens: int
    context: Context | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int | None = None
    choices: Sequence[int] = (0,)
    ends: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    constraint: Constraint | None = None
    cancelled_choices: set[int] = dataclasses.field(default_factory=set)

    @property
    def num_rows(self) -> int:
        """Number of batch rows that it takes: one per answer."""
        return len(self.choices)

"""What is asked of a model, and the events in which it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ovq.hf.context import Context
from ovq.hf.streaming import Sampling
from ovq.serve.grammars import Constraint


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """How likely a token was, and which were likeliest in its place.

    Attributes:
        logprob: Logarithm of the probability that the model gave it, before temperature and the like.
        top: The likeliest tokens with theirs, from the likeliest on.
    """

    logprob: float
    top: Sequence[tuple[int, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """The next token of a choice.

    Attributes:
        choice: Which of the answers of the request.
        token: Its id.
        is_end: Whether it is a token that ends a text, which has no text of its own.
        logprobs: If they were asked for.
    """

    choice: int
    token: int
    is_end: bool = False
    logprobs: TokenLogprobs | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeginEvent:
    """The first `num_known` tokens of a prompt are not read, as a state after them was known."""

    num_known: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishEvent:
    """A choice is complete: `"length"` after `max_tokens` tokens, `"stop"` after a token that ends a text and
    where a constraint lets nothing follow."""

    choice: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextEvent:
    """A document has been read."""

    context: Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailEvent:
    """The job ended without its result, for this reason."""

    error: Exception


Event = BeginEvent | TokenEvent | FinishEvent | ContextEvent | FailEvent


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """Something the model is to read.

    Attributes:
        tokens: `[T]` ids, at least 1.
        deliver: Is called with the events of a step, by the thread that runs the model.
        is_cancelled: Nobody waits for it any longer. Set it through `Engine.cancel`.
    """

    tokens: Sequence[int]
    deliver: Callable[[list[Event]], None]
    is_cancelled: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the batch that it takes."""
        return 1


@dataclasses.dataclass(eq=False, kw_only=True)
class Reading(Job):
    """A document to be read, for a context."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Generation(Job):
    """A prompt to be continued.

    Attributes:
        max_tokens: Tokens of each answer, at most.
        context: What was read before the prompt.
        sampling: How tokens are chosen.
        seed: Answer `i` of this job draws from a `torch.Generator` with the seed `seed + i`; None for a seed
            of the system.
        choices: Names of the answers in their events, such as 0, 1, 2 for three of them.
        ends: Tokens that end a text.
        num_logprobs: How many likeliest tokens to report with each token, or None for no logprobs at all.
        constraint: What the answers must keep to; each has its own copy.
        cancelled_choices: Answers that nobody needs more of.
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
        """Rows of the batch that it takes: one per answer."""
        return len(self.choices)

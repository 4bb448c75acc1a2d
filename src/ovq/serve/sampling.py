"""Choose the next tokens of the rows of a batch, each with the options of its own request."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ovq.hf.streaming import Sampling
from ovq.serve.grammars import Constraint
from ovq.serve.jobs import Generation, TokenLogprobs


@dataclasses.dataclass(eq=False)
class Choice:
    """One answer of a `Generation`, which is one row of the batch.

    Attributes:
        index: Index of the answer in events.
        generator: Source of its random numbers; None for greedy decoding.
        tokens: Tokens generated so far; the row reads the last of them next.
    """

    job: Generation
    index: int
    generator: torch.Generator | None
    constraint: Constraint | None
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def is_cancelled(self) -> bool:
        """Whether the job or this answer is cancelled."""
        return self.job.is_cancelled or self.index in self.job.cancelled_choices


def choices_of(job: Generation, device: torch.device) -> list[Choice]:
    """The answers of a job, each with its own random generator and constraint.

    Example:
        >>> job = Generation(tokens=[1], deliver=print, max_tokens=1, choices=(0, 1), seed=7)
        >>> [choice.index for choice in choices_of(job, torch.device("cpu"))]
        [0, 1]
    """
    first = secrets.randbits(62) if job.seed is None else job.seed
    found = []
    for place, index in enumerate(job.choices):
        generator = None
        if job.sampling.temperature > 0:
            generator = torch.Generator(device).manual_seed((first + place) % 2**63)
        constraint = None if job.constraint is None else job.constraint.copied()
        found.append(Choice(job, index, generator, constraint))
    return found


def next_tokens(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """The next token of each row, from logits `[B, vocab_size]`; -1 where they are no numbers.

    A row gets the token that `ovq.hf.streaming.stream_tokens` would choose with the same generator; the other
    rows of the batch have no influence.
    """
    logits = _allowed(logits.float(), choices)
    tokens = logits.argmax(-1)
    # NaN is the largest of all.
    is_sound = logits.gather(-1, tokens[:, None])[:, 0].isfinite()
    tokens.masked_fill_(~is_sound, -1)
    by_sampling: dict[Sampling, list[int]] = {}
    for row, choice in enumerate(choices):
        if choice.generator is not None and is_sound[row]:
            by_sampling.setdefault(choice.job.sampling, []).append(row)
    for sampling, rows in by_sampling.items():
        scores = logits[rows]
        # None of the processors used here needs the previous tokens.
        no_tokens = torch.empty(len(rows), 0, dtype=torch.int64, device=logits.device)
        scores = sampling.processors()(no_tokens, scores)  # type: ignore[arg-type]  # asks for a LongTensor
        for row, probabilities in zip(rows, scores.softmax(-1), strict=True):
            tokens[row] = torch.multinomial(probabilities, 1, generator=choices[row].generator)[0]
    return tokens.tolist()


def _allowed(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """The logits, with -inf for tokens that a row's constraint forbids."""
    rows = [row for row, choice in enumerate(choices) if choice.constraint is not None]
    if not rows:
        return logits
    masks = [choice.constraint.allowed() for choice in choices if choice.constraint is not None]
    is_forbidden = torch.from_numpy(~np.stack(masks)).to(logits.device)
    logits = logits.clone(memory_format=torch.contiguous_format)
    for row, mask in zip(rows, is_forbidden, strict=True):
        logits[row].masked_fill_(mask, float("-inf"))
    return logits


def token_logprobs(
    logits: Tensor, choices: Sequence[Choice], tokens: Sequence[int]
) -> list[TokenLogprobs | None]:
    """Log probabilities of the chosen tokens for the rows whose requests want them; None for other rows."""
    found: list[TokenLogprobs | None] = [None] * len(choices)
    rows = [row for row, choice in enumerate(choices) if choice.job.num_logprobs is not None]
    if not rows:
        return found
    logprobs = logits[rows].float().log_softmax(-1)
    for row, values in zip(rows, logprobs, strict=True):
        top = values.topk(min(choices[row].job.num_logprobs or 0, len(values)))
        found[row] = TokenLogprobs(
            logprob=float(values[tokens[row]]),
            top=list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        )
    return found

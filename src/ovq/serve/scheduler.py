"""Which rows read in the next step: continuous batching, without threads and without a network.

Answers that are being generated are the rows of one batch, and all of them take a step together. Prompts are
read piece by piece between these steps, each by itself; when a prompt has been read, its row joins the batch.
A row whose answer is complete leaves. Nobody waits for the answers of others to end.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Generator, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from ovq.hf.context import Context
from ovq.serve.grammars import GrammarFault
from ovq.serve.jobs import (
    BeginEvent,
    ContextEvent,
    Event,
    FailEvent,
    FinishEvent,
    Generation,
    Job,
    TokenEvent,
)
from ovq.serve.limits import Limits
from ovq.serve.model import AnyServedModel, BatchRows
from ovq.serve.prefixes import Prefixes
from ovq.serve.sampling import Choice, choices_of, next_tokens, token_logprobs


@dataclasses.dataclass
class Counts:
    """What a scheduler has done since it was made.

    Attributes:
        prompt_tokens: Tokens of prompts and documents read.
        known_tokens: Tokens of prompts that needed no reading, as a state after them was known.
        generated_tokens: Tokens generated.
        steps: Steps in which answers grew by a token.
        finished: Answers that were completed.
        cancelled: Jobs that were given up because nobody waited any longer.
        failed: Jobs that an error ended.
    """

    prompt_tokens: int = 0
    known_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclasses.dataclass(eq=False)
class _Started:
    """A job whose tokens are being read.

    Attributes:
        rows: The row of a `Generation`.
        document: The reading of a `Reading`.
        num_read: Tokens of its own read so far, or known.
        known: Those of them after which a state is kept, or of which it came.
        fork: Where to keep a state on the way; 0 for nowhere.
    """

    job: Job
    rows: BatchRows | None = None
    document: Generator[int, None, Context] | None = None
    num_read: int = 0
    known: int = 0
    fork: int = 0


class Scheduler:
    """Runs jobs on a model, step by step.

    Args:
        model: What reads.
        limits: `max_rows`, `step_tokens` and `prefix_bytes` matter here.

    Attributes:
        counts: What has been done.
        prefixes: States after earlier prompts and answers.

    Example:
        >>> from ovq.hf import OVQConfig, OVQForCausalLM
        >>> from ovq.serve.model import ServedModel
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> scheduler = Scheduler(ServedModel(OVQForCausalLM(config).eval()), Limits())
        >>> events = []
        >>> scheduler.add(Generation(tokens=[1, 2, 3], deliver=events.extend, max_tokens=4))
        >>> while scheduler.step():
        ...     pass
        >>> len(events), events[-1]
        (5, FinishEvent(choice=0, reason='length'))
    """

    def __init__(self, model: AnyServedModel, limits: Limits) -> None:
        self.counts, self.prefixes = Counts(), Prefixes(limits.prefix_bytes)
        self._model, self._limits = model, limits
        self._waiting: deque[Job] = deque()
        self._started: deque[_Started] = deque()
        # Kept as a number, because other threads ask for it.
        self._num_started_rows = 0
        self._rows: BatchRows | None = None
        self._choices: list[Choice] = []
        self._events: dict[Job, list[Event]] = {}
        self._deleted: weakref.WeakSet[Context] = weakref.WeakSet()

    @property
    def waiting(self) -> list[Job]:
        """Jobs that have not begun."""
        # A copy, which is made at once: another thread may ask.
        return list(self._waiting)

    @property
    def num_rows(self) -> int:
        """Rows of answers that are being generated, and those that started jobs are going to take."""
        return len(self._choices) + self._num_started_rows

    @property
    def state_bytes(self) -> int:
        """Bytes of the memories of all rows."""
        # A copy, as above.
        rows = [self._rows, *(started.rows for started in list(self._started))]
        return sum(part.nbytes for part in rows if part is not None)

    def add(self, job: Job) -> None:
        """Take on a job; its turn comes after those that wait."""
        self._waiting.append(job)

    def forget(self, context: Context) -> None:
        """Forget the states that go on from a context, for good. Answers that do are not disturbed."""
        self._deleted.add(context)
        for root in self.prefixes.roots:
            if isinstance(root, tuple) and root[1] is context:
                self.prefixes.forget(root)

    @torch.inference_mode()
    def step(self) -> bool:
        """Read pieces of prompts, and the last token of every running answer; deliver what comes of it.

        Returns:
            Whether there is anything left to do.
        """
        self._drop_cancelled()
        self._admit()
        finished = self._read_pieces()
        # Running answers and those that begin now go through one selection of rows.
        self._grow()
        self._join(finished)
        self._deliver()
        return bool(self._waiting or self._started or self._choices)

    def fail_all(self, error: Exception) -> None:
        """End all jobs with an error."""
        self._fail([*self._waiting, *(started.job for started in self._started)], error)
        self._waiting.clear()
        self._started.clear()
        self._num_started_rows = 0
        self._fail_running(error)
        self._deliver()

    def _drop_cancelled(self) -> None:
        kept = deque(job for job in self._waiting if not job.is_cancelled)
        started = deque(started for started in self._started if not started.job.is_cancelled)
        self.counts.cancelled += len(self._waiting) - len(kept) + len(self._started) - len(started)
        self._waiting, self._started = kept, started
        self._num_started_rows = sum(item.job.num_rows for item in started)
        if any(choice.is_cancelled for choice in self._choices):
            jobs = {choice.job for choice in self._choices if choice.job.is_cancelled}
            self.counts.cancelled += len(jobs)
            self._keep([place for place, choice in enumerate(self._choices) if not choice.is_cancelled])

    def _admit(self) -> None:
        """Start jobs in the order of their arrival, as long as there is room for their rows."""
        while self._waiting and self.num_rows + self._waiting[0].num_rows <= self._limits.max_rows:
            job = self._waiting.popleft()
            self._num_started_rows += job.num_rows
            self._started.append(_Started(job))

    def _read_pieces(self) -> list[tuple[_Started, Tensor]]:
        """Read a piece of each started job in turn, until a step's worth of tokens has been read.

        Returns:
            The generations whose prompt has been read completely, with the logits after it.
        """
        complete: list[tuple[_Started, Tensor]] = []
        num_left = self._limits.step_tokens
        for _ in range(len(self._started)):
            if num_left <= 0:
                break
            started = self._started.popleft()
            try:
                if started.num_read == 0:
                    self._begin(started)
                before = started.num_read
                logits = self._read_piece(started, num_left)
            except Exception as error:
                # Whatever it is, it must not end the answers of others.
                self._fail([started.job], error)
                self._num_started_rows -= started.job.num_rows
                continue
            num_left -= max(1, started.num_read - before)
            self.counts.prompt_tokens += started.num_read - before
            if started.num_read < len(started.job.tokens):
                # Long documents take turns with what came after them.
                self._started.append(started)
            elif logits is not None:
                complete.append((started, logits))
            else:
                self._num_started_rows -= started.job.num_rows
        return complete

    def _begin(self, started: _Started) -> None:
        """Find out where to read a job from."""
        job = started.job
        if not isinstance(job, Generation):
            started.document = self._model.read_document(job.tokens, self._limits.step_tokens)
            return
        found = self.prefixes.find(self._root(job), job.tokens)
        started.rows = self._model.start(job.context) if found.rows is None else found.rows
        started.num_read = started.known = found.num_tokens
        started.fork = found.fork
        self.counts.known_tokens += found.num_tokens
        if found.num_tokens:
            self._events.setdefault(job, []).append(BeginEvent(num_known=found.num_tokens))

    def _read_piece(self, started: _Started, num_tokens: int) -> Tensor | None:
        """Read the next tokens of a job; returns the logits after them, if it is a generation."""
        job = started.job
        if isinstance(job, Generation):
            assert started.rows is not None
            end = min(started.num_read + num_tokens, len(job.tokens))
            if started.num_read < started.fork:
                end = min(end, started.fork)
            logits = started.rows.read([job.tokens[started.num_read : end]])
            started.num_read = end
            is_last = end == len(job.tokens) and self.prefixes.is_worth(end - started.known)
            if is_last or end == started.fork:
                self._remember(job, job.tokens[:end], started.rows.copied())
                started.known = end
            return logits
        assert started.document is not None
        started.num_read = next(started.document)
        if started.num_read == len(job.tokens):
            try:
                next(started.document)
            except StopIteration as end:
                self._events.setdefault(job, []).append(ContextEvent(context=end.value))
        return None

    def _grow(self) -> None:
        """One step of the running answers: read the token that each chose last, and choose the next."""
        if not self._choices:
            return
        assert self._rows is not None
        try:
            logits = self._rows.read([[choice.tokens[-1]] for choice in self._choices])
            going_on = self._choose(logits, self._choices)
            self._remember_complete(going_on)
        except Exception as error:
            self._fail_running(error)
            return
        self.counts.steps += 1
        self._keep(going_on)

    def _remember_complete(self, going_on: Sequence[int]) -> None:
        """Keep the states of rows whose answers are complete."""
        assert self._rows is not None
        for place in sorted(set(range(len(self._choices))) - set(going_on)):
            choice = self._choices[place]
            # The last token of an answer is never read.
            read = choice.tokens[:-1]
            if self.prefixes.is_worth(len(read)):
                self._remember(choice.job, [*choice.job.tokens, *read], self._rows.taken(place))

    def _remember(self, job: Generation, tokens: Sequence[int], rows: BatchRows) -> None:
        """Keep the state of a row that has read these tokens."""
        if job.context not in self._deleted:
            self.prefixes.add(self._root(job), tokens, rows)

    def _root(self, job: Generation) -> Hashable:
        """See `Prefixes.find`."""
        return self._model.settings, job.context

    def _join(self, complete: Sequence[tuple[_Started, Tensor]]) -> None:
        """Choose the first tokens of answers whose prompts have been read; their rows join the batch."""
        parts = [] if self._rows is None else [self._rows]
        for started, logits in complete:
            assert started.rows is not None
            assert isinstance(started.job, Generation)
            self._num_started_rows -= started.job.num_rows
            try:
                choices = choices_of(started.job, self._model.device)
                going_on = self._choose(logits.expand(len(choices), -1), choices)
                if not going_on:
                    continue
                if going_on != [0]:
                    started.rows.keep([0] * len(going_on))
            except Exception as error:
                self._fail([started.job], error)
                continue
            self._choices += [choices[place] for place in going_on]
            parts.append(started.rows)
        if len(parts) > 1:
            try:
                self._rows = self._model.joined(parts)
            except Exception as error:
                self._fail_running(error)
        elif parts:
            self._rows = parts[0]

    def _choose(self, logits: Tensor, choices: Sequence[Choice]) -> list[int]:
        """Choose the next token of each answer; returns the places of those that are not complete with it."""
        tokens = next_tokens(logits, choices)
        going_on = []
        for place, (choice, token, logprobs) in enumerate(
            zip(choices, tokens, token_logprobs(logits, choices, tokens), strict=True)
        ):
            job = choice.job
            choice.tokens.append(token)
            is_end = is_last = token in job.ends
            if choice.constraint is not None:
                try:
                    choice.constraint.push(token)
                except GrammarFault as error:
                    # This answer alone has come to where it cannot go on.
                    self._fail([job], error)
                    continue
                is_last = choice.constraint.is_complete
            events = self._events.setdefault(job, [])
            events.append(TokenEvent(choice=choice.index, token=token, is_end=is_end, logprobs=logprobs))
            if is_last or len(choice.tokens) >= job.max_tokens:
                events.append(FinishEvent(choice=choice.index, reason="stop" if is_last else "length"))
                self.counts.finished += 1
            else:
                going_on.append(place)
        self.counts.generated_tokens += len(choices)
        return going_on

    def _keep(self, places: list[int]) -> None:
        """Keep the running answers at these places."""
        if len(places) == len(self._choices):
            return
        self._choices = [self._choices[place] for place in places]
        if not places:
            self._rows = None
            return
        assert self._rows is not None
        self._rows.keep(places)

    def _fail_running(self, error: Exception) -> None:
        """End the running answers with an error."""
        self._fail({choice.job: None for choice in self._choices}, error)
        self._choices, self._rows = [], None

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        for job in jobs:
            self.counts.failed += 1
            self._events.setdefault(job, []).append(FailEvent(error=error))

    def _deliver(self) -> None:
        events, self._events = self._events, {}
        for job, own in events.items():
            if not job.is_cancelled:
                job.deliver(own)

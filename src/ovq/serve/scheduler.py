"""`Scheduler`: continuous batching, without threads and network.

Running answers are the rows of one batch and take steps together. Prompts are read in pieces between these
steps, each separately; when a prompt has been read, its row joins the batch. A row leaves when its answer is
complete. So no request waits for the answers of others to end. If all rows are taken, requests take turns:
one with many prompts does not hold up those that come after it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from ovq.hf.context import Context
from ovq.hf.rows import Rows
from ovq.serve.grammars import GrammarFault
from ovq.serve.jobs import BeginEvent, ContextEvent, Event, FailEvent, Generation, Job, TokenEvent
from ovq.serve.limits import Limits
from ovq.serve.model import ServedModel
from ovq.serve.prefixes import Prefixes
from ovq.serve.sampling import Choice, choices_of, next_tokens, token_logprobs


@dataclasses.dataclass
class Counts:
    """Counts since a scheduler was made; `metrics` has a sentence on each."""

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
        document: The generator that reads the document of a `Reading`.
        num_read: Number of the job's tokens read so far, or known from a cached state.
        known: Number of tokens after which the last state was cached or taken from the cache.
        fork: Number of tokens after which to cache a state on the way; 0 for none.
        logits: Those after the last token of a `Generation`.
    """

    job: Job
    rows: Rows | None = None
    document: Generator[int, None, Context] | None = None
    num_read: int = 0
    known: int = 0
    fork: int = 0
    logits: Tensor | None = None


class Scheduler:
    """Runs jobs on a model, step by step."""

    def __init__(self, model: ServedModel, limits: Limits) -> None:
        self.counts, self.prefixes = Counts(), Prefixes(limits.prefix_bytes)
        self._model, self._limits = model, limits
        self._waiting: deque[Job] = deque()
        self._started: list[_Started] = []
        self._rows: Rows | None = None
        self._choices: list[Choice] = []
        self._events: defaultdict[Job, list[Event]] = defaultdict(list)
        self._deleted: weakref.WeakSet[Context] = weakref.WeakSet()

    @property
    def waiting(self) -> list[Job]:
        """Jobs that have not started."""
        # An atomic copy, as another thread may call this.
        return list(self._waiting)

    @property
    def num_rows(self) -> int:
        """Number of rows of running answers, and of those that started jobs will take."""
        # A copy, as in `waiting`.
        return len(self._choices) + sum(started.job.num_rows for started in list(self._started))

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all rows."""
        # A copy, as in `waiting`.
        rows = [self._rows, *(started.rows for started in list(self._started))]
        return sum(part.nbytes for part in rows if part is not None)

    def add(self, job: Job) -> None:
        """Add a job to the end of the queue."""
        self._waiting.append(job)

    def forget(self, context: Context) -> None:
        """Drop the cached states of a context, and cache no more. Running answers are not affected."""
        self._deleted.add(context)
        self.prefixes.forget(lambda root: isinstance(root, tuple) and root[1] is context)

    @torch.inference_mode()
    def step(self) -> bool:
        """Read pieces of prompts, and the last token of every running answer; deliver the events.

        Returns whether there is anything left to do.
        """
        self._drop_cancelled()
        self._admit()
        self._prefill()
        # Running answers first, so that completed rows leave before new ones join.
        self._decode()
        self._join_batch()
        self._deliver()
        return bool(self._waiting or self._started or self._choices)

    def fail_all(self, error: Exception) -> None:
        """Fail all jobs with an error."""
        self._fail([*self._waiting, *(started.job for started in self._started)], error)
        self._waiting.clear()
        self._started.clear()
        self._fail_running(error)
        self._deliver()

    def _drop_cancelled(self) -> None:
        kept = deque(job for job in self._waiting if not job.is_cancelled)
        started = [started for started in self._started if not started.job.is_cancelled]
        self.counts.cancelled += len(self._waiting) - len(kept) + len(self._started) - len(started)
        self._waiting, self._started = kept, started
        leaving = {choice for choice in self._choices if choice.is_cancelled}
        # An answer that is cancelled by itself ended in its text, as at a stop sequence.
        ended = {choice for choice in leaving if choice.index in choice.job.cancelled_choices}
        self.counts.finished += len(ended)
        self.counts.cancelled += len({choice.job for choice in leaving - ended})
        self._keep_rows([place for place, choice in enumerate(self._choices) if choice not in leaving])

    def _admit(self) -> None:
        """Start jobs while there is room for the next: of the requests with the fewest rows, the first."""
        rows = Counter(choice.job.deliver for choice in self._choices)
        for started in self._started:
            rows[started.job.deliver] += started.job.num_rows
        while self._waiting:
            job = min(self._waiting, key=lambda job: rows[job.deliver])
            if self.num_rows + job.num_rows > self._limits.max_rows:
                return
            self._waiting.remove(job)
            # The others of its request wait behind those of all that have waited for as many rows.
            others = [other for other in self._waiting if other.deliver == job.deliver]
            self._waiting = deque([*(x for x in self._waiting if x.deliver != job.deliver), *others])
            self._started.append(_Started(job))
            rows[job.deliver] += job.num_rows

    def _prefill(self) -> None:
        """Read a piece of each started job in turn, up to `step_tokens` tokens."""
        num_left = self._limits.step_tokens
        for started in list(self._started):
            if num_left <= 0:
                break
            try:
                if started.num_read == 0:
                    self._begin_prefill(started)
                before = started.num_read
                self._prefill_piece(started, num_left)
            except Exception as error:
                # No error of one job may end the answers of others.
                self._fail([started.job], error)
                self._started.remove(started)
                continue
            num_left -= max(1, started.num_read - before)
            self.counts.prompt_tokens += started.num_read - before
            if started.logits is not None:
                # It stays until its rows join the batch.
                continue
            self._started.remove(started)
            if started.num_read < len(started.job.tokens):
                # Long documents take turns with jobs that came later.
                self._started.append(started)

    def _begin_prefill(self, started: _Started) -> None:
        """Set where reading of a job starts: at the longest cached prefix, or at the beginning."""
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
            self._events[job].append(BeginEvent(num_known=found.num_tokens))

    def _prefill_piece(self, started: _Started, num_tokens: int) -> None:
        """Read the next tokens of a job: at most `num_tokens` of a prompt."""
        job = started.job
        if isinstance(job, Generation):
            assert started.rows is not None
            end = min(started.num_read + num_tokens, len(job.tokens))
            if started.num_read < started.fork:
                end = min(end, started.fork)
            logits = started.rows.read([job.tokens[started.num_read : end]])
            started.num_read = end
            is_last = end == len(job.tokens) and self.prefixes.is_worth_keeping(end - started.known)
            if is_last or end == started.fork:
                self._cache_state(job, job.tokens[:end], started.rows.copied())
                started.known = end
            if end == len(job.tokens):
                started.logits = logits
            return
        assert started.document is not None
        started.num_read = next(started.document)
        if started.num_read == len(job.tokens):
            try:
                next(started.document)
            except StopIteration as end:
                self._events[job].append(ContextEvent(context=end.value))

    def _decode(self) -> None:
        """One step of the running answers: read the last chosen token of each, and choose the next."""
        if not self._choices:
            return
        assert self._rows is not None
        try:
            logits = self._rows.read([[choice.tokens[-1]] for choice in self._choices])
            unfinished = self._choose(logits, self._choices)
            for place in sorted(set(range(len(self._choices))) - set(unfinished)):
                choice = self._choices[place]
                # The last token of an answer is never read.
                read = choice.tokens[:-1]
                if self.prefixes.is_worth_keeping(len(read)):
                    self._cache_state(choice.job, [*choice.job.tokens, *read], self._rows.taken(place))
            self._keep_rows(unfinished)
        except Exception as error:
            self._fail_running(error)
            return
        self.counts.steps += 1

    def _cache_state(self, job: Generation, tokens: Sequence[int], rows: Rows) -> None:
        if job.context not in self._deleted:
            self.prefixes.add(self._root(job), tokens, rows)

    def _root(self, job: Generation) -> Hashable:
        """The `root` of `Prefixes.find`."""
        return self._model.settings, job.context

    def _join_batch(self) -> None:
        """Choose the first tokens of answers whose prompts are complete; their rows join the batch."""
        parts = [] if self._rows is None else [self._rows]
        for started in list(self._started):
            if started.logits is None:
                continue
            assert started.rows is not None
            assert isinstance(started.job, Generation)
            self._started.remove(started)
            try:
                choices = choices_of(started.job, self._model.device)
                unfinished = self._choose(started.logits.expand(len(choices), -1), choices)
                if not unfinished:
                    continue
                if unfinished != [0]:
                    started.rows.keep([0] * len(unfinished))
            except Exception as error:
                self._fail([started.job], error)
                continue
            self._choices += [choices[place] for place in unfinished]
            parts.append(started.rows)
        if len(parts) > 1:
            try:
                self._rows = self._model.joined(parts)
            except Exception as error:
                self._fail_running(error)
        elif parts:
            self._rows = parts[0]

    def _choose(self, logits: Tensor, choices: Sequence[Choice]) -> list[int]:
        """Choose the next token of each answer; returns the indices of answers that are still incomplete."""
        tokens = next_tokens(logits, choices)
        unfinished = []
        # A job fails once, with all its answers.
        failed: dict[Job, Exception] = {}
        for place, (choice, token, logprobs) in enumerate(
            zip(choices, tokens, token_logprobs(logits, choices, tokens), strict=True)
        ):
            job = choice.job
            choice.tokens.append(token)
            if token < 0:
                failed[job] = ValueError("expected logits that are numbers, found NaN or Inf")
                continue
            is_end = is_last = token in job.ends
            if choice.constraint is not None:
                try:
                    choice.constraint.push(token)
                except GrammarFault as error:
                    # Only this job fails: its answer cannot be completed.
                    failed[job] = error
                    continue
                is_last = choice.constraint.is_complete
            reason = "stop" if is_last else "length" if len(choice.tokens) >= job.max_tokens else None
            event = TokenEvent(
                choice=choice.index, token=token, is_end=is_end, logprobs=logprobs, finish_reason=reason
            )
            self._events[job].append(event)
            if reason is None:
                unfinished.append(place)
            else:
                self.counts.finished += 1
        self.counts.generated_tokens += len(choices)
        for failing, cause in failed.items():
            self._fail([failing], cause)
        return [place for place in unfinished if choices[place].job not in failed]

    def _keep_rows(self, places: list[int]) -> None:
        if len(places) == len(self._choices):
            return
        self._choices = [self._choices[place] for place in places]
        if places:
            assert self._rows is not None
            self._rows.keep(places)
        else:
            self._rows = None

    def _fail_running(self, error: Exception) -> None:
        self._fail({choice.job: None for choice in self._choices}, error)
        self._choices, self._rows = [], None

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        for job in jobs:
            self.counts.failed += 1
            self._events[job].append(FailEvent(error=error))

    def _deliver(self) -> None:
        events, self._events = self._events, defaultdict(list)
        for job, of_job in events.items():
            if not job.is_cancelled:
                job.deliver(of_job)

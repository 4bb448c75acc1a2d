"""The thread that runs the model: it takes jobs from other threads and delivers events."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from ovq.hf.context import Context
from ovq.serve.errors import APIError, shutting_down
from ovq.serve.jobs import Generation, Job
from ovq.serve.limits import Limits
from ovq.serve.model import ServedModel
from ovq.serve.scheduler import Scheduler

_log = logging.getLogger("ovq.serve")


class Engine:
    """Runs the jobs of many clients on one model, in a thread of its own, which alone uses the model then.

    Other threads may read the counts of its `scheduler`, which need not be consistent.
    """

    def __init__(self, model: ServedModel, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(model, limits)
        self._changed = threading.Condition()
        self._new: list[Job] = []
        self._forgotten: list[Context] = []
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="ovq-engine", daemon=True)

    def start(self) -> None:
        """Start running jobs."""
        self._thread.start()

    def stop(self) -> None:
        """Fail all jobs with a shutdown error after the current step, and wait for the thread."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether the thread runs and has not been stopped."""
        return self._thread.is_alive() and not self._is_stopped

    @property
    def num_waiting(self) -> int:
        """Number of jobs that have not started."""
        return len(self._new) + len(self.scheduler.waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit jobs, all or none of them.

        Raises:
            APIError: If more than `max_queue` jobs would wait (a job that can start at once does not wait),
                or the engine has been stopped.
        """
        with self._changed:
            if not self.is_running:
                raise shutting_down()
            # Jobs start in turn, even if there is room for a later one but not for the next.
            waiting = [*self.scheduler.waiting, *self._new, *jobs]
            num_rows = self.scheduler.num_rows + sum(job.num_rows for job in waiting)
            if num_rows > self.limits.max_rows and len(waiting) > self.limits.max_queue:
                raise APIError(
                    429,
                    f"expected at most {self.limits.max_queue} waiting prompts, found {len(waiting)}",
                    kind="rate_limit_error",
                    code="queue_full",
                    retry=True,
                )
            self._new.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job, *, choice: int | None = None) -> None:
        """Cancel a job, or end one of its answers; its rows leave the batch before the next step."""
        with self._changed:
            if choice is None:
                job.is_cancelled = True
            elif isinstance(job, Generation):
                job.cancelled_choices.add(choice)
            self._changed.notify()

    def forget(self, context: Context) -> None:
        """Drop the cached states that continue from a deleted context."""
        with self._changed:
            self._forgotten.append(context)
            self._changed.notify()

    def _run(self) -> None:
        has_work = False
        while True:
            with self._changed:
                while not (has_work or self._new or self._forgotten or self._is_stopped):
                    self._changed.wait()
                new, self._new = self._new, []
                forgotten, self._forgotten = self._forgotten, []
                is_stopped = self._is_stopped
                for job in new:
                    self.scheduler.add(job)
            if is_stopped:
                self.scheduler.fail_all(shutting_down())
                return
            try:
                for context in forgotten:
                    self.scheduler.forget(context)
                has_work = self.scheduler.step()
            except Exception as error:
                # A bug in the scheduler itself. The server must still answer.
                _log.exception("a step failed")
                self.scheduler.fail_all(error)
                has_work = False

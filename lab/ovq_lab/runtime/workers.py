"""Running a few independent jobs side by side, each in a process of its own, with one display of their
progress.

Two small models trained side by side, each with one thread, finish sooner than one after the other with two
threads. Operations this small gain little from a second thread, and wait for it at every step when the
machine has other work to do.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from ovq.runtime.progress import Reporter, Work
from ovq_lab.runtime.allocator import keep_freed_memory

Job = TypeVar("Job")
Result = TypeVar("Result")

# Models this small gain nothing from more threads than this.
_MOST_THREADS = 4
_SECONDS_BETWEEN_LOOKS = 0.05


class RemoteReporter:
    """A `Reporter` for a worker process: the process that started the worker shows what is reported.

    Args:
        messages: The queue between the two processes.
    """

    def __init__(self, messages: Any) -> None:
        self._messages = messages
        self._numbers = itertools.count()

    def start(self, label: str, *, total: int) -> RemoteWork:
        """Begin a piece of work of `total` units."""
        return RemoteWork(self._messages, (os.getpid(), next(self._numbers)), label, total)

    def say(self, text: str) -> None:
        """Print a line."""
        self._messages.put(text)


class RemoteWork:
    """One piece of work of a `RemoteReporter`."""

    def __init__(self, messages: Any, key: tuple[int, int], label: str, total: int) -> None:
        self._messages = messages
        self._start = {"key": key, "label": label, "total": total}
        self.update(0)

    def update(self, done: int, *, note: str = "") -> None:
        """Report that `done` units are finished, with a note on the state of the work."""
        self._messages.put(self._start | {"done": done, "note": note})


def run_jobs(
    function: Callable[[Job, RemoteReporter], Result],
    jobs: Sequence[Job],
    *,
    reporter: Reporter,
    num_workers: int | None = None,
    label: str | None = None,
) -> list[Result]:
    """Run a function on every job, with as many jobs at a time as PyTorch would use threads.

    Args:
        function: Called as `function(job, reporter)` in a worker process. The function, the jobs and the
            results are pickled.
        jobs: The arguments of the calls; jobs are started in this order.
        reporter: Shows the progress of all of them.
        num_workers: Jobs at a time, for work that the number of cores does not limit; None: as many as
            PyTorch would use threads.
        label: Name of a bar for all jobs together; if None, there is no such bar.

    Returns:
        The results, in the order of the jobs.

    Raises:
        Exception: The first that a job raises. The other jobs are then ended at once, as they are after
            Ctrl-C.
    """
    num_cores = torch.get_num_threads()
    num_workers = max(1, min(len(jobs), num_workers or num_cores))
    num_threads = max(1, min(_MOST_THREADS, num_cores // num_workers))
    work = None if label is None else reporter.start(label, total=len(jobs))
    # A forked process would inherit the locks of this process's threads.
    context = multiprocessing.get_context("spawn")
    # A queue without a thread, so that the messages of a job arrive before its result.
    messages = context.SimpleQueue()
    works: dict[Hashable, Work] = {}
    with ProcessPoolExecutor(num_workers, context, _begin, (messages, num_threads)) as executor:
        try:
            with _ctrl_c_waits():
                futures = [executor.submit(_call, function, job) for job in jobs]
            processes = multiprocessing.active_children()
            running = set(futures)
            while running:
                done, running = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                _show(messages, reporter, works)
                for future in done:
                    future.result()
                if done and work is not None:
                    work.update(len(jobs) - len(running))
                # The executor checks this too, but its thread was once found dead, and the jobs with it.
                if running and any(process.exitcode for process in processes):
                    raise BrokenProcessPool("a worker process terminated abruptly")
            return [future.result() for future in futures]
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends, and never reach the processes that are started in it.

    It is sent to all of them, and each would show where it was among its imports.
    """
    if not hasattr(signal, "pthread_sigmask"):
        # On Windows.
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _show(messages: Any, reporter: Reporter, works: dict[Hashable, Work]) -> None:
    """Pass on all messages that there are; `works` has the pieces of work that they have told of, by key."""
    while not messages.empty():
        message = messages.get()
        if isinstance(message, str):
            reporter.say(message)
        else:
            key, done = message["key"], message["done"]
            if key not in works:
                works[key] = reporter.start(message["label"], total=message["total"])
            if done:
                works[key].update(done, note=message["note"])


def _begin(messages: Any, num_threads: int) -> None:
    """Prepare a worker process."""
    global _reporter
    _reporter = RemoteReporter(messages)
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    # Ctrl-C reaches all processes; the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the process that started it is gone, even by kill -9.

    Otherwise the job would continue unnoticed, beside the same job of a restarted command.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_reporter: RemoteReporter
"""The reporter of this worker process."""


def _call(function: Callable[[Job, RemoteReporter], Result], job: Job) -> Result:
    """Run a job in a worker process."""
    return function(job, _reporter)

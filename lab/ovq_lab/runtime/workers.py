"""A pool of worker processes for a few independent jobs, with one progress display.

Two small models trained in parallel, each with one thread, finish sooner than one after the other with two
threads. Operations this small gain little from a second thread, and wait for it at every step when the
machine is busy with other work.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
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
    """A `Reporter` for a worker process, which forwards reports to the parent process by a queue."""

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
        """Report that `done` units are finished, with a note on the current state."""
        self._messages.put(self._start | {"done": done, "note": note})


def run_jobs(
    function: Callable[[Job, RemoteReporter], Result],
    jobs: Sequence[Job],
    *,
    reporter: Reporter,
    num_workers: int | None = None,
    label: str | None = None,
) -> list[Result]:
    """Run a function on every job in parallel processes, by default as many as PyTorch uses threads.

    Args:
        function: Called as `function(job, reporter)` in a worker process. The function, the jobs and the
            results are pickled.
        num_workers: Jobs at a time, for work that is not limited by the number of cores; None: as many as
            PyTorch uses threads.

    Raises:
        Exception: The first that a job raises. The other jobs are then terminated at once, as after Ctrl-C.
        OSError: If a worker process is killed; likewise.
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
        # Filled by `submit`. `multiprocessing.active_children()` would be those of others, too.
        workers = executor._processes
        try:
            with _ctrl_c_waits():
                futures = [executor.submit(_call, function, job) for job in jobs]
            processes = list(workers.values())
            running = set(futures)
            while running:
                done, running = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                _show(messages, reporter, works)
                for future in done:
                    future.result()
                if done and work is not None:
                    work.update(len(jobs) - len(running))
                # The executor checks this too, but its thread was once found dead together with the jobs.
                if running and any(process.exitcode for process in processes):
                    raise BrokenProcessPool("a worker process terminated abruptly")
            return [future.result() for future in futures]
        except BaseException as error:
            # The executor then finds itself broken, and the end of the block waits for its thread: one that
            # still ends while Python does may print a traceback.
            for process in list(workers.values()):
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise OSError("a worker process was killed, perhaps because memory ran out") from error
            raise


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Delay Ctrl-C until the block ends, and block it in the processes that are started within.

    It is sent to all of them, and each would print a traceback from its imports.
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
    """Forward all waiting messages to the reporter; `works` has the pieces of work seen so far, by key."""
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
    global _reporter
    _reporter = RemoteReporter(messages)
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    # Ctrl-C reaches all processes; the parent terminates the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent process is gone, even by kill -9.

    Otherwise the job would continue unnoticed, in parallel to the same job of a restarted command.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_reporter: RemoteReporter
"""The reporter of this worker process."""


def _call(function: Callable[[Job, RemoteReporter], Result], job: Job) -> Result:
    try:
        return function(job, _reporter)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            # Otherwise the parent could not read it, and would call the worker killed.
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise

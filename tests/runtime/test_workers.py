"""Jobs side by side: their results and progress come back, and nobody waits for a job that cannot end."""

import ctypes
import io
import os
import signal
import sys
import threading
import time

import pytest
import torch
from rich.console import Console

from ovq.runtime.progress import Reporter
from ovq_lab.runtime import workers
from ovq_lab.runtime.allocator import keep_freed_memory
from ovq_lab.runtime.workers import run_jobs
from tests.processes import forked


def look_around(job, reporter):
    """A job that tells about its process, once there are two; the first ends last."""
    job, folder = job
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    time.sleep(0.2 - 0.1 * job)
    work = reporter.start(f"job {job}", total=2)
    work.update(1, note="half")
    work.update(2, note="done")
    # As it was before the worker had its own handler.
    is_blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return job, os.getpid(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), is_blocked


class Unpicklable(Exception):
    """Holds a function that exists in one process alone."""


def end_badly(job, _reporter):
    """A job that fails, is killed, or goes on for longer than anyone would wait."""
    if job == "fail":
        raise ValueError("expected luck, found none")
    if job == "fail with what cannot be pickled":
        raise Unpicklable("expected a reason", lambda: None)
    if job == "be killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


def fail_later(_job, _reporter):
    """A job that lasts until a process that was started before it has failed, and fails otherwise."""
    time.sleep(0.5)
    raise ValueError("expected luck, found none")


def test_results_come_in_the_order_of_the_jobs(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    console = Console(file=io.StringIO(), force_terminal=False, width=100, record=True)
    with Reporter(console) as reporter:
        results = run_jobs(look_around, [(job, tmp_path) for job in (0, 1, 2)], reporter=reporter)
    assert [job for job, *_ in results] == [0, 1, 2]
    processes = {process for _, process, *_ in results}
    assert os.getpid() not in processes
    assert len(processes) == 2
    # Two cores for two workers; Ctrl-C is left to the process that started them.
    assert {tuple(settings) for _, _, *settings in results} == {(1, signal.SIG_IGN, True)}
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    lines = console.export_text().splitlines()
    for job in (0, 1, 2):
        assert [line for line in lines if line.startswith(f"job {job}:")] == [
            f"job {job}: 0/2 (0 s)",
            f"job {job}: 2/2 (done, 0 s)",
        ]


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        ("fail", ValueError, "expected luck, found none"),
        ("fail with what cannot be pickled", RuntimeError, "Unpicklable: .*expected a reason"),
        ("be killed", OSError, "a worker process was killed, perhaps because memory ran out"),
    ],
)
def test_a_job_that_fails_ends_the_others(job, error, message, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    begun, before = time.monotonic(), threading.enumerate()
    with Reporter(Console(quiet=True)) as reporter, pytest.raises(error, match=message):
        run_jobs(end_badly, [job, "sleep"], reporter=reporter)
    assert time.monotonic() - begun < 120
    # The pool's own would print a traceback if Python ended just then, as it does after Ctrl-C.
    assert threading.enumerate() == before


def test_other_processes_of_the_program_are_none_of_its_business(monkeypatch):
    """Neither is one that fails taken for a worker, nor one that goes on ended with the workers."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    failing, going_on = forked(sys.exit, 3), forked(time.sleep, 300)
    failing.start()
    going_on.start()
    try:
        with Reporter(Console(quiet=True)) as reporter, pytest.raises(ValueError, match="expected luck"):
            run_jobs(fail_later, [0], reporter=reporter)
        assert failing.exitcode == 3
        going_on.join(0.5)
        assert going_on.exitcode is None
    finally:
        going_on.kill()
        going_on.join()


@pytest.mark.parametrize(
    ("num_cores", "num_jobs", "expected"),
    [(1, 3, (1, 1)), (2, 3, (2, 1)), (6, 3, (3, 2)), (64, 3, (3, 4)), (8, 1, (1, 4))],
)
def test_cores_are_shared_among_the_workers(num_cores, num_jobs, expected, monkeypatch):
    seen = []

    def record(num_workers, _context, _begin, arguments):
        seen.append((num_workers, arguments[1]))
        raise InterruptedError

    monkeypatch.setattr(torch, "get_num_threads", lambda: num_cores)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", record)
    with pytest.raises(InterruptedError):
        run_jobs(look_around, list(range(num_jobs)), reporter=Reporter(Console(quiet=True)))
    assert seen == [expected]


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_the_allocator_takes_its_settings(monkeypatch):
    assert keep_freed_memory() == hasattr(ctypes.CDLL(None), "mallopt")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False

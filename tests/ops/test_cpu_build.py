"""Compiled kernels that cannot be had: what goes wrong costs speed and one warning, and nothing else."""

import _ctypes
import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import re
import select
import shlex
import shutil
import stat
import subprocess
import threading
from pathlib import Path
from unittest import mock

import filelock
import pytest
import torch

from ovq.ops import cpu_kernels
from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.compiler import FOLDER, find_compiler
from tests.disks import full_disk
from tests.ops.common import assert_same_state, attend, inputs
from tests.ops.compiling import Compiler, restart, warned

needs_compiler = pytest.mark.skipif("compiled" not in cpu_kernels(), reason=cpu_kernels())


def result():
    q, k, v = inputs(1, 60, 2, 1, 8, 8, dtype=torch.float32)
    return attend(q, k, v, num_slots=8, chunk_size=8)


def kernel_files(folder):
    """All that is in a folder, hidden or not; nothing but whole kernels should be."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@needs_compiler
def test_no_macro_is_defined_anew(tmp_path):
    command = [*find_compiler(), "-std=c++17", "-E", FOLDER / "kernels.cpp", "-o", tmp_path / "kernels.i"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "redefined" not in said


class Rank(threading.local):
    """The number of a thread."""

    def set(self, value):
        self.value = value


@pytest.fixture(scope="module")
def usual():
    """What comes out with the kernels of this machine, if it has any."""
    return result()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("OVQ_CPU_KERNELS", "0", "switched off by OVQ_CPU_KERNELS=0"),
        ("CXX", "no-such-compiler", "no-such-compiler cannot be run"),
        ("CXX", "false", "false failed: exit status 1"),
        (
            "CXX",
            "c++ 'of mine",
            r"CXX: expected a command, found \"c\+\+ 'of mine\" \(No closing quotation\)",
        ),
        ("PATH", "", r"no C\+\+ compiler found"),
    ],
)
def test_without_a_compiler_plain_pytorch_does_it(usual, fresh, variable, value, reason, runs):
    expected, state = usual
    fresh.setenv(variable, value)
    if variable == "PATH":
        fresh.delenv("CXX", raising=False)
    said, early = warned(cpu_kernels)
    assert said.startswith("not available: ")
    with pytest.raises(build.Unavailable, match=reason):
        build.load()
    (o, plain_state), now = warned(result)
    _, later = warned(result)
    assert runs == []
    torch.testing.assert_close(o, expected)
    assert_same_state(plain_state, state, tolerance=0)
    # Who asks gets an answer; a warning is for who does not, once, and not for who wants none.
    assert early == later == []
    if variable == "OVQ_CPU_KERNELS":
        assert now == []
    else:
        [message] = now
        assert re.search(rf"{reason}.*at about a third of the speed", message)


def test_a_failure_is_remembered(fresh, tmp_path):
    failing = Compiler(tmp_path / "bin", "printf 'included\\nerror: \\377 is no text' >&2; exit 1")
    fresh.setenv("CXX", str(failing.path))
    for _ in range(3):
        assert result()[0].isfinite().all()
    assert "failed: error: \N{REPLACEMENT CHARACTER} is no text" in cpu_kernels()
    assert len(failing.calls) == 1
    assert kernel_files(tmp_path / "cache") == kernel_files(tmp_path / "temporary") == []


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("no more threads")])
def test_no_error_of_the_system_escapes_the_op(fresh, error):
    def broken(command, flags):
        raise error

    fresh.setattr(build.compiler, "fingerprint", broken)
    fresh.setattr(build.compiler, "find_compiler", lambda: ["c++"])
    (o, _), messages = warned(result)
    assert o.isfinite().all()
    assert [str(error) in message for message in messages] == [True]


@needs_compiler
def test_compiled_once_and_kept(fresh, tmp_path):
    # The compiler there is, told last of all not to take its time.
    quick = tmp_path / "quick"
    quick.write_text(f'#!/bin/sh\nexec {shlex.join(build.compiler.find_compiler())} "$@" -O0\n')
    quick.chmod(0o755)
    fresh.setenv("CXX", str(quick))
    # A disk of temporary files that cannot be used is no hindrance to the compiler.
    (tmp_path / "file").write_text("no folder")
    fresh.setenv("TMPDIR", str(tmp_path / "file"))
    _, messages = warned(result)
    assert messages == []
    [path] = kernel_files(tmp_path / "cache")
    written = path.stat().st_mtime_ns
    restart(fresh)
    result()
    assert path.stat().st_mtime_ns == written
    assert list((tmp_path / "temporary").iterdir()) == []


@needs_compiler
def test_kept_kernels_need_no_compiler(compiler, fresh, tmp_path):
    cpu_kernels()
    # Those of another compiler, named before these, that this system cannot load.
    [kept] = (tmp_path / "cache" / "ovq").glob("*.so")
    foreign, common = b"of another system", kept.name.split("-")[1]
    other = build._file_name(f"kernels-{common}-0", foreign)
    kept.with_name(other).write_bytes(foreign)
    assert other < kept.name
    fresh.delenv("CXX")
    fresh.setenv("PATH", "")
    restart(fresh)
    assert cpu_kernels() == "compiled for this processor"


@needs_compiler
def test_temporary_files_of_the_compiler_lie_beside_the_kernels(compiler, tmp_path):
    assert cpu_kernels() == "compiled for this processor"
    folder = tmp_path / "cache" / "ovq"
    assert {Path(call).parent for call in compiler.calls} == {folder}
    assert [path.suffix for path in folder.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no locks on this system")
def test_the_folder_of_a_build_that_was_killed_goes_with_the_next_one(compiler, tmp_path):
    left = tmp_path / "cache" / "ovq" / ".ovq-build-left"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    assert cpu_kernels() == "compiled for this processor"
    assert [path.suffix for path in left.parent.iterdir()] == [".so"]


def unwritable(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")


def homeless(monkeypatch, tmp_path):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)


def not_executable(monkeypatch, tmp_path):
    """As on a disk mounted without the right to run code: all can be done but to load it."""
    load = ctypes.CDLL

    def refuse(path):
        if path.startswith(str(tmp_path / "cache")):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)


@needs_compiler
@pytest.mark.parametrize("hinder", [unwritable, homeless, not_executable])
def test_a_cache_that_cannot_be_used_is_no_hindrance(fresh, compiler, tmp_path, hinder):
    """The kernels then lie among the temporary files, where the next process finds them."""
    hinder(fresh, tmp_path)
    for _ in range(3):
        assert cpu_kernels() == "compiled for this processor"
        restart(fresh)
    assert len(compiler.calls) == 2, "once compiled, once linked"
    [folder] = (tmp_path / "temporary").iterdir()
    assert folder.name == f"ovq-{os.geteuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def readable(folder, tmp_path):
    folder.mkdir(mode=0o755)


def elsewhere(folder, tmp_path):
    (tmp_path / "other").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "other")


def no_folder(folder, tmp_path):
    folder.write_text("text")


def of_another(folder, tmp_path):
    folder.mkdir(mode=0o700)


@needs_compiler
@pytest.mark.parametrize("make", [readable, elsewhere, no_folder, of_another])
def test_code_is_taken_from_no_folder_that_others_may_write(fresh, compiler, tmp_path, make):
    unwritable(fresh, tmp_path)
    folder = tmp_path / "temporary" / f"ovq-{os.geteuid()}"
    make(folder, tmp_path)
    if make is of_another:
        own = os.geteuid()
        folder = folder.rename(folder.with_name(f"ovq-{own + 1}"))
        fresh.setattr(os, "geteuid", lambda: own + 1)
    elif make is not no_folder:
        # What would be loaded, were it looked at.
        command = build.compiler.find_compiler()
        stem = f"kernels-{build.compiler.fingerprint(command, build.compiler.NATIVE)}"
        build._store((tmp_path / "made").read_bytes(), folder, stem)
    assert f"{folder}: expected a private folder of this user" in cpu_kernels()
    assert compiler.calls == []


def others_write(path):
    path.chmod(0o757)


def others_own(path):
    os.chown(path, 1234, 1234)


def others_link(path):
    target = path.rename(path.with_name("other"))
    path.symlink_to(target)
    os.lchown(path, 1234, 1234)


@needs_compiler
@pytest.mark.parametrize("change", [others_write, others_own, others_link])
@pytest.mark.parametrize("is_file", [True, False])
def test_code_in_the_cache_that_others_may_change_is_made_anew(
    fresh, compiler, made, tmp_path, change, is_file
):
    if change is not others_write and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    cache = tmp_path / "cache" / "ovq"
    cache.mkdir(parents=True)
    command = build.compiler.find_compiler()
    stem = f"kernels-{build.compiler.fingerprint(command, build.compiler.NATIVE)}"
    path = build._store(made, cache, stem)
    change(path if is_file else cache)
    for _ in range(2):
        assert cpu_kernels() == "compiled for this processor"
        assert len(compiler.calls) == 2, "once compiled, once linked"
        expected = cache if is_file else tmp_path / "temporary" / f"ovq-{os.geteuid()}"
        assert Path(build.load()._name).parent == expected
        restart(fresh)


@needs_compiler
def test_others_cannot_change_the_kernels_whatever_the_umask(fresh, compiler, tmp_path):
    before = os.umask(0)
    try:
        assert cpu_kernels() == "compiled for this processor"
    finally:
        os.umask(before)
    [path] = kernel_files(tmp_path / "cache")
    assert not (path.stat().st_mode | path.parent.stat().st_mode) & 0o022


@needs_compiler
def test_a_full_disk_costs_the_kernels_and_leaves_nothing(fresh, compiler, tmp_path, runs):
    with full_disk(20_000):
        (o, _), messages = warned(result)
    assert o.isfinite().all()
    assert runs == compiler.calls == []
    assert len(messages) == 1
    assert f"File too large: '{tmp_path / 'cache' / 'ovq'}'" in messages[0]
    for folder in ("cache", "temporary"):
        assert kernel_files(tmp_path / folder) == []
    assert [path.name for path in (tmp_path / "cache" / "ovq").iterdir()] == []


@needs_compiler
@pytest.mark.parametrize("keep", [0, 9, 4096, 8 * 4096, -1])
def test_a_file_cut_short_is_made_anew(fresh, compiler, tmp_path, made, keep):
    cpu_kernels()
    [path] = kernel_files(tmp_path / "cache")
    # Another file, as this process has the old one in memory.
    path.unlink()
    path.write_bytes(made[:keep])
    restart(fresh)
    assert cpu_kernels() == "compiled for this processor"
    assert len(compiler.calls) == 4
    assert path.read_bytes() == made


@needs_compiler
def test_the_kernels_are_on_the_disk_before_they_have_their_name(compiler, fresh):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        fresh.setattr(os, name, lambda *a, name=name, call=call: (done.append(name), call(*a))[1])
    cpu_kernels()
    assert done[-2:] == ["fsync", "replace"]


@needs_compiler
def test_what_cannot_be_loaded_is_named_and_not_made_again(fresh, compiler, tmp_path):
    (tmp_path / "made").write_bytes(b"not a library")
    for _ in range(3):
        assert f"none made here: {tmp_path / 'cache' / 'ovq'}" in cpu_kernels()
        restart(fresh)
    assert result()[0].isfinite().all()
    assert len(compiler.calls) == 2, "once compiled, once linked"


def test_a_compiler_that_makes_nothing_is_named_and_not_asked_twice(fresh, tmp_path, runs):
    idle = Compiler(tmp_path / "bin", "exit 0")
    fresh.setenv("CXX", f"{idle.path} --flag")
    (o, _), [message] = warned(result)
    assert o.isfinite().all()
    assert runs == []
    assert f"{idle.path} --flag reported success, but wrote no library)" in message
    assert len(idle.calls) == 2, "once compiled, once linked"
    assert kernel_files(tmp_path / "cache") == kernel_files(tmp_path / "temporary") == []


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(fresh, tmp_path, runs):
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    hanging = Compiler(
        tmp_path / "bin", f"sleep 600 > {tmp_path / 'fifo'} & echo > {tmp_path / 'begun'}; wait"
    )
    fresh.setenv("CXX", str(hanging.path))
    fresh.setattr(build.compiler, "TIMEOUT", 1)
    (o, _), [message] = warned(result)
    assert o.isfinite().all()
    assert runs == []
    assert f"{hanging.path} did not finish within 1 s)" in message
    # Readable means that nobody has it open for writing any more.
    assert select.select([fifo], [], [], 60)[0]
    assert os.read(fifo, 1) == b""
    os.close(fifo)


def test_a_library_without_kernels_is_named(fresh, tmp_path, runs):
    """As `CXX="g++ -fvisibility=hidden"` makes it."""
    (tmp_path / "other").write_bytes(Path(_ctypes.__file__).read_bytes())
    other = Compiler(tmp_path / "bin", f'cp {tmp_path / "other"} "$last"')
    fresh.setenv("CXX", str(other.path))
    (o, _), [message] = warned(result)
    assert o.isfinite().all()
    assert runs == []
    assert "expected a library of kernels, found one without them" in message


@needs_compiler
def test_processes_that_start_at_once_do_not_meet(compiler, tmp_path, made):
    """Threads without the lock that threads have: all they share is the disk, as processes do."""
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda _: build._attempt.__wrapped__(), range(6)))
    assert all(isinstance(outcome, build.Kernels) for outcome in outcomes), outcomes
    [path] = kernel_files(tmp_path / "cache")
    assert path.read_bytes() == made
    assert len(compiler.calls) == 2, "one compiles and links, and the others wait"


@needs_compiler
@pytest.mark.parametrize("error", [None, OSError(37, "No locks available"), NotImplementedError("no flock")])
def test_processes_that_have_waited_in_vain_compile_themselves(compiler, fresh, tmp_path, error):
    """Another one holds the lock for too long, or there are no locks on this disk."""
    fresh.setattr(build.compiler, "TIMEOUT", 0.05)
    fresh.setattr(build.compiler, "_run", lambda command, place: shutil.copy(tmp_path / "made", command[-1]))
    command = build.compiler.find_compiler()
    stem = f"kernels-{build.compiler.fingerprint(command, build.compiler.NATIVE)}"
    folder = tmp_path / "cache" / "ovq"
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        if error is None:
            stack.enter_context(filelock.FileLock(folder / f".{stem}.lock"))
        else:
            fresh.setattr(filelock.FileLock, "_acquire", raises(error))
        assert cpu_kernels() == "compiled for this processor"
    assert [path.suffix for path in kernel_files(tmp_path / "cache")] == [".so"]


def raises(error):
    def refuse(*_):
        raise error

    return refuse


@needs_compiler
def test_threads_that_start_at_once_compile_once(compiler, fresh):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert len({id(library) for library in pool.map(lambda _: build.load(), range(6))}) == 1
    assert len(compiler.calls) == 2, "once compiled, once linked"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_process_forked_while_a_thread_builds_does_not_wait_for_it():
    forked = multiprocessing.get_context("fork").Process(target=build.origin)
    with build._lock:
        forked.start()
        forked.join(timeout=60)
        is_waiting = forked.is_alive()
        forked.kill()
    assert not is_waiting


@needs_compiler
def test_where_torch_has_no_openmp_one_thread_does_it(usual, fresh, compiler, tmp_path, runs):
    # The kernels themselves are a library without OpenMP.
    fresh.setattr(torch._C, "__file__", str(tmp_path / "made"))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        said, messages = warned(cpu_kernels)
        o, state = result()
    finally:
        torch.set_num_threads(before)
    assert said == "compiled for this processor, for one thread (torch has loaded no OpenMP library)"
    assert messages == []
    assert runs == ["ovq_forward"]
    torch.testing.assert_close(o, usual[0])
    assert_same_state(state, usual[1], tolerance=0)


def test_the_threads_of_torch_are_handed_over(monkeypatch):
    kernels, load = mock.Mock(), ctypes.CDLL
    monkeypatch.setattr(build, "check_mirrors", lambda library: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: kernels if path == "made" else load(path))
    assert build._loaded(Path("made"), "so")[1] == "so"
    given = kernels.ovq_use_threads.call_args.args
    assert len(given) == 4
    assert all(function.value for function in given)


@needs_compiler
def test_threads_are_those_handed_over(usual, fresh, compiler):
    """An OpenMP library of this test's own that has two threads for whoever asks for three."""
    asked = []

    @ctypes.CFUNCTYPE(
        None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    )
    def parallel(function, argument, num_threads, flags):
        asked.append((num_threads, flags))
        threads = [threading.Thread(target=lambda i=i: (ranks.set(i), function(argument))) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    ranks = Rank()
    barrier = threading.Barrier(2, timeout=60)
    number = ctypes.CFUNCTYPE(ctypes.c_int)
    functions = parallel, number(lambda: 2), number(lambda: ranks.value), ctypes.CFUNCTYPE(None)(barrier.wait)
    build.load().ovq_use_threads(*functions)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        o, state = result()
    finally:
        torch.set_num_threads(before)
    assert asked == [(3, 0)]
    torch.testing.assert_close(o, usual[0])
    assert_same_state(state, usual[1], tolerance=0)

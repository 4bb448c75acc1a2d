"""Files are written in one piece."""

import concurrent.futures
import contextlib
import errno
import multiprocessing
import os
import stat
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ovq.byte_tokens import byte_tokenizer
from ovq.runtime.files import (
    TemporaryFolder,
    atomic_folder,
    atomic_path,
    cache_folder,
    claimed,
    write_atomic,
)
from tests.disks import full_disk


def test_a_file_is_replaced_by_the_whole_new_one(tmp_path):
    path = tmp_path / "results.json"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    """With the rights of root, /dev/null would be gone for all programs."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"expected a file or a new path, found a device or a pipe: {path}"):
        write_atomic(path, "new")
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    folder, path, link = tmp_path / "folder", tmp_path / "folder" / "file.txt", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(path)
    # First to a file that is not there yet.
    for text in ("old", "new"):
        write_atomic(link, text)
        assert (link.is_symlink(), path.read_text()) == (True, text)
    assert sorted(tmp_path.rglob("*")) == [folder, path, link]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "results.json"
    write_atomic(path, "old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_the_file_is_as_readable_as_any_other(tmp_path, mask):
    with umask(mask):
        write_atomic(tmp_path / "ours", "text")
        with atomic_path(tmp_path / "weights") as temporary:
            save_file({"one": np.ones(1)}, temporary)
        (tmp_path / "any").write_text("text")
    assert permissions(tmp_path / "ours") == permissions(tmp_path / "any") == 0o666 & ~mask


def test_other_threads_keep_their_umask(tmp_path):
    """Files that another thread makes meanwhile are as private as they should be."""
    is_done = threading.Event()

    def write():
        while not is_done.is_set():
            write_atomic(tmp_path / "ours", "text")
        with atomic_path(tmp_path / "weights") as temporary:
            save_file({"one": np.ones(1)}, temporary)

    with umask(0o077):
        thread = threading.Thread(target=write)
        thread.start()
        try:
            for i in range(3000):
                os.close(os.open(tmp_path / f"{i}", os.O_CREAT | os.O_WRONLY, 0o666))
        finally:
            is_done.set()
            thread.join()
    assert {permissions(path) for path in tmp_path.iterdir()} == {0o600}


def test_writers_at_once_do_not_meet(tmp_path):
    path = tmp_path / "results.json"
    texts = [str(i) * 100_000 for i in range(4)]

    def write(text):
        for _ in range(10):
            write_atomic(path, text)
            assert path.read_text() in texts

    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert os.listdir(tmp_path) == ["results.json"]


def test_the_temporary_file_has_the_ending_and_the_folder_of_the_file(tmp_path):
    with atomic_path(tmp_path / "a.b.svg") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".svg")


def test_a_name_as_long_as_names_can_be(tmp_path):
    write_atomic(tmp_path / ("n" * 251 + ".txt"), "text")
    assert [len(name) for name in os.listdir(tmp_path)] == [255]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "results.json"
    write_atomic(path, "old")
    with full_disk(100), pytest.raises(OSError, match=r"File too large: '.*/results\.json'"):
        write_atomic(path, "new" * 100)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_whatever_cannot_be_written_to_a_folder_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "model"

    def made(save):
        with full_disk(2000), atomic_folder(path) as temporary:
            temporary.mkdir()
            save(temporary)

    for save in (
        byte_tokenizer().save_pretrained,
        lambda folder: save_file({"weight": np.zeros(1000)}, folder / "model.safetensors"),
        lambda folder: (folder / "README.md").write_text("card" * 1000),
    ):
        with pytest.raises(OSError, match=r"/model: cannot be written \(.*File too large"):
            made(save)
        assert os.listdir(tmp_path) == []
    with pytest.raises(TypeError):
        made(len)
    with pytest.raises(RuntimeError, match="tried to allocate"):
        made(lambda _: torch.empty(10**15))


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "no" / "a.txt", tmp_path / "file" / "a.txt"):
        with pytest.raises(OSError, match=rf"'{path}'$"):
            write_atomic(path, "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder'$"):
        write_atomic(tmp_path / "folder", "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_without_a_home_there_is_no_cache_and_it_is_said_how_to_have_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ovq"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(OSError, match="expected an absolute XDG_CACHE_HOME or a home folder"):
        cache_folder()


@pytest.mark.parametrize("given", ["cache", "~/cache", ""])
def test_a_cache_that_would_move_with_the_working_folder_is_that_of_the_home(given, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == tmp_path / ".cache" / "ovq"


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "file", "text")


def test_a_folder_is_claimed_by_one_at_a_time(tmp_path, monkeypatch):
    """On a network file system, too, where a folder cannot be locked but a file in it can."""
    fcntl = pytest.importorskip("fcntl")
    lock = fcntl.flock

    def of_files_alone(descriptor, operation):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(descriptor, operation)

    for flock in (lock, of_files_alone):
        monkeypatch.setattr(fcntl, "flock", flock)
        with claimed(tmp_path / "new", command="ovq train"):
            assert (tmp_path / "new" / ".lock").exists() == (flock is not lock)
            with (
                pytest.raises(ValueError, match=r"no other `ovq train` is writing to, found .*new"),
                claimed(tmp_path / "new", command="ovq train"),
            ):
                pass
        with claimed(tmp_path / "new", command="ovq train"):
            pass


def _folder_of_a_process_that_is_killed(pipe, place):
    folder = TemporaryFolder("killed", place)
    pipe.send(folder.name)
    time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no locks on this system")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_temporary_folder_of_a_killed_process_goes_with_the_next_one(tmp_path, monkeypatch, in_place):
    place = tmp_path if in_place else None
    if not in_place:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_folder_of_a_process_that_is_killed, args=(theirs, place)
    )
    process.start()
    left = Path(ours.recv())
    (left / "captures").write_bytes(b"much")
    old = time.time() - 3600
    os.utime(left, (old, old))
    with TemporaryFolder("killed", place):
        # It is at work.
        assert left.exists()
    process.kill()
    process.join()
    with TemporaryFolder("other", place):
        assert left.exists()
    with TemporaryFolder("killed", place) as folder:
        assert list(tmp_path.iterdir()) == [Path(folder)]
    assert not list(tmp_path.iterdir())

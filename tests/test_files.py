"""Files are written in one piece."""

import os
import stat

import pytest

from ovq.files import atomic_path, write_atomic


def test_a_file_is_replaced_by_the_whole_new_one(tmp_path):
    path = tmp_path / "results.json"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["results.json"]


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


def test_the_file_is_as_readable_as_any_other(tmp_path):
    umask = os.umask(0o022)
    try:
        write_atomic(tmp_path / "a", "text")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "file", "text")

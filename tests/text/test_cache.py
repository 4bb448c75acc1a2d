"""Folders in the user's cache: made once, whole, and as private as the user wants them."""

import os
import shutil
import stat
import tempfile

import pytest

from ovq_lab.text.cache import cached_folder


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ovq" / "text"


def fill(folder):
    (folder / "a").write_text("made")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_folder_is_as_private_as_any_other(cache, mask):
    before = os.umask(mask)
    try:
        folder = cached_folder([f"{mask}"], fill)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


def test_what_a_killed_process_has_left_is_cleared_away(cache, monkeypatch):
    def killed(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Killed, it clears nothing away.
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            cached_folder(["text"], killed)
    assert [path.name for path in cache.glob(".unfinished-*/*")] == ["half"]
    folder = cached_folder(["text"], fill)
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_an_error_leaves_no_folder(cache):
    with pytest.raises(ZeroDivisionError):
        cached_folder(["text"], lambda folder: 1 / 0)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert (cached_folder(["text"], fill) / "a").read_text() == "made"


def test_where_the_cache_cannot_be_written_the_private_folder_of_the_user_does(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = cached_folder(["text"], fill)
    assert folder.parent == tmp_path / "temporary" / f"ovq-{os.geteuid()}" / "text"
    assert (cached_folder(["text"], lambda folder: 1 / 0) / "a").read_text() == "made"
    folder.parents[1].chmod(0o755)
    with pytest.raises(OSError, match=r"XDG_CACHE_HOME names one.*Not a directory.*private folder"):
        cached_folder(["text"], fill)


def test_what_a_cache_has_is_read_where_it_cannot_be_written(cache, monkeypatch):
    folder = cached_folder(["text"], fill)

    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert cached_folder(["text"], fill) == folder


def test_errors_of_the_filling_are_its_own(cache):
    """What cannot be read, or a full disk, is no reason to try again elsewhere."""

    def fails(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        cached_folder(["text"], fails)
    assert caught.value.errno == 28

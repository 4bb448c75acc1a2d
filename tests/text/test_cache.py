"""Folders in the user's cache: made once, whole, and as private as the user wants them."""

import os
import shutil
import stat

import pytest

from ovq.text.cache import cached_folder


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

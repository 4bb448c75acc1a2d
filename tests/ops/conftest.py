"""Machines on which nothing has been compiled yet, and kernels made before."""

import tempfile
from pathlib import Path

import pytest

from ovq.ops.backends.cpu import build
from tests.ops.compiling import restart


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine on which nothing has been compiled yet, with a cache and temporary files of its own.

    The installed package brings no kernels.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(build, "_PREBUILT", tmp_path / "prebuilt")
    monkeypatch.delenv("OVQ_CPU_KERNELS", raising=False)
    restart(monkeypatch)
    yield monkeypatch
    build._attempt.cache_clear()


@pytest.fixture(scope="session")
def made():
    """The bytes of kernels made before."""
    return Path(build.load()._name).read_bytes()

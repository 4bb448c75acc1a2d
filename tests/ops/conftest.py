"""Machines on which nothing has been compiled yet, and kernels made before."""

import contextlib
import tempfile
from pathlib import Path

import pytest

from ovq.ops.backends.cpu import build
from tests.ops.compiling import Compiler, restart


@pytest.fixture
def fresh(tmp_path):
    """A machine on which nothing has been compiled yet, with a cache and temporary files of its own.

    The installed package brings no kernels.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (tmp_path / "temporary").mkdir()
        patch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        patch.setattr(build, "_PREBUILT", tmp_path / "prebuilt")
        patch.delenv("OVQ_CPU_KERNELS", raising=False)
        restart(patch)
        yield patch
    # The usual ones again, before a test has another cache, where they would be compiled anew.
    build._attempt.cache_clear()
    with contextlib.suppress(build.Unavailable):
        build.load()


@pytest.fixture(scope="session")
def made():
    """The bytes of kernels made before."""
    return Path(build.load()._name).read_bytes()


@pytest.fixture
def compiler(made, tmp_path, fresh):
    (tmp_path / "made").write_bytes(made)
    compiler = Compiler(tmp_path / "bin", f'cp {tmp_path / "made"} "$last"')
    fresh.setenv("CXX", str(compiler.path))
    return compiler

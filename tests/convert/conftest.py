"""What a token of a converted model is done by: a kernel or modules."""

import sys

import pytest

from ovq.convert import attach

# `ovq.convert.attach` is also the name of the function in it.
ATTACH = sys.modules[attach.__module__]


@pytest.fixture
def steps(monkeypatch):
    """How many calls the kernel has done and the modules, as `[kernel, modules]`."""
    counts, real = [0, 0], ATTACH.token_output

    def counted(*args):
        done = real(*args)
        counts[done is None] += 1
        return done

    monkeypatch.setattr(ATTACH, "token_output", counted)
    return counts


@pytest.fixture
def by_modules(monkeypatch):
    """Runs a function by modules alone."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(ATTACH, "token_output", lambda *args: None)
            return function(*args)

    return run

"""Thirty calls of every backend, and proof that the fuzzer finds and shows what is wrong."""

import dataclasses
import functools

import pytest
from typer.testing import CliRunner

from ovq.convert.cache import MemoryLayer
from ovq.hf.cache import StateCache
from ovq.ops import OVQState, ovq_attention
from tests.fuzz import op
from tests.fuzz import run as run_module
from tests.fuzz.__main__ import app
from tests.fuzz.backends import BACKENDS
from tests.fuzz.program import shrunk
from tests.fuzz.run import KINDS, SHARES, drawn, report, run

CALLS = 30
PAIRS = [(kind, name) for name, backend in BACKENDS.items() for kind in backend.kinds]


@pytest.mark.parametrize(("kind", "backend"), PAIRS)
def test_random_programs(kind, backend):
    if reason := BACKENDS[backend].missing():
        pytest.skip(reason)
    # Triton's interpreter takes half a second a call: fewer of them, and states that take two seconds.
    calls, seed = (CALLS / 10, 4) if BACKENDS[backend].is_slow else (CALLS, 1)
    outcome = run(kind, backend, calls=round(calls * SHARES[kind]), seed=seed)
    assert outcome.num_run == round(calls * SHARES[kind])
    assert not outcome.failures, "\n".join(report(found, outcome) for found in outcome.failures.values())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_kernels_run_where_they_should(backend, runs):
    if reason := BACKENDS[backend].missing():
        pytest.skip(reason)
    run("op", backend, calls=30, seed=0)
    assert set(runs) == ({"ovq_forward", "ovq_backward"} if backend == "cpu" else set())


def without_mask(*tensors, attention_mask=None, backend="auto", **options):
    return ovq_attention(*tensors, backend=backend, **options)


@pytest.fixture
def few_tries(monkeypatch):
    """Programs that fail are made as simple as they get in fewer tries."""
    monkeypatch.setattr(run_module, "shrunk", functools.partial(shrunk, tries=20))


@pytest.fixture(params=["op", "states", "caches", "converted"])
def fault(request, monkeypatch):
    """A kind of programs, how many of which seed, and a fault that they have to find."""
    if request.param == "op":
        monkeypatch.setattr(op, "ovq_attention", without_mask)
    elif request.param == "states":
        monkeypatch.setattr(OVQState, "reorder", lambda state, index: state)
    elif request.param == "caches":
        monkeypatch.setattr(StateCache, "snapshot", lambda cache: cache)
    else:
        monkeypatch.setattr(MemoryLayer, "own_", lambda layer: layer.state)
        return "caches", 10, 3
    return request.param, *{"op": (10, 0), "states": (3, 3), "caches": (3, 15)}[request.param]


def test_a_fault_is_found_and_the_lines_that_are_printed_show_it(fault, few_tries):
    kind, calls, seed = fault
    outcome = run(kind, "torch", calls=calls, seed=seed)
    assert 0 < outcome.num_failed < outcome.num_run
    found = next(iter(outcome.failures.values()))
    lines = report(found, outcome).splitlines()[1:]
    assert lines[0].startswith("from tests.fuzz.")
    # Fewer fields and smaller numbers than the program that was drawn.
    assert len(lines[1]) < len(f"{found.program!r}.check('torch')")
    with pytest.raises((AssertionError, RuntimeError)):
        exec("\n".join(lines), {})


def test_the_same_lines_end_well_without_the_fault(few_tries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "ovq_attention", without_mask)
        outcome = run("op", "torch", calls=10, seed=0)
        lines = report(next(iter(outcome.failures.values())), outcome).splitlines()[1:]
    exec("\n".join(lines), {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_depends_on_its_seed_and_number_alone_and_is_written_down_whole(kind):
    programs = [drawn(kind, "torch", 3, number) for number in range(40)]
    assert programs == [drawn(kind, "torch", 3, number) for number in range(40)]
    assert len({repr(program) for program in programs}) == 40
    assert programs[5] != drawn(kind, "torch", 4, 5)
    for program in programs:
        assert eval(repr(program), {type(program).__name__: type(program)}) == program
        fields = [field.default for field in dataclasses.fields(program)]
        assert dataclasses.MISSING not in fields


def test_time_is_boxed():
    assert run("op", "torch", calls=10**9, seed=0, seconds=0.05).num_run < 1000


def test_the_command_line(few_tries, monkeypatch):
    arguments = ["--backend", "torch", "--kind", "op", "--calls", "10"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "torch" in result.stdout
    monkeypatch.setattr(op, "ovq_attention", without_mask)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "OpCall(" in result.output
    for wrong in (["--backend", "abacus"], ["--kind", "abacus"]):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code == 2
        assert "abacus" in result.output

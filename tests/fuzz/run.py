"""Many programs, counted and timed: what `make fuzz` and the test suite run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from random import Random

from tests.fuzz.backends import BACKENDS
from tests.fuzz.caches import CacheProgram
from tests.fuzz.op import OpCall
from tests.fuzz.program import Program, failure, shrunk, sort_of
from tests.fuzz.states import StateProgram

#: Programs of a kind for each call of the op: one of states has some ten calls, one of caches some hundred.
SHARES = {"op": 1.0, "states": 0.2, "caches": 0.1}
KINDS = {program.kind: program for program in (OpCall, StateProgram, CacheProgram)}


@dataclasses.dataclass
class Failure:
    """Programs that failed alike.

    Attributes:
        program: the first of them.
        number: which of the run it was.
        message: what was wrong.
        count: how many there were.
    """

    program: Program
    number: int
    message: str
    count: int = 0


@dataclasses.dataclass
class Outcome:
    """What came of a run.

    Attributes:
        kind: of the programs.
        backend: name of the backend.
        num_run: programs that ran.
        seconds: that they took.
        failures: those that failed, by what was wrong but for its numbers.
    """

    kind: str
    backend: str
    num_run: int = 0
    seconds: float = 0.0
    failures: dict[str, Failure] = dataclasses.field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        """Programs that failed."""
        return sum(failure.count for failure in self.failures.values())


def drawn(kind: str, backend: str, seed: int, number: int) -> Program:
    """Program `number` of the run with `seed`: it depends on nothing but these four."""
    return KINDS[kind].draw(Random(f"{kind} {seed} {number}"), BACKENDS[backend])


def run(
    kind: str,
    backend: str,
    *,
    calls: int,
    seed: int,
    seconds: float = float("inf"),
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run the programs 0, 1, 2, ... of `seed`, at most `calls` and for at most `seconds`."""
    outcome, started = Outcome(kind, backend), time.monotonic()
    while outcome.num_run < calls and outcome.seconds < seconds:
        program = drawn(kind, backend, seed, outcome.num_run)
        if message := failure(program, backend):
            first = Failure(program, outcome.num_run, message)
            outcome.failures.setdefault(sort_of(message), first).count += 1
        outcome.num_run += 1
        outcome.seconds = time.monotonic() - started
        on_progress(outcome)
    return outcome


def report(found: Failure, outcome: Outcome) -> str:
    """What was wrong, and the lines that show it, made as simple as they get."""
    simple = shrunk(found.program, outcome.backend)
    return (
        f"{outcome.kind} {found.number} on {outcome.backend}: {found.message}\n"
        f"{simple.lines(outcome.backend)}"
    )

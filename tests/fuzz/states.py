"""Operations on `OVQState`, against a plain model: the tokens of each row, read anew by `naive` in one call.

The model of a state is a list of rows, and a row is all that has happened to it: its tokens, by number, and
where its dictionary got another size. States that are derived from one another live on side by side and are
all compared at the end, so that what one does to memory it shares with another is seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ovq.ops import OVQState, ovq_attention
from ovq.ops.narrow import STATE_DTYPES
from ovq.ops.schedule import GROWTHS
from ovq.ops.sums import state_dtype
from tests.fuzz.backends import BACKENDS, Backend
from tests.fuzz.compare import assert_close, assert_state, bound_of
from tests.fuzz.options import OpProgram, drawn_options
from tests.fuzz.program import Impossible
from tests.fuzz.tensors import LOGS, ORDERS, SHARP, SHARP_LOGS, WEIGHTS, normalized, numbers, stored

#: Most rows of a state and most states of a program.
MOST = 4
#: Tokens there are; programs that read more meet the first of them again.
NUM_TOKENS = 50
LAYOUTS = ("dense", "left", "right", "packed")
#: Scales of queries, times the default. Token t with scale i is token t + i * `NUM_TOKENS` of the model.
FACTORS = (1.0, 2.0, 0.5)
#: Modes of autograd that steps run in.
MODES = (contextlib.nullcontext, torch.no_grad, torch.no_grad, torch.inference_mode)

#: What happened to a row: numbers of tokens, and new sizes of its dictionary as strings.
Row = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class StateProgram(OpProgram):
    """Operations on states, one after the other.

    Attributes:
        num_rows: of the state it begins with, which has seen nothing.
        steps: the operations, each (name, state it is of, two numbers, whether that state stays beside the
            new one). Numbers are taken modulo what there is, so that any do.
        is_sharp: whether scales are so large that scores differ by more than 34.
        state_dtype: format of the sums.
    """

    kind = "states"

    num_rows: int = 1
    steps: tuple[tuple[str, int, int, int, int], ...] = ()
    is_sharp: bool = False
    state_dtype: str = "float32"

    @classmethod
    def draw(cls, rng: Random, backend: Backend) -> StateProgram:
        """A program for `backend`."""
        # Most steps read, or there would be little to operate on.
        names = [*STEPS, *["read"] * 6, *["decode"] * 4]
        steps = [
            (rng.choice(names), *(rng.randrange(24) for _ in range(3)), rng.randrange(2))
            for _ in range(rng.randrange(2, 5 if backend.is_slow else 9))
        ]
        options = drawn_options(rng, ["count", "count", "count", 0.3])
        gates = _drawn_gates(rng) if options["rate"] == "count" else {}
        return cls(
            seed=rng.randrange(10**6),
            num_rows=rng.choice([1, 2, 3]),
            steps=(("read", 0, rng.randrange(24), rng.randrange(24), 0), *steps),
            dtype=rng.choice(backend.dtypes),
            num_kv_heads=rng.choice([1, 1, 2]),
            group=rng.choice([1, 2]),
            key_dim=rng.choice([2, 3, 5]),
            value_dim=rng.choice([1, 3, 5]),
            num_slots=rng.choice([1, 2, 5, 9, 30]),
            chunk_size=rng.choice([1, 2, 3, 4, 5]),
            growth=rng.choice(GROWTHS),
            **backend.known(options),
            state_dtype=rng.choice(STATE_DTYPES) if options["rate"] == "count" else "float32",
            **gates,
        )

    def check(self, name: str) -> None:
        """Outputs of every step and the states at the end are those of each row read anew."""
        if not 1 <= self.num_rows <= MOST or min(len(step) for step in self.steps or [()]) != 5:
            raise Impossible
        machine = _Machine(self, BACKENDS[name])
        with BACKENDS[name].running():
            for step, *arguments in self.steps:
                machine.run(step, *arguments)
        machine.compare()


def _drawn_gates(rng: Random) -> dict[str, Any]:
    """Weights and logs of tokens, and whether scales are large."""
    weights, forgetting = rng.choice(["none", "some zero", *WEIGHTS]), rng.choice(["none", *LOGS])
    is_sharp = forgetting in SHARP_LOGS and rng.random() < 0.4
    return {"weights": weights, "forgetting": forgetting, "is_sharp": is_sharp}


class _Machine:
    """The states of a program with their rows."""

    def __init__(self, program: StateProgram, backend: Backend) -> None:
        p = self.program = program
        self.backend = backend.op
        dtype = getattr(torch, p.dtype)
        empty = OVQState.empty(
            batch_size=p.num_rows,
            num_kv_heads=p.num_kv_heads,
            key_dim=p.key_dim,
            value_dim=p.value_dim,
            num_slots=p.num_slots,
            chunk_size=p.chunk_size,
            dtype=dtype,
        ).to_state_dtype(p.state_dtype)
        self.states: list[tuple[OVQState, list[Row]]] = [(empty, [()] * p.num_rows)]
        self.empty = None if p.state_dtype == "float32" else empty.select([0])
        heads = p.num_kv_heads * p.group
        q, k, v = (
            numbers(p.seed, name, shape=(NUM_TOKENS, num, dim))
            for name, num, dim in (
                ("q", heads, p.key_dim),
                ("k", p.num_kv_heads, p.key_dim),
                ("v", p.num_kv_heads, p.value_dim),
            )
        )
        if p.is_sharp:  # Queries ask for their own tokens, so that some scores are as large as can be.
            q = k.repeat_interleave(p.group, 1)
        self.gates = {
            name: kinds[which](numbers(p.seed, name, shape=(NUM_TOKENS, p.num_kv_heads))).repeat(
                len(FACTORS), 1
            )
            for name, kinds, which in (
                ("token_weights", WEIGHTS, p.weights),
                ("log_forget", LOGS, p.forgetting),
            )
            if which != "none"
        }
        self.scale = SHARP / max(FACTORS) if p.is_sharp else p.key_dim**0.5
        # Powers of 2, so that it makes no difference whether queries are multiplied or scales.
        queries = torch.cat([normalized(q).to(dtype) * factor for factor in FACTORS])
        self.tokens = [queries, *(x.to(dtype).repeat(len(FACTORS), 1, 1) for x in (normalized(k), v))]
        scale = torch.full((1,), self.scale * max(FACTORS))
        self.bound = bound_of(*self.tokens, scale, has_norms=p.bias != "count")
        self.next_token = itertools.count()
        self.anew = functools.cache(self._anew)

    def run(self, name: str, which: int, a: int, b: int, stays: int) -> None:
        """One step."""
        which %= len(self.states)
        state, rows = STEPS[name](self, *self.states[which], a, b)
        # A batch that doubles again and again would take forever.
        if len(rows) > MOST:
            state, rows = state.select(range(MOST)), rows[:MOST]
        if stays:
            self.states = [*self.states, (state, rows)][-MOST:]
        else:
            self.states[which] = (state, rows)

    def compare(self) -> None:
        """Every state that is left is that of its rows."""
        for i, (state, rows) in enumerate(self.states):
            assert state.batch_size == len(rows), f"state {i}: expected {len(rows)} rows"
            for r, row in enumerate(rows):
                assert_state(state.select([r]), self.anew(row)[1], f"state {i}, row {r}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: OVQState | None, **options: Any):
        """The op with the options of the program."""
        names = ("chunk_size", "growth", "init", "merge", "value_weight")
        options |= {name: getattr(self.program, name) for name in names}
        options["ablation"] = {"bias": self.program.bias, "rate": self.program.rate}
        # Given where it is needed alone: with one, no step is like the one before it.
        if self.program.init == "random":
            options["generator"] = torch.Generator().manual_seed(self.program.seed)
        return ovq_attention(
            q,
            k,
            v,
            initial_state=state,
            output_final_state=True,
            **options,
        )

    def _anew(self, row: Row) -> tuple[Tensor, OVQState]:
        """Outputs of the tokens of a row since its dictionary last got another size, and its state."""
        sizes = [i for i, event in enumerate(row) if isinstance(event, str)]
        state, num_slots, start = self.empty, self.program.num_slots, 0
        if sizes:
            num_slots, start = int(row[sizes[-1]]), sizes[-1] + 1
            state = self.anew(row[: sizes[-1]])[1].resize(num_slots)
        own = list(row[start:])
        gates = {name: x[own][None] for name, x in self.gates.items()}
        parts = (x[own][None] for x in self.tokens)
        o, state = self.attend(*parts, state, num_slots=num_slots, backend="naive", scale=self.scale, **gates)
        return o[0], state

    def read(self, state: OVQState, rows: list[Row], lengths: list[int], layout: str, order: str, kind: int):
        """New tokens for each row, with one of the scales, in one of the modes; compares their outputs."""
        new = [tuple(next(self.next_token) % NUM_TOKENS for _ in range(n)) for n in lengths]
        width = max(lengths)
        left = [width - n if layout == "left" else 0 for n in lengths]
        where = {}
        if layout == "packed":
            picked = [i for ids in new for i in ids]
            index = torch.tensor(picked, dtype=torch.int64)[None]
            where["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
        else:
            picked = [
                [0] * m + list(ids) + [0] * (width - m - len(ids)) for m, ids in zip(left, new, strict=True)
            ]
            index = torch.tensor(picked, dtype=torch.int64).view(len(rows), width)
            if layout != "dense":
                column = torch.arange(width)
                where["attention_mask"] = torch.stack(
                    [(column >= m) & (column < m + n) for m, n in zip(left, lengths, strict=True)]
                )
        q, k, v = (stored(x[index], order) for x in self.tokens)
        where |= {name: x[index] for name, x in self.gates.items()}
        which = kind % len(FACTORS) if self.program.bias == "count" else 0
        # As nothing, as a number, and as a tensor.
        own = torch.full((q.shape[2],), self.scale * FACTORS[2], dtype=state_dtype(q.dtype))
        default = self.scale if self.program.is_sharp else None
        where["scale"] = (default, self.scale * FACTORS[1], own)[which]
        with MODES[kind % len(MODES)]():
            o, state = self.attend(q, k, v, state, num_slots=state.num_slots, backend=self.backend, **where)
        new = [tuple(i + which * NUM_TOKENS for i in ids) for ids in new]
        outputs = (
            o[0].split(lengths)
            if layout == "packed"
            else [o[r, m : m + n] for r, (m, n) in enumerate(zip(left, lengths, strict=True))]
        )
        rows = [row + ids for row, ids in zip(rows, new, strict=True)]
        for r, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            if len(output):
                assert_close(output, self.anew(row)[0][-len(output) :], self.bound, f"outputs of row {r}")
        return state, rows


Step = Callable[[_Machine, OVQState, list[Row], int, int], tuple[OVQState, list[Row]]]


def _read(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    layout = LAYOUTS[a % len(LAYOUTS)]
    lengths = [b % 8 if layout == "dense" else (b * (r + 1) + a) % 8 for r in range(len(rows))]
    # Views of equal heads or rows are for `OpCall`, which knows how to make them equal.
    order = ORDERS[(a + b) % (len(ORDERS) - 2)]
    return machine.read(state, rows, lengths, layout, order, a)


def _decode(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    for i in range(1 + b % 6):
        order = ORDERS[a % (len(ORDERS) - 2)]
        # Some steps are like the one before, others not.
        state, rows = machine.read(state, rows, [1] * len(rows), "dense", order, a + i // 2)
    return state, rows


def _select(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    picked = [a % len(rows), b % len(rows)]
    return state.select(picked), [rows[i] for i in picked]


def _leave(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    kept = [len(rows) == 1 or r != a % len(rows) for r in range(len(rows))]
    return state.select(torch.tensor(kept)), [row for row, stays in zip(rows, kept, strict=True) if stays]


def _reorder(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    index = [(a + b * r) % len(rows) for r in range(len(rows))]
    return state.reorder(torch.tensor(index)), [rows[i] for i in index]


def _repeat(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    return state.repeat_interleave(1 + a % 2), [row for row in rows for _ in range(1 + a % 2)]


def _join(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    other, others = machine.states[a % len(machine.states)]
    if other.num_slots != state.num_slots:
        return state, rows
    return OVQState.concatenate([state, other]), rows + others


def _resize(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    num_slots = 1 + a % 12
    return state.resize(num_slots), [(*row, str(num_slots)) for row in rows]


def _file(machine: _Machine, state: OVQState, rows: list[Row], a: int, b: int):
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder) / "state")
        return OVQState.load(Path(folder) / "state"), rows


STEPS: dict[str, Step] = {
    "read": _read,
    "decode": _decode,
    "select": _select,
    "leave": _leave,
    "reorder": _reorder,
    "repeat": _repeat,
    "join": _join,
    "resize": _resize,
    "file": _file,
    "clone": lambda machine, state, rows, a, b: (state.clone(), rows),
    "detach": lambda machine, state, rows, a, b: (state.detach(), rows),
    "to": lambda machine, state, rows, a, b: (state.to("cpu"), rows),
}

"""States that go on under every kind of mask: rows that pause, rows that end, padding left and right."""

import importlib.util

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tests.ops.common import CPU, assert_same_state, attend, inputs

WAYS = [("naive", torch.float64), ("torch", torch.float64), *((x, torch.float32) for x in ("auto", *CPU))]
if importlib.util.find_spec("triton"):
    WAYS.append(("triton", torch.float32))
ways = pytest.mark.parametrize(("backend", "dtype"), WAYS, ids=lambda x: str(x).removeprefix("torch."))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@st.composite
def streams(draw):
    """Some calls of one batch: the tokens that each row gets from each, and on which side its padding is."""
    # Small numbers, so that padding and pending tokens often come out equally long.
    batch, chunk_size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    calls = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(0, 4))
        rows = [(draw(st.integers(0, length)), draw(st.booleans())) for _ in range(batch)]
        calls.append((length, rows))
    return chunk_size, calls


def masked(length, rows):
    """The mask of a call whose row r has `rows[r][0]` tokens, left of its padding or right of it."""
    column = torch.arange(length)
    return torch.stack([column >= length - n if is_right else column < n for n, is_right in rows])


def check(backend, dtype, chunk_size, calls):
    """A batch under masks gives each row what the reference gives it alone, in one call and without any."""
    batch = len(calls[0][1])
    totals = [sum(rows[r][0] for _, rows in calls) for r in range(batch)]
    q, k, v = inputs(batch, max(totals), 2, 1, 3, 4, dtype=dtype)
    options = {"num_slots": 4, "chunk_size": chunk_size}
    outputs, state, seen = [[] for _ in range(batch)], None, [0] * batch
    for length, rows in calls:
        mask = masked(length, rows)
        # What lies under padding must not matter.
        call = [torch.full((batch, length, *x.shape[2:]), 100.0, dtype=dtype) for x in (q, k, v)]
        for r, (n, _) in enumerate(rows):
            for part, x in zip(call, (q, k, v), strict=True):
                part[r, mask[r]] = x[r, seen[r] : seen[r] + n]
            seen[r] += n
        o, state = attend(*call, attention_mask=mask, initial_state=state, backend=backend, **options)
        assert not o[~mask].any()
        for r in range(batch):
            outputs[r].append(o[r, mask[r]])
    for r, total in enumerate(totals):
        alone = [x[r : r + 1, :total] for x in (q, k, v)]
        o, expected = attend(*alone, backend="naive", **options)
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(torch.cat(outputs[r]), o[0], rtol=bound, atol=bound)
        assert_same_state(state.select([r]), expected, tolerance=bound)


@pytest.mark.parametrize(
    ("backend", "dtype", "examples"),
    [(*way, 3 if way[0] == "triton" else 40) for way in WAYS],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_rows_that_pause_and_end_are_what_they_are_alone(backend, dtype, examples):
    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(streams())
    def holds(stream):
        check(backend, dtype, *stream)

    holds()


@ways
@pytest.mark.parametrize(
    ("chunk_size", "calls"),
    [
        # One row of three gets a token while the others wait, each with as many tokens pending as padding.
        (4, [(1, [(0, False), (1, False), (0, False)]), (1, [(1, False), (0, False), (1, False)])]),
        # A single row whose padding on the right is as long as its pending tokens.
        (4, [(1, [(1, False)]), (3, [(2, False)])]),
        # Padding alone between rows.
        (2, [(4, [(1, False), (0, False), (2, True)])]),
    ],
    ids=["paused", "as much padding as pending", "a row of padding"],
)
def test_padding_never_passes_for_tokens(backend, dtype, chunk_size, calls):
    check(backend, dtype, chunk_size, calls)

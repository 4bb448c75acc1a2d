"""NaN and Inf in a token reach no output before it, and no other row or head, in any backend."""

import functools
import importlib.util
import itertools

import pytest
import torch

from ovq.ops.options import CURRENT_MERGES
from tests.ops.common import CPU, KERNEL_MERGES, VARIANTS, attend, by_turns, inputs

WAYS = [
    ("naive", torch.float64),
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    *itertools.product(CPU, [torch.float32, torch.bfloat16]),
]
# The first token, within a chunk, the last and first of one, and within the last, which is incomplete.
BAD = [torch.nan, torch.inf, -torch.inf]
CASES = by_turns(WAYS, [0, 3, 7, 8, 18], BAD, "kv", ["existing"])
CASES += by_turns(WAYS, [0, 7, 18], BAD[:2], "kv", ["nearest"])
# The interpreter multiplies by NumPy, which warns of what is the point here. It is slow: few cases.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TRITON = [("triton", torch.float32)] if importlib.util.find_spec("triton") else []
CASES += [(way, 11, torch.nan, "k", "existing") for way in TRITON]
CASES += [(way, 7, torch.inf, "v", "nearest") for way in TRITON]
OPTIONS = {"num_slots": 6, "chunk_size": 8}
LENGTH = 21
SUMS = ("key_sum", "value_sum", "weight")


def spoilt(dtype, where, bad, token):
    """Inputs of two rows and two heads, the same with `bad` in a token of one head, and where that is."""
    tensors = inputs(2, LENGTH, 4, 2, 6, 5, dtype=dtype)
    changed = [x.clone() for x in tensors]
    changed["qkv".index(where)][1, token, 1, 2] = bad
    return tensors, changed


@functools.cache
def unspoilt(backend, dtype, merge):
    """The outputs for inputs in which nothing is bad."""
    return attend(*spoilt(dtype, "k", 0, 0)[0], **OPTIONS, merge=merge, backend=backend)[0]


@quiet
@pytest.mark.parametrize(("way", "token", "bad", "where", "merge"), CASES, ids=str)
def test_a_bad_token_reaches_no_output_before_it(way, bad, where, token, merge):
    backend, dtype = way
    _, changed = spoilt(dtype, where, bad, token)
    expected = unspoilt(backend, dtype, merge)
    o, state = attend(*changed, **OPTIONS, merge=merge, backend=backend)
    assert torch.equal(o[0], expected[0])
    assert torch.equal(o[1, :, :2], expected[1, :, :2])
    assert torch.equal(o[1, :token], expected[1, :token])
    # Negative control: it is not taken out, either.
    after = o[1, token:, 2:] if where == "k" else o[1, token:, 2:, 2]
    if where == "v" or bad != -torch.inf:
        assert not after.isfinite().any() if where == "v" else not after.isfinite().all()
    assert state.count.sum(-1).unique().tolist() == [16]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("where", ["k", "v"])
def test_nor_with_other_options(variant, where):
    tensors, changed = spoilt(torch.float64, where, torch.nan, 11)
    expected, _ = attend(*tensors, backend="torch", **OPTIONS, **variant)
    o, _ = attend(*changed, backend="torch", **OPTIONS, **variant)
    assert torch.equal(o[1, :11], expected[1, :11])
    assert not o[1, 11:, 2:, 2].isfinite().any()


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), *((x, torch.float32) for x in CPU)], ids=str
)
def test_several_blocks_of_queries_in_a_chunk(backend, dtype):
    """A chunk of more tokens than are read together, two of them bad."""
    q, k, v = inputs(1, 300, 2, 1, 6, 5, dtype=dtype)
    options = {"num_slots": 6, "chunk_size": 290, "backend": backend}
    expected, _ = attend(q, k, v, **options)
    v[0, 140, 0, 0] = torch.inf
    v[0, 280, 0, 0] = -torch.inf
    v[0, 285, 0, 4] = torch.nan
    o, _ = attend(q, k, v, **options)
    assert torch.equal(o[0, :140], expected[0, :140])
    torch.testing.assert_close(o[0, :, :, 1:4], expected[0, :, :, 1:4])
    assert (o[0, 140:280, :, 0] == torch.inf).all()
    assert o[0, 280:290, :, 0].isnan().all()


@quiet
@pytest.mark.parametrize(("backend", "dtype"), WAYS + TRITON, ids=str)
def test_padding_may_be_anything(backend, dtype):
    q, k, v = inputs(2, 13, 2, 1, 4, 4, dtype=dtype)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :5] = mask[1, 11:] = False
    expected, state_expected = attend(q, k, v, attention_mask=mask, backend=backend, **OPTIONS)
    for x in (q, k, v):
        x[~mask] = torch.nan
    o, state = attend(q, k, v, attention_mask=mask, backend=backend, **OPTIONS)
    assert torch.equal(o, expected)
    assert torch.equal(state.value_sum, state_expected.value_sum)


@quiet
@pytest.mark.parametrize("backend", ["torch", *(backend for backend, _ in TRITON)])
def test_what_another_continuation_wrote_is_not_read(backend):
    """Rows with unequal numbers of pending tokens, beside a continuation that has gone bad."""
    q, k, v = inputs(2, 3, 2, 1, 4, 4, dtype=torch.float32)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    _, state = attend(q, k, v, attention_mask=mask, **OPTIONS)
    one = [x[:, :1] for x in (q, k, v)]
    bad = [torch.full_like(x, torch.nan) for x in one]
    expected, _ = attend(*one, initial_state=state.clone(), backend=backend, **OPTIONS)
    other = state
    for _ in range(3):
        _, other = attend(*bad, initial_state=other, backend=backend, **OPTIONS)
    o, _ = attend(*one, initial_state=state, backend=backend, **OPTIONS)
    assert torch.equal(o, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tokens_go_where_the_reference_sends_them_after_a_bad_key_has_opened_a_slot(bad, dtype):
    """With `merge="updated"` its own chunk may go there as well, and nothing can be compared with it."""
    q, k, v = inputs(6, 40, 1, 1, 4, 4, dtype=dtype)
    k[range(6), range(6), 0, 2] = bad
    options = {"num_slots": 20, "chunk_size": 6, "init": "random", "merge": "updated"}
    options["generator"] = torch.Generator().manual_seed(0)
    states = [attend(q, k, v, backend=backend, **options)[1] for backend in ("naive", "torch")]
    assert torch.equal(states[0].count, states[1].count)


@pytest.mark.parametrize(
    ("way", "merge"),
    [
        *itertools.product(WAYS[:3], CURRENT_MERGES),
        *itertools.product(((x, torch.float32) for x in CPU), KERNEL_MERGES),
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_of_zero_takes_it_out_of_the_memory(way, bad, merge):
    backend, dtype = way
    q, k, v = inputs(1, 21, 2, 1, 6, 5, dtype=dtype)
    weights = torch.linspace(0.5, 2, 21, dtype=dtype)[None, :, None].repeat(1, 1, 1)
    weights[0, [0, 3, 7, 9]] = 0
    options = {**OPTIONS, "merge": merge, "backend": backend, "token_weights": weights}
    expected, before = attend(q, k, v, **options)
    k[0, [0, 3], 0, 2] = v[0, [3, 7, 9], 0, 1] = bad
    o, state = attend(q, k, v, **options)
    assert not o[:, 3:16].isfinite().any(-1).all()
    for found, right in (
        (o[:, 16:], expected[:, 16:]),
        *((getattr(state, x), getattr(before, x)) for x in SUMS),
    ):
        assert torch.equal(found, right)
    assert int(state.count.sum()) == 16
    step = None
    with torch.no_grad():
        for t in range(21):
            options["token_weights"] = weights[:, t : t + 1]
            _, step = attend(*(x[:, t : t + 1] for x in (q, k, v)), initial_state=step, **options)
    assert torch.equal(step.count, state.count)
    assert all(torch.equal(getattr(step, x), getattr(state, x)) for x in SUMS)

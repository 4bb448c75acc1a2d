"""Slots in bfloat16 and int8: the kernels round the same sums as the reference."""

import pytest
import torch

from ovq.ops import OVQState, backend_used, slot_assignments
from ovq.ops.narrow import STATE_DTYPES, rounded_
from ovq.ops.state import tensors_of
from tests.ops.common import attend, inputs

triton = pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")

from triton import language as tl  # noqa: E402  # needs Triton

from ovq.ops.backends.triton.formats import in_format  # noqa: E402  # likewise

NARROW = STATE_DTYPES[1:]
SIZES = {"num_slots": 6, "chunk_size": 4}


@triton.jit
def round_rows(x, weight, FORMAT: tl.constexpr, HAS_MEANS: tl.constexpr):
    row, column = tl.arange(0, 64), tl.arange(0, 16)
    place = x + row[:, None] * 16 + column[None, :]
    tl.store(place, in_format(tl.load(place), tl.load(weight + row), FORMAT, HAS_MEANS))


@pytest.mark.parametrize("has_means", [False, True])
@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("power", [-145, -130, -60, 0, 60])
def test_rounding_is_that_of_pytorch_bit_for_bit(state_dtype, power, has_means):
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 16, generator=random, dtype=torch.float64) * 2.0**power).float()
    # Zeros, entries that are not finite, and ties in bfloat16 and in int8.
    x[0], x[1, 3], x[2, 5], x[3, 0] = 0.0, torch.nan, -torch.inf, torch.inf
    x[4] = (1 + (2 * torch.arange(16) + 1) * 2.0**-8) * 2.0**power
    x[5] = torch.cat([torch.tensor([127.0]), torch.arange(15) - 7.5]) * 2.0**power
    weight = torch.rand(64, generator=random) + 0.1
    # Low ones, with which sums have too few bits to give the means again.
    weight[32:] *= 2.0**-60
    weight[6], weight[4:6] = 0, 1
    expected = x.clone()
    rounded_(expected, state_dtype, weight if has_means else None)
    round_rows[(1,)](x, weight, FORMAT=STATE_DTYPES.index(state_dtype), HAS_MEANS=has_means)
    torch.testing.assert_close(x, expected, atol=0, rtol=0, equal_nan=True)


def stream(dtype, has_weights, rate):
    q, k, v = inputs(2, 19, 4, 2, 6, 5, dtype=dtype)
    random = torch.Generator().manual_seed(2)
    gates = {}
    if has_weights:
        gates["token_weights"] = torch.rand(2, 19, 2, generator=random)
    if rate:
        gates["log_forget"] = -2 * rate * torch.rand(2, 19, 2, generator=random)
    return (q, k, v), gates


def empty(state_dtype, dtype):
    sizes = {"batch_size": 2, "num_kv_heads": 2, "key_dim": 6, "value_dim": 5, **SIZES}
    return OVQState.empty(dtype=dtype, **sizes).to_state_dtype(state_dtype)


@pytest.mark.parametrize("merge", ["existing", "nearest"])
@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize(
    ("dtype", "has_weights", "rate"),
    [
        # The last one has all parts, and the second other sums.
        pytest.param(torch.float32, False, 0.0, marks=pytest.mark.slow),
        (torch.bfloat16, False, 0.0),
        pytest.param(torch.float32, True, 0.0, marks=pytest.mark.slow),
        (torch.float32, True, 0.3),
    ],
)
def test_states_are_those_of_naive_however_a_text_is_split(merge, state_dtype, dtype, has_weights, rate):
    tokens, gates = stream(dtype, has_weights, rate)

    @torch.no_grad()
    def read(backend, *ends):
        state, outputs = empty(state_dtype, dtype), []
        for start, end in zip((0, *ends), (*ends, 19), strict=True):
            new, own = (x[:, start:end] for x in tokens), {n: x[:, start:end] for n, x in gates.items()}
            o, state = attend(*new, initial_state=state, merge=merge, backend=backend, **SIZES, **own)
            outputs.append(o)
        assert backend_used() == backend
        return torch.cat(outputs, 1), state

    reference, expected = read("naive")
    assert int((expected.count > 1).sum()) > 0
    # In one call, and in pieces of which some are tokens.
    for ends in ((), (3, 13, 14, 15, 16, 17)):
        o, state = read("triton", *ends)
        for name, x in tensors_of(expected).items():
            assert name.startswith("pending") or torch.equal(getattr(state, name), x), name
        torch.testing.assert_close(o, reference, atol=4e-2 if dtype == torch.bfloat16 else 2e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_chunks_of_one_token_with_forgetting():
    """Each is a decode step whose state another format has been chosen for already."""
    tokens, gates = stream(torch.float32, True, 0.3)
    sizes = {"num_slots": 2, "chunk_size": 1}
    shape = {"batch_size": 2, "num_kv_heads": 2, "key_dim": 6, "value_dim": 5}
    state = OVQState.empty(**shape, **sizes).to_state_dtype("int8")
    (o, _), (expected, _) = (
        attend(*tokens, initial_state=state, backend=backend, **sizes, **gates)
        for backend in ("triton", "naive")
    )
    torch.testing.assert_close(o, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("state_dtype", NARROW)
def test_assignments_are_those_of_the_op(state_dtype):
    (_, k, v), _ = stream(torch.float32, False, 0.0)
    found, expected = (
        slot_assignments(k, v, initial_state=empty(state_dtype, k.dtype), merge="nearest", backend=b, **SIZES)
        for b in ("triton", "torch")
    )
    assert torch.equal(found.slots, expected.slots)
    for name, x in tensors_of(expected.state).items():
        assert name.startswith("pending") or torch.equal(getattr(found.state, name), x), name

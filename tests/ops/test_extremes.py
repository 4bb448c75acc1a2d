"""Keys of lengths at which float32 products vanish or overflow: assigned as float64 assigns them."""

import importlib.util

import pytest
import torch

from ovq.ops.options import CURRENT_MERGES, INITS
from tests.ops.common import CPU, assert_same_state, attend, either_rule, inputs, with_rules

needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="ovq[triton] is not installed"
)
LENGTHS = {
    "short": [1e-20],
    "long": [1e20],
    "mixed": [1e-20, 1.0, 1e20],
    "short beside ordinary": [1.0, 1.0, 1e-20, 1e-25],
    "zero beside short": [0.0, 1e-20],
    "both ends of float32": [1e-36, 1e30],
}


def keys_of_lengths(lengths, batch=2, length=40, heads=2):
    """Keys in nine directions, so that some go together whatever their lengths, which are given."""
    q, k, v = inputs(batch, length, heads, heads, 6, 4, dtype=torch.float32)
    which = torch.randint(9, (batch, length), generator=torch.Generator().manual_seed(1))
    k = (
        k[0, :9]
        .unsqueeze(0)
        .expand(batch, -1, -1, -1)
        .gather(1, which[..., None, None].expand(-1, -1, *k.shape[2:]))
    )
    factors = torch.tensor(lengths)[torch.arange(length) % len(lengths)]
    return q, k * factors[:, None, None], v


def check(backend, lengths, options, **sizes):
    """All sums are equal: values tell which tokens went where."""
    q, k, v = keys_of_lengths(lengths, **sizes)
    (_, state), (_, expected) = (attend(q, k, v, backend=b, **options) for b in (backend, "naive"))
    assert_same_state(state, expected, tolerance=0)
    assert len(expected.count.unique()) > 2


every_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@every_length
@with_rules(["backend", "init"], ["torch", *CPU], INITS, rules=CURRENT_MERGES)
def test_keys_of_any_length_go_where_the_reference_sends_them(lengths, merge, init, backend):
    generator = torch.Generator().manual_seed(0)
    options = {"num_slots": 8, "chunk_size": 8, "init": init, "merge": merge, "generator": generator}
    check(backend, lengths, options, batch=1)


@pytest.mark.parametrize("backend", ["torch", *CPU])
def test_squares_that_vanish_do_not_make_points_equal(backend):
    """Short keys whose values do not count: the squares of all lengths are 0 in float32."""
    q, k, v = keys_of_lengths([1e-24], batch=1)
    options = {"num_slots": 8, "chunk_size": 8, "merge": "nearest"}
    (_, state), (_, expected) = (attend(q, k, 0 * v, backend=b, **options) for b in (backend, "naive"))
    assert_same_state(state, expected, tolerance=0)
    assert torch.equal(
        state.resize(4).count, attend(q, k * 1e24, 0 * v, backend=backend, **options)[1].resize(4).count
    )


@needs_triton
# Of the interpreter's NumPy: lengths of float32 overflow here, and are then taken in float64.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@every_length
def test_the_kernels_for_gpus_send_them_there_too(lengths):
    check("triton", lengths, {"num_slots": 6, "chunk_size": 6}, batch=1, length=18, heads=1)


@every_length
@either_rule
def test_one_token_at_a_time(lengths, merge):
    q, k, v = keys_of_lengths(lengths, batch=1, length=24)
    options = {"num_slots": 6, "chunk_size": 6, "merge": merge}
    _, expected = attend(q, k, v, backend="naive", **options)
    state = None
    for t in range(24):
        part = slice(t, t + 1)
        _, state = attend(q[:, part], k[:, part], v[:, part], initial_state=state, **options)
    assert_same_state(state, expected, tolerance=0)


def test_the_reference_sends_keys_where_they_would_go_at_length_one():
    """Which slot is nearest, and which key is the most novel, is no matter of the unit of length."""
    options = {"num_slots": 8, "chunk_size": 8, "backend": "naive"}
    counts = [attend(*keys_of_lengths(x), **options)[1].count for x in ([1.0], [2.0**-66], [2.0**66])]
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0], counts[2])


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e5, 1e8, 1e12, 1e20])
def test_a_vast_score_takes_all(scale, dtype, backend):
    """Exponentials are of differences of scores, however far these are from zero, in the backward too."""
    # Keys have nothing in common, and each query has that of its own token, or of one long ago.
    k = torch.eye(96)[None, :70, None].to(dtype)
    own = torch.arange(70)
    q = k[:, torch.where(own % 2 == 0, own, 0)]
    _, _, v = inputs(1, 70, 1, 1, 8, 8, dtype=dtype)
    results = []
    for name in ("torch", backend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o, _ = attend(*leaves, num_slots=16, chunk_size=32, scale=scale, backend=name)
        results.append((o.detach(), torch.autograd.grad(o.float().square().sum(), leaves[2])[0]))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_at_a_rate_of_1_a_slot_is_its_last_token_however_short(backend):
    long, short = torch.tensor([0.6, 0.8], dtype=torch.float64), torch.tensor([6e-21, 8e-21]).double()
    k = torch.stack([long, long, short, long, short, short])[None, :, None]
    sizes = {"num_slots": 1, "chunk_size": 2, "ablation": {"rate": 1.0}}
    _, state = attend(k, k, k, backend=backend, **sizes)
    torch.testing.assert_close(state.keys[0, 0, 0], short, atol=0, rtol=1e-12)

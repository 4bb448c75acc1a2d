"""The kernels against the reference: outputs, final state and every gradient."""

from unittest.mock import Mock

import pytest
import torch

from ovq.ops import backend_used
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.triton import work
from tests.ops.common import assert_same_state, attend, inputs
from tests.ops.test_parity import gradients

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")

# batch, length, heads, kv_heads, key_dim, value_dim, num_slots, chunk_size. The interpreter takes 10 ms a
# program: these are the smallest that have several chunks, blocks, heads of a group, and odd sizes.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 13, 4, 2, 7, 5, 9, 6),
    (1, 11, 2, 1, 33, 3, 100, 4),
    (1, 13, 1, 1, 6, 20, 1, 5),
    (1, 7, 2, 2, 3, 5, 64, 16),
]


def assert_parity(results, references):
    """Asked for is 2e-3 relative; float32 is a hundred times better, and sums are equal bit for bit."""
    (o, state, grads), (o_ref, state_ref, grads_ref) = results, references
    torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)
    assert_same_state(state, state_ref, tolerance=0)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        assert (grad - grad_ref).norm() <= 2e-5 * grad_ref.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_naive(shape):
    *sizes, num_slots, chunk_size = shape
    q, k, v = inputs(*sizes, dtype=torch.float32)
    scale = torch.linspace(1, 4, q.shape[2])
    options = {"num_slots": num_slots, "chunk_size": chunk_size}
    assert_parity(gradients("triton", q, k, v, scale, options), gradients("naive", q, k, v, scale, options))


@pytest.mark.parametrize("growth", ["linear", "immediate"])
def test_other_growth(growth):
    q, k, v = inputs(1, 15, 2, 1, 5, 4, dtype=torch.float32)
    # Every other number of a tensor: strides are not to be taken for granted.
    scale = torch.linspace(1, 4, 4)[::2]
    options = {"num_slots": 12, "chunk_size": 6, "growth": growth, "scale": scale}
    (o, state), (o_ref, state_ref) = (attend(q, k, v, backend=b, **options) for b in ("triton", "naive"))
    torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)
    assert_same_state(state, state_ref, tolerance=0)


def test_several_blocks_of_slots_tokens_and_queries():
    """More slots, tokens and queries than one program takes."""
    q, k, v = inputs(1, 160, 1, 1, 4, 4, dtype=torch.float32)
    scale = torch.ones(1)
    options = {"num_slots": 200, "chunk_size": 70, "growth": "immediate"}
    assert_parity(gradients("triton", q, k, v, scale, options), gradients("naive", q, k, v, scale, options))


def test_segments_of_one_chunk_change_nothing(monkeypatch):
    q, k, v = inputs(2, 12, 2, 1, 5, 4, dtype=torch.float32)
    scale, options = torch.ones(2), {"num_slots": 8, "chunk_size": 4}
    o, state, grads = gradients("triton", q, k, v, scale, options)
    monkeypatch.setattr(work, "SEGMENT_BYTES", 1)
    o_short, state_short, grads_short = gradients("triton", q, k, v, scale, options)
    assert torch.equal(o, o_short)
    assert_same_state(state, state_short, tolerance=0)
    for grad, grad_short in zip(grads, grads_short, strict=True):
        torch.testing.assert_close(grad, grad_short, rtol=1e-5, atol=1e-6)


def test_two_runs_are_equal_bit_for_bit():
    q, k, v = inputs(1, 11, 2, 1, 6, 5, dtype=torch.float32)
    scale, options = torch.ones(2), {"num_slots": 8, "chunk_size": 5}
    runs = [gradients("triton", q, k, v, scale, options) for _ in range(2)]
    for a, b in zip(runs[0][2], runs[1][2], strict=True):
        assert torch.equal(a, b)


def test_a_call_and_its_backward_are_prepared_once(monkeypatch):
    make = Mock(wraps=Plan.make)
    monkeypatch.setattr(Plan, "make", make)
    q, k, v = inputs(1, 5, 1, 1, 5, 4, dtype=torch.float32)
    gradients("triton", q, k, v, torch.ones(1), {"num_slots": 8, "chunk_size": 4})
    assert make.call_count == 1


def test_gradients_through_a_state():
    """A state with slots and pending tokens, handed on: its gradient reaches the tokens it came from."""
    q, k, v = inputs(2, 23, 2, 1, dtype=torch.float32)
    options = {"num_slots": 8, "chunk_size": 6}
    results = []
    for backend in ("triton", "naive"):
        first = [t[:, :9].clone().requires_grad_() for t in (q, k, v)]
        _, state = attend(*first, backend="naive", **options)
        o, state = attend(q[:, 9:], k[:, 9:], v[:, 9:], initial_state=state, backend=backend, **options)
        assert backend_used() == backend
        loss = o.square().sum() + state.value_sum.sin().sum() + state.pending_keys.sin().sum()
        results.append((o, state, torch.autograd.grad(loss, first[1:])))
    assert_parity(*results)


def test_rows_of_every_length_packed_and_padded():
    lengths = [0, 5, 9, 2]
    q, k, v = inputs(1, sum(lengths), 2, 1, dtype=torch.float32)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    options = {"num_slots": 6, "chunk_size": 4}
    scale = torch.ones(2)
    packed = [
        gradients(backend, q, k, v, scale, {**options, "cu_seqlens": bounds})
        for backend in ("triton", "naive")
    ]
    assert_parity(*packed)
    # The same rows, padded on the left.
    mask = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    rows = []
    for x in (q, k, v):
        rows.append(x.new_zeros(4, 9, *x.shape[2:]))
        rows[-1][mask] = x[0]
    o, state = attend(*rows, scale=scale, attention_mask=mask.long(), backend="triton", **options)
    torch.testing.assert_close(o[mask], packed[0][0][0])
    assert o[~mask].abs().max() == 0
    assert_same_state(state, packed[0][1], tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype):
    """Assignments of float64, errors of the size that rounding the inputs has."""
    q, k, v = inputs(1, 22, 2, 1, 16, 8, dtype=dtype)
    scale, options = torch.full((2,), 4.0), {"num_slots": 8, "chunk_size": 6}
    o, state, grads = gradients("triton", q, k, v, scale, options)
    wide = [t.float() for t in (q, k, v)]
    o_ref, state_ref, grads_ref = gradients("naive", *wide, scale, options)
    assert o.dtype == dtype
    assert torch.equal(state.count, state_ref.count)
    assert torch.equal(state.key_sum, state_ref.key_sum)
    bound = 4 * torch.finfo(dtype).eps
    for a, b in zip((o, *grads), (o_ref, *grads_ref), strict=True):
        assert (a.float() - b).norm() <= bound * b.norm()

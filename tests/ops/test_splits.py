"""Calls that run as several: equal to one call, and no dearer than their tokens."""

import pytest
import torch

from ovq.ops import ovq_attention
from ovq.ops.ablation import Ablation
from ovq.ops.checks import checked_call, checked_scale
from ovq.ops.options import options_of
from ovq.ops.splits import groups_of
from tests.ops.common import BACKENDS, CPU, assert_same_state, attend, either_rule, inputs
from tests.written import Written

OPTIONS = {"num_slots": 24, "chunk_size": 4}
LENGTHS = [70, 3, 0, 4, 3, 20, 5, 2, 1, 3, 3, 2]
GATES = ({}, {"token_weights": 1.0}, {"log_forget": -1.0})
gated = pytest.mark.parametrize("gate", GATES, ids=["none", "token_weights", "log_forget"])
backends = pytest.mark.parametrize("backend", [*BACKENDS, *CPU])


def of_tokens(gate, x):
    """The gate by name, with a number for each token and head of x."""
    generator = torch.Generator().manual_seed(7)
    return {name: sign * torch.rand(x.shape[:3], generator=generator) for name, sign in gate.items()}


@backends
@either_rule
@gated
def test_rows_of_very_different_lengths_are_those_alone(backend, merge, gate):
    tokens = [x.requires_grad_() for x in inputs(1, sum(LENGTHS), heads=4, kv_heads=2, dtype=torch.float32)]
    gate, options = of_tokens(gate, tokens[1]), OPTIONS | {"merge": merge, "backend": backend}
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    names = {"num_slots", "chunk_size", "merge"}
    plain = options_of(
        **{name: options[name] for name in names},
        growth=None,
        init="novelty",
        ablation=Ablation(),
        value_weight=1.0,
        seed=0,
    )
    call = checked_call(
        **dict(zip("qkv", tokens, strict=True)),
        scale=checked_scale(None, tokens[0]),
        options=plain,
        cu_seqlens=ends,
    )
    assert 3 <= len(groups_of(call)) <= 5
    o, _ = ovq_attention(*tokens, **gate, cu_seqlens=ends, **options)
    grads = torch.autograd.grad(o.square().sum(), tokens)
    apart = []
    for start, end in ends.unfold(0, 2, 1).tolist():
        own = [x[:, start:end] for x in (*tokens, *gate.values())]
        apart.append(ovq_attention(*own[:3], **dict(zip(gate, own[3:], strict=True)), **options)[0])
    expected = torch.cat(apart, 1)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(expected.square().sum(), tokens)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@backends
@gated
def test_rows_without_tokens_beside_one_with_many(backend, gate):
    q, k, v = inputs(1, 9, dtype=torch.float32)
    options = OPTIONS | {"backend": backend, **of_tokens(gate, k)}
    o, _ = ovq_attention(q, k, v, cu_seqlens=torch.tensor([0] * 6 + [9]), **options)
    torch.testing.assert_close(o, ovq_attention(q, k, v, **options)[0])


@backends
def test_rows_that_continue_pending_tokens_are_not_mixed_up(backend):
    """Their states have no slots yet."""
    q, k, v = inputs(1, sum(LENGTHS), dtype=torch.float32)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    before = inputs(len(LENGTHS), 3, dtype=torch.float32, seed=1)
    _, state = attend(*before, **OPTIONS, backend=backend)
    given = {"initial_state": state, "cu_seqlens": ends, "backend": backend, **OPTIONS}
    o, _ = ovq_attention(q, k, v, **given)
    torch.testing.assert_close(o, attend(q, k, v, **given)[0])


@pytest.mark.parametrize("backend", ["torch", *CPU])
@gated
def test_short_rows_beside_a_long_one_cost_no_more_than_alone(backend, gate):
    def written(lengths):
        q, k, v = inputs(1, sum(lengths), dtype=torch.float32)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        with Written() as mode:
            ovq_attention(
                q, k, v, **of_tokens(gate, k), cu_seqlens=ends, num_slots=2048, chunk_size=16, backend=backend
            )
        return mode.numel

    # Of some rows, tokens are collected, which takes more than dictionaries of a few rows.
    assert written([2048] + 200 * [5]) < 2 * (written([2046, 2]) + written([6] + 199 * [5]))


@pytest.mark.parametrize("backend", ["torch", *CPU])
@either_rule
@gated
def test_the_cost_of_gradients_is_linear_in_tokens(backend, merge, gate):
    def written(length):
        tokens = [x.requires_grad_() for x in inputs(1, length, dtype=torch.float32)]
        gate_of_tokens = of_tokens(gate, tokens[1])
        with Written() as mode:
            o, _ = ovq_attention(*tokens, **gate_of_tokens, backend=backend, **OPTIONS, merge=merge)
            o.sum().backward()
        return mode.numel

    # Of the dictionary, which is full after some chunks, the first has less.
    assert written(512) < 2.3 * written(256)


@pytest.mark.skipif(not CPU, reason="no compiler")
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [2, 3, 16])
@either_rule
@gated
@torch.no_grad()
def test_a_few_tokens_at_a_time_are_as_one_by_one(state_dtype, size, merge, gate):
    q, k, v = inputs(2, 64, heads=4, kv_heads=2, dtype=torch.float32)
    gate = of_tokens(gate, k)
    options = {"num_slots": 24, "chunk_size": 8, "merge": merge, "backend": "cpu"}

    def read(start, end, state):
        own = {name: x[:, start:end] for name, x in gate.items()}
        part = (x[:, start:end] for x in (q, k, v))
        return attend(*part, **own, initial_state=state, **options)

    _, begun = read(0, 18, None)
    begun = begun.to_state_dtype(state_dtype)
    found = {}
    for num in (1, size):
        state, outputs = begun, []
        for start in range(18, 50, num):
            o, state = read(start, min(start + num, 50), state)
            outputs.append(o)
        found[num] = torch.cat(outputs, 1), state
    torch.testing.assert_close(found[size][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert_same_state(found[size][1], found[1][1], tolerance=1e-5)


@pytest.mark.skipif(not CPU, reason="no compiler")
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@torch.no_grad()
def test_a_few_tokens_copy_no_dictionary(state_dtype):
    q, k, v = inputs(1, 40, dtype=torch.float32)
    options = {"num_slots": 24, "chunk_size": 16, "backend": "cpu"}
    _, state = attend(*(x[:, :32] for x in (q, k, v)), **options)
    state = state.to_state_dtype(state_dtype)
    _, after = attend(*(x[:, 32:36] for x in (q, k, v)), initial_state=state, **options)
    assert after.key_sum is state.key_sum
    assert after.num_pending.tolist() == [4]

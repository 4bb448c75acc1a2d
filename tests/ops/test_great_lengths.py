"""What float32 sums keep after millions of tokens: the figures of `docs/method/guarantees.md`; many slots."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from ovq.ops import OVQState
from tests.ops.common import BACKENDS, CPU, KERNEL_MERGES, attend
from tests.processes import forked

OPTIONS = {"num_slots": 1, "chunk_size": 2}


def state_of(count, dtype=torch.float32):
    """One slot that holds `count` tokens with key (1, 0) and value (1, 1)."""
    return OVQState(
        key_sum=torch.tensor([count, 0.0], dtype=dtype).view(1, 1, 1, 2),
        value_sum=torch.full((1, 1, 1, 2), float(count), dtype=dtype),
        count=torch.tensor([[[count]]]),
        pending_keys=torch.zeros(1, 1, 2, 2, dtype=dtype),
        pending_values=torch.zeros(1, 1, 2, 2, dtype=dtype),
        num_seen=torch.tensor([count]),
        **OPTIONS,
    )


def two_more(state, key=(1.0, 0.0), one_by_one=False, **options):
    k = torch.tensor([key, key], dtype=state.pending_keys.dtype).view(1, 2, 1, 2)
    v = torch.ones_like(k)
    for part in (slice(0, 1), slice(1, 2)) if one_by_one else (slice(0, 2),):
        _, state = attend(k[:, part], k[:, part], v[:, part], initial_state=state, **OPTIONS, **options)
    return state


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("count", [2**24, 2**25 + 2, 10**8, 10**12])
def test_counts_are_exact_at_any_length(count, one_by_one, backend):
    state = two_more(state_of(count), one_by_one=one_by_one, backend=backend)
    assert state.count.flatten().tolist() == state.num_seen.tolist() == [count + 2]


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
def test_additions_vanish_where_it_is_said(backend):
    """A sum takes in a number up to 2^24 times smaller, and then moves no more; one in float64 does."""
    below = two_more(state_of(2**24 - 2), backend=backend)
    assert below.value_sum.flatten().tolist() == [2.0**24] * 2
    above = two_more(state_of(2**24), backend=backend)
    assert above.value_sum.flatten().tolist() == [2.0**24] * 2
    assert above.key_sum.flatten().tolist() == [2.0**24, 0.0]
    # A number is lost in a sum far larger than itself, not because the slot is old.
    sideways = two_more(state_of(2**24), key=(0.0, 1.0), backend=backend)
    assert sideways.key_sum.flatten().tolist() == [2.0**24, 2.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_float64_take_in_far_smaller_numbers(backend):
    wide = two_more(state_of(2**24, torch.float64), backend=backend)
    assert wide.value_sum.flatten().tolist() == [2.0**24 + 2] * 2


def running_sum(tokens):
    return np.add.accumulate(tokens, axis=0, dtype=np.float32)[-1].astype(np.float64)


@pytest.mark.parametrize(("mean", "spread"), [(0.1, 0.1), (1.0, 1.0), (0.0, 1.0)])
def test_the_error_of_a_mean_stays_within_its_bound(mean, spread):
    count = 2_000_000
    noise = np.random.default_rng(0).standard_normal((count, 2), dtype=np.float32)
    tokens = np.float32(mean) + np.float32(spread) * noise
    error = np.abs(running_sum(tokens) - tokens.sum(0, dtype=np.float64)) / count
    assert (error <= 2.0**-22 * count**0.5 * np.sqrt(mean**2 + spread**2)).all()


def test_one_token_over_and_over_is_the_worst_case():
    count = 2_000_000
    token = np.float32(0.9)
    error = abs(running_sum(np.full((count, 1), token))[0] / count - float(token)) / token
    assert 2.0**-22 * count**0.5 < error <= 2.0**-24 * count


def fill_many_slots():
    """A chunk for 40,000 slots, in a thread whose stack could not hold an array per slot: random keys, and
    equal ones, of which every slot is a candidate."""
    num, options = 40_000, {"num_slots": 40_000, "chunk_size": 16}
    empty = OVQState.empty(batch_size=1, num_kv_heads=1, key_dim=4, value_dim=4, **options)
    counts = {"count": torch.ones(1, 1, num, dtype=torch.int64), "num_seen": torch.tensor([num])}
    found = []

    def run():
        for merge in KERNEL_MERGES:
            for factor in (0, 1):
                sums = {name: factor * torch.randn(1, 1, num, 4) for name in ("key_sum", "value_sum")}
                x = factor * torch.randn(1, 16, 1, 4)
                state = dataclasses.replace(empty, **sums, **counts)
                _, state = attend(x, x, x, merge=merge, initial_state=state, backend="cpu", **options)
                found.append(int(state.count.sum()))

    in_small_thread(run)
    assert found == [num + 16] * 4


def in_small_thread(run):
    threading.stack_size(2**18)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def step_in_a_large_chunk():
    """A step after 100,000 pending tokens with weights, in such a thread; its own is as large as theirs."""
    num, options = 100_000, {"num_slots": 2, "chunk_size": 100_002}
    state = OVQState.empty(batch_size=1, num_kv_heads=1, key_dim=4, value_dim=4, **options)
    weights = {"weight": torch.zeros(1, 1, 0), "pending_weights": torch.ones(1, 1, num + 2)}
    weights["pending_forget"] = torch.zeros(1, 1, dtype=torch.float64)
    state = dataclasses.replace(state, num_seen=torch.tensor([num]), **weights)
    x, found = torch.ones(1, 1, 1, 4), []

    def run():
        weights = {"token_weights": torch.full((1, 1, 1), float(num)), "log_forget": torch.zeros(1, 1, 1)}
        given = {**weights, "initial_state": state, "backend": "cpu", **options}
        found.extend(attend(0 * x, 0 * x, x, **given)[0].flatten().tolist())

    in_small_thread(run)
    assert found == pytest.approx([0.5] * 4, rel=1e-5)


@pytest.mark.skipif(not CPU, reason="compiled kernels alone have arrays on the stack")
@pytest.mark.parametrize("run", [fill_many_slots, step_in_a_large_chunk])
def test_the_stack_of_a_thread_does_not_bound_the_number_of_slots_or_tokens(run):
    process = forked(run)
    process.start()
    process.join()
    assert process.exitcode == 0

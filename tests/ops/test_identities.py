"""What every implementation must satisfy, whatever its arithmetic."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ovq.ops import ovq_attention, scheduled_slots
from tests.ops.common import (
    BACKENDS,
    RULES,
    SCORINGS,
    VARIANTS,
    assert_same_state,
    attend,
    by_turns,
    either_rule,
    inputs,
    read_in_pieces,
)
from tests.ops.recount import recount, recount_by_edges

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

OPTIONS = {"num_slots": 12, "chunk_size": 8}


@pytest.mark.parametrize(("merge", "recounted"), [("existing", recount), ("nearest", recount_by_edges)])
def test_means_are_those_of_what_was_assigned(backend, merge, recounted):
    q, k, v = inputs(2, 61, 2, 2)
    _, state = attend(q, k, v, merge=merge, backend=backend, **OPTIONS)
    for row in range(2):
        for head in range(2):
            keys, values = k[row, :, head].numpy(), v[row, :, head].numpy()
            slots = recounted(keys, values, **OPTIONS)
            assert state.count[row, head].tolist() == [len(members) for members in slots]
            means = np.stack([keys[members].mean(0) for members in slots])
            np.testing.assert_allclose(state.keys[row, head].numpy(), means, atol=1e-12)
            means = np.stack([values[members].mean(0) for members in slots])
            np.testing.assert_allclose(state.values[row, head].numpy(), means, atol=1e-12)


@either_rule
@pytest.mark.parametrize("growth", ["plateau", "linear", "immediate"])
def test_counts_add_up_and_slots_follow_the_schedule(backend, growth, merge):
    q, k, v = inputs(1, 61)
    _, state = attend(q, k, v, growth=growth, merge=merge, backend=backend, **OPTIONS)
    assert state.count.sum(-1).flatten().tolist() == [56]
    assert state.num_seen.tolist() == [61]
    assert state.num_open.tolist() == [scheduled_slots(56, num_slots=12, growth=growth)]
    assert state.count.shape[2] <= 12


@pytest.mark.parametrize("options", [{"growth": "immediate"}, {"merge": "nearest"}, {}], ids=str)
def test_immediate_growth_is_exact_attention(backend, options):
    """The last is the control: where slots merge, the output does differ."""
    q, k, v = inputs(2, 61, 4, 2)
    o, _ = ovq_attention(q, k, v, num_slots=61, chunk_size=8, backend=backend, **options)
    exact = scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=6**0.5, enable_gqa=True
    )
    difference = (o - exact.transpose(1, 2)).abs().max()
    assert difference < 1e-10 if options else difference > 1e-3


@pytest.mark.parametrize(
    ("j", "dtype", "variant"),
    by_turns([0, 7, 8, 19, 36], [torch.float64, torch.float32, torch.bfloat16], VARIANTS),
    ids=str,
)
def test_causality_bit_for_bit(backend, dtype, j, variant):
    causal(backend, dtype, j, variant)


@functools.cache
def unchanged(backend, dtype, variant):
    q, k, v = inputs(1, 37, dtype=dtype)
    return ovq_attention(q, k, v, backend=backend, **OPTIONS, **dict(variant))[0]


def causal(backend, dtype, j, variant):
    """Token j changes nothing before it."""
    q, k, v = inputs(1, 37, dtype=dtype)
    before = unchanged(backend, dtype, tuple(variant.items()))
    changed = [t.clone() for t in (q, k, v)]
    for t in changed:
        t[:, j] = -3 * t[:, j]
    after, _ = ovq_attention(*changed, backend=backend, **OPTIONS, **variant)
    assert torch.equal(before[:, :j], after[:, :j])
    # The control: the token itself, and (through the dictionary) later chunks do change.
    assert not torch.equal(before[:, j:], after[:, j:])


@functools.cache
def whole_call(options):
    """Outputs and final state of a call with all tokens of the test below."""
    return attend(*inputs(2, 37, 4, 2), **dict(options), generator=torch.Generator().manual_seed(1))


PIECES = [[30, 7], [1] * 37, [8, 8, 21], [3, 0, 20, 14], [36, 1]]
WAYS = [
    *((*rules, {}) for rules in RULES),
    *(("novelty", *both) for both in itertools.product(("existing", "updated"), SCORINGS[1:])),
]


@pytest.mark.parametrize(
    ("pieces", "init", "merge", "variant"),
    [(pieces, *way) for i, pieces in enumerate(PIECES) for j, way in enumerate(WAYS) if (i + j) % 2],
    ids=str,
)
def test_any_split_into_calls(backend, pieces, merge, init, variant):
    q, k, v = inputs(2, 37, 4, 2)
    options = {**OPTIONS, "merge": merge, "init": init, **variant, "backend": backend}
    whole, final = whole_call(tuple(options.items()))
    options["generator"] = torch.Generator().manual_seed(1)
    o, state = read_in_pieces({"q": q, "k": k, "v": v}, pieces, **options)
    torch.testing.assert_close(o, whole, rtol=1e-9, atol=1e-9)
    assert_same_state(state, final)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_row_is_the_same_alone_batched_padded_and_packed(backend, variant):
    lengths = [37, 5, 24, 16]
    rows = [inputs(1, n, 4, 2, seed=n) for n in lengths]
    options = {**OPTIONS, **variant, "backend": backend}
    alone = [attend(*row, **options) for row in rows]

    for side in ("left", "right"):
        longest = max(lengths) + 3
        q, k, v = (torch.full((4, longest, *t.shape[2:]), 7.0, dtype=t.dtype) for t in rows[0])
        mask = torch.zeros(4, longest, dtype=torch.int64)
        for r, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            part = slice(longest - n, longest) if side == "left" else slice(0, n)
            mask[r, part] = 1
            for whole, t in zip((q, k, v), row, strict=True):
                whole[r, part] = t[0]
        o, state = attend(q, k, v, attention_mask=mask, **options)
        assert o[mask == 0].abs().max() == 0
        for r, (o_alone, state_alone) in enumerate(alone):
            torch.testing.assert_close(o[r, mask[r] == 1], o_alone[0], rtol=1e-9, atol=1e-9)
            assert_same_state(state.select([r]), state_alone)

    packed = [torch.cat([row[i] for row in rows], 1) for i in range(3)]
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    o, state = attend(*packed, cu_seqlens=bounds, **options)
    for r, (o_alone, state_alone) in enumerate(alone):
        torch.testing.assert_close(o[:, bounds[r] : bounds[r + 1]], o_alone, rtol=1e-9, atol=1e-9)
        assert_same_state(state.select([r]), state_alone)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_of_packed_and_padded_rows(backend, variant):
    lengths = [21, 5, 16]
    rows = [inputs(1, n, 4, 2, seed=n) for n in lengths]
    options = {**OPTIONS, **variant, "backend": backend}
    expected = []
    for row in rows:
        leaves = [t.clone().requires_grad_() for t in row]
        o, state = attend(*leaves, **options)
        expected.append(torch.autograd.grad(o.sin().sum() + state.value_sum.sin().sum(), leaves))

    packed = [torch.cat([row[i] for row in rows], 1).requires_grad_() for i in range(3)]
    bounds = [0, 21, 26, 42]
    o, state = attend(*packed, cu_seqlens=torch.tensor(bounds), **options)
    grads = torch.autograd.grad(o.sin().sum() + state.value_sum.sin().sum(), packed)
    for r in range(3):
        for grad, reference in zip(grads, expected[r], strict=True):
            part = grad[:, bounds[r] : bounds[r + 1]]
            torch.testing.assert_close(part, reference, rtol=1e-9, atol=1e-9)

    padded = [torch.zeros(3, 23, *t.shape[2:], dtype=t.dtype) for t in rows[0]]
    mask = torch.zeros(3, 23)
    for r, n in enumerate(lengths):
        mask[r, 23 - n :] = 1
        for i in range(3):
            padded[i][r, 23 - n :] = rows[r][i][0]
    padded = [t.requires_grad_() for t in padded]
    o, state = attend(*padded, attention_mask=mask, **options)
    grads = torch.autograd.grad(o.sin().sum() + state.value_sum.sin().sum(), padded)
    for r, n in enumerate(lengths):
        for grad, reference in zip(grads, expected[r], strict=True):
            torch.testing.assert_close(grad[r, 23 - n :], reference[0], rtol=1e-9, atol=1e-9)
            assert grad[r, : 23 - n].abs().sum() == 0


@either_rule
def test_a_row_of_padding_gives_zeros_and_leaves_its_state(backend, merge):
    q, k, v = inputs(2, 20)
    options = {**OPTIONS, "merge": merge, "backend": backend}
    _, before = attend(q, k, v, **options)
    mask = torch.tensor([[1] * 20, [0] * 20])
    o, after = attend(q, k, v, attention_mask=mask, initial_state=before, **options)
    assert o[1].abs().max() == 0
    assert o[0].abs().min() > 0
    assert_same_state(after.select([1]), before.select([1]), tolerance=0)
    assert after.num_seen.tolist() == [40, 20]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_lengths_around_a_chunk(backend, length):
    q, k, v = inputs(2, length)
    o, state = attend(q, k, v, backend=backend, **OPTIONS)
    assert o.shape == (2, length, 2, 5)
    assert state.count.sum(-1).flatten().tolist() == [length // 8 * 8] * 2
    assert state.num_pending.tolist() == [length % 8] * 2


def test_a_constant_rate_forgets_geometrically(backend):
    """One slot and unequal keys: the mean is the first key, then moved by a quarter of the way to each."""
    q, k, v = inputs(1, 32, 1, 1)
    _, state = attend(q, k, v, num_slots=1, chunk_size=8, ablation={"rate": 0.25}, backend=backend)
    weights = 0.25 * 0.75 ** torch.arange(31, -1, -1, dtype=torch.float64)
    weights[0] = 0.75**31
    torch.testing.assert_close(state.keys[0, 0, 0], weights @ k[0, :, 0])
    torch.testing.assert_close(state.values[0, 0, 0], weights @ v[0, :, 0])
    assert state.count.item() == 32


def test_the_norm_term_counts_only_where_norms_differ(backend):
    """Slots that hold one key each are as long as the keys; means of several are shorter and gain."""
    q, k, v = inputs(1, 61, 2, 1)
    options = {"chunk_size": 8, "backend": backend}
    for num_slots, growth, is_same in ((61, "immediate", True), (12, "plateau", False)):
        settings = {**options, "num_slots": num_slots, "growth": growth}
        plain, normed = (
            ovq_attention(q, k, v, **settings, ablation={"bias": bias})[0] for bias in ("count", "count+norm")
        )
        assert torch.allclose(plain, normed, atol=1e-10) == is_same


def test_of_the_ablations_a_constant_rate_alone_changes_the_state(backend):
    q, k, v = inputs(1, 61, 2, 1)
    plain, normed, moved = (
        attend(q, k, v, num_slots=12, chunk_size=8, ablation=ablation, backend=backend)[1]
        for ablation in ({}, {"bias": "count+norm"}, {"rate": 0.3})
    )
    assert_same_state(normed, plain, tolerance=0)
    assert torch.equal(moved.num_open, plain.num_open)
    # The same tokens in as many slots, but not in the same ones: means that moved otherwise route otherwise.
    assert moved.count.sum() == plain.count.sum()
    assert not torch.equal(moved.count, plain.count)
    words = "neither routing nor state; a constant rate moves the means that route, but not the schedule."
    page = Path(__file__).parents[2] / "docs" / "method" / "math.md"
    assert f"The norm term changes {words}" in " ".join(page.read_text().split())


@either_rule
def test_one_slot_is_the_mean_of_all(backend, merge):
    q, k, v = inputs(1, 32, 1, 1)
    o, state = attend(q, k, v, num_slots=1, chunk_size=8, merge=merge, backend=backend)
    torch.testing.assert_close(state.keys[0, 0, 0], k[0, :, 0].mean(0))
    assert torch.isfinite(o).all()


@either_rule
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_stay_in_their_row_and_head(backend, bad, merge):
    q, k, v = inputs(3, 30, 2, 2)
    expected, _ = ovq_attention(q, k, v, merge=merge, backend=backend, **OPTIONS)
    k[1, 3, 0] = bad
    v[1, 4, 0] = bad
    o, state = attend(q, k, v, merge=merge, backend=backend, **OPTIONS)
    assert torch.equal(o[0], expected[0])
    assert torch.equal(o[2], expected[2])
    assert torch.equal(o[1, :, 1], expected[1, :, 1])
    assert not torch.isfinite(o[1, -1, 0]).all()
    assert state.count.sum(-1).unique().tolist() == [24]


@either_rule
def test_duplicate_zero_and_huge_keys(backend, merge):
    q, k, v = inputs(1, 48, 1, 1)
    k[0, 10:20] = k[0, 3]
    k[0, 30:34] = 0
    k[0, 25] *= 1e4
    o, state = attend(q, k, v, merge=merge, backend=backend, **OPTIONS)
    o_ref, state_ref = attend(q, k, v, merge=merge, backend="naive", **OPTIONS)
    assert torch.isfinite(o).all()
    torch.testing.assert_close(o, o_ref, rtol=1e-9, atol=1e-9)
    assert_same_state(state, state_ref)


@either_rule
def test_the_state_handed_in_is_never_changed(backend, merge):
    q, k, v = inputs(2, 60)
    options = {**OPTIONS, "merge": merge, "backend": backend}
    _, state = attend(q[:, :21], k[:, :21], v[:, :21], **options)
    copy = state.clone()
    for stop in (22, 40):
        attend(q[:, 21:stop], k[:, 21:stop], v[:, 21:stop], initial_state=state, **options)
    for t in range(21, 30):  # over a chunk boundary
        part = slice(t, t + 1)
        attend(q[:, part], k[:, part], v[:, part], initial_state=state, **options)
    assert_same_state(state, copy, tolerance=0)


@either_rule
def test_two_continuations_of_one_state(backend, merge):
    """Decode steps share buffers: neither branch may see the other's tokens."""
    q, k, v = inputs(1, 40)
    options = {**OPTIONS, "merge": merge, "backend": backend}
    _, root = attend(q[:, :10], k[:, :10], v[:, :10], **options)
    states, outputs = {10: root, 25: root}, {10: [], 25: []}
    for step in range(15):
        for start, state in states.items():  # in turn, so that each could overwrite the other's last token
            token = slice(start + step, start + step + 1)
            o, states[start] = attend(q[:, token], k[:, token], v[:, token], initial_state=state, **options)
            outputs[start].append(o)
    for start, state in states.items():
        part = slice(start, start + 15)
        o, expected = attend(q[:, part], k[:, part], v[:, part], initial_state=root, **options)
        torch.testing.assert_close(torch.cat(outputs[start], 1), o, rtol=1e-9, atol=1e-9)
        assert_same_state(state, expected)


@either_rule
def test_bit_identical_run_to_run(backend, merge):
    q, k, v = inputs(2, 50, dtype=torch.float32)
    first, state = attend(q, k, v, merge=merge, backend=backend, **OPTIONS)
    again, state_again = attend(q, k, v, merge=merge, backend=backend, **OPTIONS)
    assert torch.equal(first, again)
    assert_same_state(state_again, state, tolerance=0)

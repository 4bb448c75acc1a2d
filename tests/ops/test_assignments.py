"""Where tokens are: against a recount, and against the gradients of sums, which tell it of every backend."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn.functional import normalize

from ovq.ops import slot_assignments
from ovq.ops.options import CURRENT_MERGES, INITS
from tests.ops.common import BACKENDS, CPU, assert_same_state, attend, either_rule, inputs, with_rules
from tests.ops.recount import recount, recount_by_edges

WAYS = ("torch", *CPU)


def clustered(batch, length, *, dtype=torch.float32, seed=0):
    """Keys and values of two heads that come back again and again, so that slots are merged."""
    _, k, v = inputs(batch, length, 2, 2, 8, 6, seed=seed)
    which = torch.randint(9, (length,), generator=torch.Generator().manual_seed(seed))
    k = normalize(k[:, which % k.shape[1]] + 0.1 * k, dim=-1)
    return k.to(dtype), (v[:, which % v.shape[1]] + 0.2 * v).to(dtype)


def by_gradient(k, v, backend, *, initial_state=None, **options):
    """Slots of tokens, of the initial state's slots and of its pending tokens, as the backward has them.

    A token's value is a term of the sum of the slot that it is in, and of no other. So the derivative of
    `sum_s (s + 1) value_sum[s]` with respect to it is that slot, plus 1; 0 if it is in no slot.
    """
    v = v.clone().requires_grad_()
    leaves = [v]
    if initial_state is not None:
        parts = [getattr(initial_state, x).clone().requires_grad_() for x in ("value_sum", "pending_values")]
        names = ("value_sum", "pending_values")
        initial_state = dataclasses.replace(initial_state, **dict(zip(names, parts, strict=True)))
        leaves += parts
    q = torch.zeros_like(k)
    _, state = attend(q, k, v, initial_state=initial_state, backend=backend, **options)
    weight = torch.arange(1.0, state.count.shape[2] + 1)[:, None].to(state.value_sum.dtype)
    found = torch.autograd.grad((weight * state.value_sum).sum(), leaves, allow_unused=True)
    return state, [None if x is None else x[..., 0].round().long() - 1 for x in found]


@with_rules(["way", "backend", "init"], WAYS, [*BACKENDS, *CPU], INITS, rules=CURRENT_MERGES)
def test_tokens_are_where_the_gradients_of_a_backend_say(way, backend, init, merge):
    k, v = clustered(2, 50)
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[0, :7], mask[1, 40:] = 0, 0
    options = {"num_slots": 12, "chunk_size": 8, "init": init, "merge": merge, "attention_mask": mask}
    seeded = {"generator": torch.Generator().manual_seed(3)}
    state, [slots] = by_gradient(k, v, backend, **options, **seeded)
    found = slot_assignments(k, v, **options, **seeded, backend=way)
    assert torch.equal(found.slots, slots.transpose(1, 2))
    assert_same_state(found.state, state, tolerance=1e-6)
    assert (found.slots[0, :, :7] == -1).all()
    # 43 and 40 real tokens in chunks of 8.
    assert (found.slots >= 0).sum(-1).tolist() == [[40, 40], [40, 40]]
    has_moved = bool((found.slots != found.chunk_slots).any())
    assert has_moved == (merge == "nearest")


@with_rules(["way", "backend"], WAYS, [*BACKENDS, *CPU])
def test_a_call_that_continues_a_state(way, backend, merge):
    """Rows of two lengths: the shorter comes second, and both begin with pending tokens."""
    k, v = clustered(2, 60)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, 41:] = 0
    options = {"num_slots": 12, "chunk_size": 8, "merge": merge}
    _, before = attend(k[:, :21], k[:, :21], v[:, :21], **options, backend="naive")
    _, before = attend(k[:, :1], k[:, :1], v[:, :1], initial_state=before, **options, backend="naive")
    options |= {"initial_state": before, "attention_mask": mask}
    state, [slots, earlier, pending] = by_gradient(k, v, backend, **options)
    found = slot_assignments(k, v, **options, backend=way)
    assert torch.equal(found.slots, slots.transpose(1, 2))
    assert torch.equal(found.earlier_slots, earlier)
    assert torch.equal(found.earlier_pending, pending)
    assert_same_state(found.state, state, tolerance=1e-6)
    has_moved = not torch.equal(found.earlier_slots[0, 0], torch.arange(earlier.shape[2]))
    assert has_moved == (merge == "nearest")
    # Every token of a slot is an earlier one, or one of these.
    counts = torch.zeros_like(found.state.count)
    counts.scatter_add_(2, earlier, before.count)
    for labels in (found.slots, pending):
        counts.scatter_add_(2, labels.clamp(min=0), (labels >= 0).long())
    assert torch.equal(counts, found.state.count)
    for num_tokens in (3, 10, 25):
        shorter = {**options, "attention_mask": mask[:, :num_tokens]}
        part = slot_assignments(k[:, :num_tokens], v[:, :num_tokens], **shorter, backend=way)
        assert torch.equal(found.after(num_tokens)[..., :num_tokens], part.slots)
    # 22 tokens came before these, and the second row has no padding.
    assert found.position[1].tolist() == list(range(22, 82))
    assert found.row.unique().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", [recount, recount_by_edges])
def test_tokens_are_where_a_recount_says(way, rule):
    k, v = clustered(1, 70)
    merge = "existing" if rule is recount else "nearest"
    found = slot_assignments(k, v, num_slots=12, chunk_size=8, merge=merge, backend=way)
    means = found.mean_position
    for head in range(2):
        slots = rule(k[0, :, head].double().numpy(), v[0, :, head].double().numpy(), 12, 8)
        assert found.state.count[0, head].tolist() == [len(members) for members in slots]
        for slot, members in enumerate(slots):
            assert found.members(slot, head=head).tolist() == sorted(members)
            assert int(found.oldest[0, head, slot]) == min(members)
            assert float(means[0, head, slot]) == pytest.approx(sum(members) / len(members))


@with_rules(["way"], WAYS)
def test_slots_at_an_earlier_time_are_those_of_a_shorter_call(way, merge):
    k, v = clustered(2, 64)
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, :9] = 0
    options = {"num_slots": 10, "chunk_size": 8, "merge": merge, "backend": way}
    found = slot_assignments(k, v, **options, attention_mask=mask)
    for num_tokens in (0, 7, 8, 30, 64, 100):
        expected = torch.full_like(found.slots, -1)
        for row, first in enumerate((0, 9)):
            part = slice(first, first + num_tokens)
            if num_tokens:
                shorter = slot_assignments(k[row : row + 1, part], v[row : row + 1, part], **options)
                expected[row, :, part] = shorter.slots
        assert torch.equal(found.after(num_tokens), expected)
    whole = slot_assignments(k[:1], v[:1], **options)
    for chunk in range(8):
        own = slice(8 * chunk, 8 * chunk + 8)
        assert torch.equal(whole.chunk_slots[..., own], whole.after(8 * chunk + 8)[..., own])
    with pytest.raises(ValueError, match="num_tokens: expected an integer of at least 0, found -1"):
        found.after(-1)


@with_rules(["way"], WAYS, rules=CURRENT_MERGES)
def test_packed_rows_are_rows_of_their_own(way, merge):
    k, v = clustered(1, 75)
    options = {"num_slots": 8, "chunk_size": 8, "merge": merge, "backend": way}
    bounds = [0, 20, 20, 75]
    found = slot_assignments(k, v, **options, cu_seqlens=torch.tensor(bounds))
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = slot_assignments(k[:, start:end], v[:, start:end], **options)
        assert torch.equal(found.slots[..., start:end], alone.slots)
        assert_same_state(found.state.select([row]), alone.state, tolerance=0)
        assert (found.row[0, start:end] == row).all()
        assert torch.equal(found.position[:, start:end], torch.arange(end - start)[None])
        slots = alone.state.count.shape[2]
        assert torch.equal(found.oldest[row : row + 1, :, :slots], alone.oldest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@either_rule
def test_other_dtypes(merge, dtype):
    k, v = clustered(1, 64, dtype=dtype)
    options = {"num_slots": 10, "chunk_size": 8, "merge": merge}
    found = slot_assignments(k, v, **options)
    assert_same_state(found.state, attend(k, k, v, **options)[1], tolerance=1e-6)
    # Widening changes no bit of the inputs, and sums are wide already.
    _, [slots] = by_gradient(k.double(), v.double(), "naive", **options)
    assert torch.equal(found.slots, slots.transpose(1, 2))


def test_a_constant_rate():
    """Tokens go where they go at the running mean of the same dictionary; the means then move otherwise."""
    k, v = clustered(2, 64)
    options = {"num_slots": 10, "chunk_size": 8, "ablation": {"rate": 0.3}}
    found = slot_assignments(k, v, **options)
    assert_same_state(found.state, attend(k, k, v, **options, backend="naive")[1], tolerance=1e-6)
    counts = torch.zeros_like(found.state.count)
    counts.scatter_add_(2, found.slots.clamp(min=0), (found.slots >= 0).long())
    assert torch.equal(counts, found.state.count)


@with_rules(["way"], WAYS)
def test_keys_and_values_that_are_not_finite(way, merge):
    k, v = clustered(1, 64)
    k[0, 5, 1, 2], v[0, 14, 1, 2] = torch.nan, torch.inf
    options = {"num_slots": 10, "chunk_size": 8, "merge": merge}
    found = slot_assignments(k, v, **options, backend=way)
    state = attend(k, k, v, **options, backend="naive")[1]
    assert torch.equal(found.state.count, state.count)
    # The slots of those tokens, in the head that has them, and no others.
    is_spoilt = ~(state.key_sum.isfinite().all(-1) & state.value_sum.isfinite().all(-1))
    assert is_spoilt.nonzero()[:, 2].tolist() == sorted(set(found.slots[0, 1, [5, 14]].tolist()))


@with_rules(["way"], WAYS)
def test_few_tokens_and_none(way, merge):
    k, v = clustered(2, 30)
    options = {"num_slots": 4, "chunk_size": 8, "merge": merge, "backend": way}
    for num_tokens in (0, 5):
        found = slot_assignments(k[:, :num_tokens], v[:, :num_tokens], **options)
        assert found.slots.tolist() == [[[-1] * num_tokens] * 2] * 2
        assert found.state.num_seen.tolist() == [num_tokens] * 2
        assert found.oldest.shape == (2, 2, 0)
        # The tokens that are pending at the end are those of the next call's first chunk.
        later = slot_assignments(k[:, 20:30], v[:, 20:30], initial_state=found.state, **options)
        assert (later.earlier_pending >= 0).sum(-1).tolist() == [[num_tokens] * 2] * 2
    again = slot_assignments(k[:, :0], v[:, :0], initial_state=later.state, **options)
    assert_same_state(again.state, later.state, tolerance=0)


def test_a_state_is_not_changed_and_nothing_has_a_gradient():
    k, v = (x.requires_grad_() for x in clustered(1, 40))
    options = {"num_slots": 8, "chunk_size": 8, "merge": "nearest"}
    _, before = attend(k, k, v, **options)
    copy = before.clone()
    found = slot_assignments(k, v, initial_state=before, **options)
    assert_same_state(before, copy, tolerance=0)
    assert not found.state.key_sum.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backend": "naive"},
            r"backend: expected one of \('auto', 'cpu', 'torch', 'triton'\), found 'naive'",
        ),
        ({"k": torch.zeros(1, 4, 2)}, r"k: expected 4 dimensions \[B, T, heads, dim\], found \(1, 4, 2\)"),
        ({"v": torch.zeros(1, 5, 1, 3)}, r"k, v: expected \[B, T, Hkv, K\], .* found \(1, 4, 1, 3\), \(1, 5"),
        (
            {"v": torch.zeros(1, 4, 1, 3).double()},
            "v: expected torch.float32 on cpu as k is, found torch.float",
        ),
        ({"num_slots": 0}, "num_slots: expected an integer of at least 1, found 0"),
        ({"merge": "farthest"}, r"merge: expected one of .*, found 'farthest'"),
        ({"backend": "cpu", "ablation": {"rate": 0.5}}, "backend: 'cpu': expected rate 'count', found 0.5"),
        ({"initial_state": 1}, "initial_state: expected an OVQState, found int"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x = torch.zeros(1, 4, 1, 3)
    options = {"k": x, "v": x, "num_slots": 4, "chunk_size": 2} | change
    with pytest.raises(ValueError, match=message):
        slot_assignments(**options)


@pytest.mark.parametrize("place", [{"slot": -1}, {"slot": "a"}, {"slot": 4}, {"head": 1}, {"row": -1}])
def test_members_of_what_there_is_not(place):
    x = torch.zeros(1, 4, 1, 3)
    found = slot_assignments(x, x, num_slots=4, chunk_size=2)
    [name] = place
    with pytest.raises(ValueError, match=f"{name}: expected 0 to [03], found"):
        found.members(**{"slot": 0} | place)


def test_a_batch_without_rows():
    x = torch.zeros(0, 5, 2, 3)
    assert slot_assignments(x, x, num_slots=4, chunk_size=2).slots.shape == (0, 2, 5)

"""`OVQState`: rows that come and go, snapshots, another size, and files."""

import copy
import dataclasses
import math
import os
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ovq.ops import OVQState
from ovq.ops.state import state_tensors
from tests.disks import full_disk
from tests.ops.common import VARIANTS, assert_same_state, attend, either_rule, inputs
from tests.ops.recount import linked, recount, recount_by_edges
from tests.processes import handed_over

OPTIONS = {"num_slots": 12, "chunk_size": 8}


def prefilled(batch, length, seed=0, **options):
    return attend(*inputs(batch, length, 4, 2, seed=seed), **{**OPTIONS, **options})[1]


def token(t, rows=None):
    """One token per row of a fixed stream of four rows."""
    q, k, v = (x[:, t : t + 1] for x in inputs(4, 60, 4, 2, seed=9))
    return (q, k, v) if rows is None else (q[rows], k[rows], v[rows])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_continuous_batching(variant):
    """Rows of different lengths decode together; one leaves, one joins, one is doubled, order changes."""
    lengths = [3, 8, 15, 21]
    alone = [prefilled(1, n, seed=n, **variant) for n in lengths]
    batch = OVQState.concatenate(alone)
    rows = [0, 1, 2, 3]

    def step(t):
        nonlocal batch
        o, batch = attend(*token(t, rows), initial_state=batch, **OPTIONS, **variant)
        for place, row in enumerate(rows):
            expected, state = attend(*token(t, [row]), initial_state=states[place], **OPTIONS, **variant)
            torch.testing.assert_close(o[place], expected[0], rtol=1e-9, atol=1e-9)
            states[place] = state
            assert_same_state(batch.select([place]), state)

    states = list(alone)
    for t in range(6):
        step(t)
    batch, rows, states = batch.select([3, 0, 2]), [3, 0, 2], [states[3], states[0], states[2]]
    for t in range(6, 12):
        step(t)
    newcomer = prefilled(1, 30, seed=5, **variant)
    batch, rows, states = OVQState.concatenate([batch, newcomer]), [*rows, 1], [*states, newcomer]
    batch, rows, states = (
        batch.reorder(torch.tensor([1, 1, 3, 0])),
        [0, 0, 1, 3],
        [states[i] for i in (1, 1, 3, 0)],
    )
    for t in range(12, 24):
        step(t)


def test_repeat_interleave_and_boolean_select():
    state = prefilled(2, 21)
    doubled = state.repeat_interleave(2)
    for place, row in enumerate([0, 0, 1, 1]):
        assert_same_state(doubled.select([place]), state.select([row]), tolerance=0)
    assert_same_state(state.select(torch.tensor([False, True])), state.select([1]), tolerance=0)


def test_a_kept_state_is_a_snapshot():
    """Rollback: continue, reject, return to the snapshot, and get what never having gone on gives."""
    snapshot = prefilled(4, 14)
    expected, expected_state = attend(*token(30), initial_state=snapshot.clone(), **OPTIONS)
    state = snapshot
    for t in range(12):  # over the chunk boundary, which replaces the dictionary
        _, state = attend(*token(t), initial_state=state, **OPTIONS)
    o, after = attend(*token(30), initial_state=snapshot, **OPTIONS)
    assert torch.equal(o, expected)
    assert_same_state(after, expected_state, tolerance=0)


def rebuilt(state):
    """A state of the same tensors, by the keywords of the constructor."""
    names = ("key_sum", "value_sum", "count", "pending_keys", "pending_values", "num_seen")
    parts = {name: getattr(state, name) for name in names}
    return OVQState(**parts, num_slots=state.num_slots, chunk_size=state.chunk_size)


DERIVED = {
    "detach": lambda s: s.detach(),
    "select": lambda s: s.select([0, 1, 2, 3]),
    "to": lambda s: s.to("cpu"),
    "resize": lambda s: s.resize(20),
    "replace": lambda s: dataclasses.replace(s, num_slots=20),
    "replace keys": lambda s: dataclasses.replace(s, pending_keys=2 * s.pending_keys),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "process": handed_over,
    "keywords": rebuilt,
}


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
@pytest.mark.parametrize("has_decoded", [False, True])
def test_derived_states_that_share_memory_do_not_overwrite_each_other(derive, has_decoded):
    state = prefilled(4, 10)
    if has_decoded:
        _, state = attend(*token(3), initial_state=state, **OPTIONS)
    derived = derive(state)
    options = {**OPTIONS, "num_slots": derived.num_slots}
    expected, _ = attend(
        *token(1), initial_state=attend(*token(0), initial_state=derived.clone(), **options)[1], **options
    )
    _, one = attend(*token(0), initial_state=derived, **options)
    attend(*token(7), initial_state=state, **OPTIONS)
    o, _ = attend(*token(1), initial_state=one, **options)
    assert torch.equal(o, expected)


def test_tokens_are_never_written_into_the_tensors_of_a_caller():
    state = rebuilt(prefilled(4, 10))
    before = state.pending_keys.clone(), state.pending_values.clone()
    attend(*token(0), initial_state=state, **OPTIONS)
    assert torch.equal(state.pending_keys, before[0])
    assert torch.equal(state.pending_values, before[1])


def test_weights_are_never_written_into_the_tensor_of_a_caller():
    state, ones = prefilled(4, 9), torch.ones(4, 1, 2)
    _, state = attend(*token(9), initial_state=state, token_weights=ones, **OPTIONS)
    given = state.pending_weights.clone()
    other, before = dataclasses.replace(state, pending_weights=given), given.clone()
    attend(*token(10), initial_state=other, token_weights=3 * ones, **OPTIONS)
    assert torch.equal(given, before)


def test_pending_tokens_are_copied_once_per_chunk():
    states = [prefilled(4, 16)]
    for t in range(16):
        states.append(attend(*token(t), initial_state=states[-1], **OPTIONS)[1])
    # All states are kept, so that no address is used twice.
    buffers = [state.pending_keys.data_ptr() for state in states]
    assert len(set(buffers[1:9])) == len(set(buffers[9:])) == 1
    assert len(set(buffers)) == 3


def test_rows_picked_at_every_step_are_not_copied_again():
    picked = prefilled(4, 10).reorder(torch.tensor([1, 1, 0, 3]))
    _, after = attend(*token(0), initial_state=picked, **OPTIONS)
    assert after.pending_keys.data_ptr() == picked.pending_keys.data_ptr()
    # What is saved does not contain the token that another continuation has written behind them.
    assert state_tensors(picked)["pending_keys"][:, :, 2:].eq(0).all()


def test_a_state_of_inference_mode_goes_on_outside_of_it():
    with torch.inference_mode():
        _, state = attend(*token(0), initial_state=prefilled(4, 10), **OPTIONS)
    with torch.no_grad():
        o, _ = attend(*token(1), initial_state=state, **OPTIONS)
        _, state = attend(*token(0), initial_state=prefilled(4, 10), **OPTIONS)
        expected, _ = attend(*token(1), initial_state=state, **OPTIONS)
    assert torch.equal(o, expected)


def test_clone_shares_nothing():
    state = prefilled(1, 21)
    own = state.clone()
    own.key_sum.zero_()
    own.pending_keys.zero_()
    own.num_seen.zero_()
    assert state.key_sum.abs().sum() > 0
    assert state.pending_keys.abs().sum() > 0
    assert state.num_seen.tolist() == [21]


def test_a_copy_does_not_keep_the_buffers_of_its_original_alive():
    _, state = attend(*token(0), initial_state=prefilled(4, 10), **OPTIONS)
    buffer, own = weakref.ref(state.pending_keys), state.clone()
    del state
    assert own.num_pending.tolist() == [3] * 4
    assert buffer() is None


def test_growing_lets_the_schedule_open_more():
    q, k, v = inputs(1, 400, 4, 2)
    _, state = attend(q[:, :200], k[:, :200], v[:, :200], **OPTIONS)
    larger = state.resize(48)
    assert torch.equal(larger.key_sum, state.key_sum)
    o, after = attend(q[:, 200:], k[:, 200:], v[:, 200:], initial_state=larger, num_slots=48, chunk_size=8)
    # One chunk opens at most one slot per token, so the first chunk after growing opens 8.
    assert int(state.num_open) == 11
    assert int(after.num_open) == 400 * 48 // 448
    assert after.count.sum(-1).unique().tolist() == [400]
    o_ref, after_ref = attend(
        q[:, 200:], k[:, 200:], v[:, 200:], initial_state=larger, num_slots=48, chunk_size=8, backend="naive"
    )
    torch.testing.assert_close(o, o_ref, rtol=1e-9, atol=1e-9)
    assert_same_state(after, after_ref)


@either_rule
@pytest.mark.parametrize("value_weight", [0, 0.5, 2])
def test_shrinking_merges_what_is_nearest_and_keeps_every_token(value_weight, merge):
    """As plain NumPy does with the tokens of the slots, an eighth at a time, in the order of the lowest."""
    lengths, num_slots = [107, 19], 9
    options = {"num_slots": 24, "chunk_size": 8, "growth": "plateau"}
    rows = [inputs(1, n, 4, 2, seed=n) for n in lengths]
    states = [attend(*row, merge=merge, **options)[1] for row in rows]
    smaller = OVQState.concatenate(states).resize(num_slots, value_weight=value_weight)
    assert smaller.count.shape == (2, 2, num_slots)
    assert smaller.num_slots == num_slots
    for row, ((_, k, v), state) in enumerate(zip(rows, states, strict=True)):
        for head in range(2):
            keys, values = k[0, :, head], v[0, :, head]
            if merge == "nearest":
                slots = recount_by_edges(keys.numpy(), values.numpy(), **options)
            else:
                slots = recount(keys.numpy(), values.numpy(), 24, 8)
            slots = [tuple(sorted(members)) for members in slots]
            assert state.count[0, head].tolist() == [len(members) for members in slots]
            kept, clusters = min(num_slots, len(slots)), slots
            while len(clusters) > kept:
                left = max(kept, len(clusters) - max(1, len(clusters) // 8))
                clusters = linked(clusters, keys.numpy(), values.numpy(), left, value_weight)
                clusters = [tuple(sorted(members)) for members in clusters]
            assert smaller.count[row, head].tolist() == [
                *(len(members) for members in clusters),
                *[0] * (num_slots - kept),
            ]
            for sums, tokens in ((smaller.key_sum, keys), (smaller.value_sum, values)):
                expected = torch.stack([tokens[sorted(members)].sum(0) for members in clusters])
                torch.testing.assert_close(sums[row, head, :kept], expected)
                assert not sums[row, head, kept:].any()


def test_the_gradient_of_a_shrunk_state():
    """Every slot gets that of the slot it was merged into."""
    state = prefilled(1, 40)
    state.value_sum.requires_grad_()
    smaller = state.resize(3)
    weights = torch.arange(smaller.value_sum.numel(), dtype=torch.float64).view_as(smaller.value_sum)
    (grad,) = torch.autograd.grad((smaller.value_sum * weights).sum(), state.value_sum)
    total = (grad * state.value_sum).sum(2)
    torch.testing.assert_close(total, (weights * smaller.value_sum).sum(2))
    assert {tuple(x) for x in grad[0, 0].tolist()} == {tuple(x) for x in weights[0, 0].tolist()}


def test_save_and_load(tmp_path):
    state = prefilled(3, 21)
    _, state = attend(*(t[:3] for t in token(0)), initial_state=state, **OPTIONS)
    state.save(tmp_path / "state.safetensors")
    loaded = OVQState.load(tmp_path / "state.safetensors")
    assert_same_state(loaded, state, tolerance=0)
    assert (loaded.num_slots, loaded.chunk_size) == (12, 8)
    rows = [0, 1, 2]
    expected, _ = attend(*token(1, rows), initial_state=state, **OPTIONS)
    o, _ = attend(*token(1, rows), initial_state=loaded, **OPTIONS)
    assert torch.equal(o, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_file_never_holds_tokens_of_another_continuation(tmp_path):
    root = prefilled(4, 10)
    attend(*token(0), initial_state=root, **OPTIONS)  # writes place 2 of the shared buffer
    root.save(tmp_path / "s")
    assert OVQState.load(tmp_path / "s").pending_keys[:, :, 2:].abs().max() == 0


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "state.safetensors"
    prefilled(2, 21).save(path)
    return path


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_truncated_file(saved, keep):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a saved OVQ state"):
        OVQState.load(saved)


def test_foreign_and_missing_files(tmp_path):
    (tmp_path / "text").write_text("not a state")
    with pytest.raises(ValueError, match="damaged or foreign"):
        OVQState.load(tmp_path / "text")
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="expected format 'ovq-state', found None"):
        OVQState.load(tmp_path / "weights")
    with pytest.raises(ValueError, match="no such file"):
        OVQState.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("names", "version"),
    [([], "1"), (["token_weights"], "2"), (["log_forget"], "3"), (["token_weights", "log_forget"], "3")],
)
def test_the_version_of_a_file_is_the_first_that_can_read_it(names, version, tmp_path):
    given = {"token_weights": torch.full((1, 21, 2), 0.5), "log_forget": torch.full((1, 21, 2), -0.1)}
    state = prefilled(1, 21, **{name: given[name].double() for name in names})
    state.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        assert file.metadata()["version"] == version
    assert_same_state(OVQState.load(tmp_path / "state"), state, tolerance=0)


HEADER = {"format": "ovq-state", "version": "1", "num_slots": "12", "chunk_size": "8"}


def every_dtype(tensors, dtype):
    """The floating tensors in another dtype."""
    return {name: t.to(dtype) for name, t in tensors.items() if t.is_floating_point()}


def set_counts(tensors, counts, heads=2, clear=("key_sum", "value_sum")):
    """Other counts for the first heads, and zeros in the spare slots where a state has them."""
    tensors["count"][:, :heads] = torch.tensor(counts)
    for name in clear:
        tensors[name][tensors["count"] == 0] = 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t["key_sum"].view(-1)[3].fill_(torch.nan), "finite values in key_sum, found NaN or Inf"),
        (lambda t: t["pending_values"].view(-1)[0].fill_(torch.inf), "finite values in pending_values"),
        (lambda t: t["count"].view(-1)[0].fill_(-1), "counts of at least 0, found -1"),
        (lambda t: t["count"].view(-1)[0].add_(1), "counts that add up to the tokens merged"),
        (lambda t: t.update(count=t["count"].float()), "count of shape .*int64, found .* in torch.float32"),
        (
            lambda t: t.update(key_sum=t["key_sum"].float()),
            "key_sum of shape .* in torch.float64, found .* in torch.float32",
        ),
        (lambda t: t.update(value_sum=t["value_sum"][:, :, :3].contiguous()), "value_sum of shape"),
        (
            lambda t: t.update(pending_keys=t["pending_keys"].to(torch.float8_e4m3fn)),
            "pending_keys in one of .*, found torch.float8_e4m3fn",
        ),
        (
            lambda t: t.update(pending_values=t["pending_values"].to(torch.float8_e5m2)),
            "pending_values of shape .* in torch.float64, found .* in torch.float8_e5m2",
        ),
        (lambda t: t.update(every_dtype(t, torch.float8_e4m3fn)), "found torch.float8_e4m3fn"),
        (lambda t: t.update(every_dtype(t, torch.complex64)), "found torch.complex64"),
        (
            lambda t: t.update(num_seen=t["num_seen"].to(torch.uint64)),
            "num_seen of shape .*, found .* in torch.uint64",
        ),
        (lambda t: set_counts(t, [10, 0, 6, 0, 0, 0]), "slots in use before spare ones"),
        (lambda t: set_counts(t, [0, 10, 6, 0, 0, 0]), "slots in use before spare ones"),
        (lambda t: set_counts(t, [10, 3, 3, 0, 0, 0], heads=1), r"each head of a row, found \[\[3, 6\], "),
        (
            lambda t: set_counts(t, [2**62, 2**62, 2**62, 2**62, 10, 6]),
            r"add up within int64, found \[\[4611686018427387904, ",
        ),
        (lambda t: set_counts(t, [2**63 - 1, 2**63 - 1, 18, 0, 0, 0]), "add up within int64"),
        (lambda t: t["num_seen"].fill_(2**63 - 1), r"num_seen from 0 to 2\^62, found \[9223372036854775807"),
        (lambda t: t["num_seen"].fill_(-8), r"num_seen from 0 to 2\^62, found \[-8"),
        (lambda t: set_counts(t, [8, 8, 0, 0, 0, 0], clear=()), "zeros in key_sum of spare slots"),
        (
            lambda t: set_counts(t, [8, 8, 0, 0, 0, 0], clear=("key_sum",)),
            "zeros in value_sum of spare slots",
        ),
        (lambda t: t.update({n: x[:, :0] for n, x in t.items() if x.dim() > 1}), "Hkv at least 1"),
        (
            lambda t: t.update(num_seen=t["num_seen"][:1]),
            r"num_seen of shape \[2\] in torch.int64, found \[1\]",
        ),
        (lambda t: t.pop("num_seen"), "expected tensors"),
        # What fades weighs something.
        (lambda t: t.update(pending_forget=torch.zeros(2, 2).double()), "expected tensors .*'weight'"),
        (lambda t: t.update(extra=torch.zeros(1)), "expected tensors"),
    ],
)
def test_load_refuses_what_cannot_be_a_state(saved, change, expected):
    tensors = load_file(saved)
    change(tensors)
    save_file(tensors, saved, metadata=HEADER)
    with pytest.raises(ValueError, match=expected):
        OVQState.load(saved)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"num_slots": "9" * 5000}, "num_slots to be an integer from 1"),
        ({"chunk_size": str(2**63)}, "chunk_size to be an integer from 1"),
        ({"version": "6"}, "expected version '1' or .* '4' or '5', found '6'"),
        ({"version": "5"}, "expected tensors .*'position_sum'"),
        ({"version": "2", "window": "8"}, "window was removed; expected 0, found 8"),
        ({"version": "2", "num_sinks": "1"}, "num_sinks was removed; expected 0, found 1"),
        ({"num_slots": "3"}, "at most 3 slots, found 6"),
        ({"num_slots": "many"}, r"num_slots to be an integer from 1 to 2\^62, found 'many'"),
        ({"chunk_size": "0"}, r"chunk_size to be an integer from 1 to 2\^62, found '0'"),
        ({"chunk_size": "9"}, r"pending_keys of shape \[2, 2, 9, \d+\]"),
    ],
)
def test_load_refuses_headers_that_do_not_fit(saved, header, expected):
    save_file(load_file(saved), saved, metadata=HEADER | header)
    with pytest.raises(ValueError, match=expected):
        OVQState.load(saved)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prefilled(2, 40).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_file(saved):
    before = saved.read_bytes()
    with full_disk(1000), pytest.raises(OSError, match=r"state\.safetensors: cannot be written \(.*File too"):
        prefilled(2, 40).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    "options", [{"init": "random"}, {"growth": "immediate"}, {"merge": "updated"}, {"merge": "nearest"}]
)
@pytest.mark.parametrize("length", [0, 3, 8, 40])
def test_what_the_op_leaves_behind_is_never_refused(tmp_path, options, length):
    """However slots were opened, merged and dropped, in rows of unequal lengths."""
    states = [prefilled(2, n, seed=n, **options) for n in (length, 21)]
    joined = OVQState.concatenate(states)
    for state in (*states, joined, joined.resize(2), joined.select([])):
        state.save(tmp_path / "state")
        assert_same_state(OVQState.load(tmp_path / "state"), state, tolerance=0)


def test_nbytes_counts_every_tensor():
    state = prefilled(2, 21)
    slots, pending = 2 * 2 * 6, 2 * 2 * 8
    assert state.nbytes == 8 * (slots * (6 + 5) + slots + pending * (6 + 5) + 2)


def test_state_bytes_stop_growing_with_length():
    sizes = [prefilled(1, n).nbytes for n in (400, 800, 1600, 3200)]
    assert sizes[-1] <= 1.1 * sizes[0]


def test_a_fresh_state_waits_for_no_device():
    sizes = {"batch_size": 2, "num_kv_heads": 1, "key_dim": 4, "value_dim": 4, **OPTIONS}
    # There is nothing to read on this device, so that reading fails.
    assert OVQState.empty(**sizes, device="meta").num_open.tolist() == [0, 0]


@either_rule
def test_a_summary_counts_what_is_there(merge):
    states = [prefilled(1, n, seed=n, merge=merge) for n in (3, 40, 61)]
    state = OVQState.concatenate(states)
    summary = state.summary()
    assert summary.num_seen == (3, 40, 61)
    assert summary.num_pending == (3, 0, 5)
    assert summary.num_open == tuple(int(s.num_open) for s in states)
    assert summary.num_open[0] == 0 < summary.num_open[1] <= summary.num_open[2]
    counts = [[[c for c in head if c] for head in row] for row in state.count.tolist()]
    every = [c for row in counts for head in row for c in head]
    assert summary.largest_count == max(every)
    assert summary.single_share == every.count(1) / len(every)
    assert summary.nbytes == state.nbytes
    for row, found in zip(counts, summary.effective_slots, strict=True):
        shares = [[c / sum(head) for c in head] for head in row]
        entropies = [-sum(p * math.log(p) for p in head) for head in shares]
        expected = sum(math.exp(h) for h, head in zip(entropies, row, strict=True) if head) / len(row)
        assert found == pytest.approx(expected)
    assert str(summary).startswith("3 rows; 3 to 61 tokens seen, 0 to 5 pending; 0 to ")
    none = state.select([]).summary()
    assert (none.num_seen, none.largest_count, none.single_share) == ((), 0, 0)
    assert "no tokens seen" in str(none)


def test_what_is_printed_is_one_line():
    state = OVQState.concatenate(prefilled(1, n, seed=n) for n in (3, 61))
    slots, nbytes = state.count.shape[2], f"{state.nbytes:,}"
    assert repr(state) == (
        f"OVQState(rows=2, heads=2, num_seen=3..61, slots={slots} of 12, chunk_size=8, "
        f"torch.float64 on cpu, {nbytes} bytes)"
    )
    assert "rows=0, heads=2, num_seen=none" in repr(state.select([]))

"""Forgetting: `log_forget` of the op, in every backend that runs it."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovq.ops import OVQState, backend_used, ovq_attention, slot_assignments
from ovq.ops.backends import BACKENDS as BY_NAME
from ovq.ops.fading import LEAST_LOG, LEAST_WEIGHT
from ovq.ops.serialization import upgraded
from ovq.ops.state import state_tensors
from tests.ops.common import (
    BACKENDS,
    CPU,
    assert_same_state,
    attend,
    inputs,
    read_in_pieces,
    with_gradients,
    with_rules,
)

CHUNK = 4
MERGES = ("existing", "nearest")
each_merge = pytest.mark.parametrize("merge", MERGES)


def arguments(batch, length, *, seed=0, rate=1.0, num_slots=8, weights=False, dtype=torch.float64, **options):
    """Tensors of a call by name, and its other arguments; heads forget `rate` per token on the mean."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = inputs(batch, length, 4, 2, 5, 3, seed=seed, dtype=dtype)
    draw = torch.rand(2, batch, length, 2, generator=generator, dtype=torch.float64)
    tensors = {"q": q, "k": k, "v": v, "log_forget": (-2 * rate * draw[0]).to(dtype)}
    if weights:
        tensors["token_weights"] = (draw[1] + 0.1).to(dtype)
    return tensors, {"num_slots": num_slots, "chunk_size": CHUNK, "scale": 3.0, **options}


def run(tensors, options, pieces=None):
    """Outputs and state of a call, or of one for each piece."""
    return read_in_pieces(tensors, pieces or [tensors["q"].shape[1]], **options)


def exact(q, k, v, log_forget, token_weights=None):
    """Attention to all tokens with forget gates, by its formula."""
    group = q.shape[2] // k.shape[2]
    k, v, total = (x.repeat_interleave(group, 2) for x in (k, v, log_forget.cumsum(1)))
    total = total.transpose(1, 2)
    scores = 3 * torch.einsum("bthd,bshd->bhts", q, k) + total[..., None] - total[:, :, None]
    if token_weights is not None:
        scores = scores + token_weights.repeat_interleave(group, 2).log().transpose(1, 2)[:, :, None]
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
@pytest.mark.parametrize("weights", [False, True])
def test_with_a_slot_for_each_token_it_is_attention_with_forget_gates(backend, weights):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    tensors, options = arguments(
        2, 22, rate=0.3, num_slots=32, weights=weights, merge="nearest", dtype=dtype, backend=backend
    )
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    o, _ = attend(**dict(zip(tensors, leaves, strict=True)), **options)
    assert backend_used() == backend
    expected = exact(*leaves)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if backend == "cpu" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(o, expected, **tolerance)
    draw = torch.randn(o.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found, reference = (torch.autograd.grad((x * draw).sum(), leaves) for x in (o, expected))
    for a, b in zip(found, reference, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@each_merge
@pytest.mark.parametrize("rate", [0.2, 3.0])
def test_torch_equals_naive_in_pieces(merge, rate):
    tensors, options = arguments(2, 26, merge=merge, rate=rate, weights=True)
    o, state, grads = with_gradients(tensors, options | {"backend": "naive"})
    found = with_gradients(tensors, options | {"backend": "torch"}, [3, 14, 1, 8])
    torch.testing.assert_close(found[0], o, rtol=1e-9, atol=1e-9)
    assert_same_state(found[1], state)
    torch.testing.assert_close(found[1].weight, state.weight, rtol=1e-9, atol=0)
    for a, b in zip(found[2], grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not CPU, reason="no compiler was found")
@pytest.mark.parametrize("merge", MERGES[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_equal_torch(merge, dtype):
    tensors, options = arguments(2, 64, num_slots=24, merge=merge, rate=0.5, dtype=torch.float32)
    tensors = {n: x if n == "log_forget" else x.to(dtype).float() for n, x in tensors.items()}
    expected = with_gradients(tensors, options | {"backend": "torch"})
    own = {n: x if n == "log_forget" else x.to(dtype) for n, x in tensors.items()}
    o, state, grads = with_gradients(own, options | {"backend": "cpu"}, [30, 34])
    assert torch.equal(state.count, expected[1].count)
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(o.float(), expected[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(grads, expected[2], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("backend", ["torch", *CPU])
def test_texts_shorter_than_a_chunk_have_gradients(backend):
    """Rows without slots, alone and beside others."""
    tensors, options = arguments(2, 7, rate=0.3, weights=True, dtype=torch.float32, chunk_size=6)
    mask = torch.ones(2, 7)
    mask[1, 2:] = 0
    for length in (3, 7):
        found = []
        for name in ("naive", backend):
            leaves = {n: x[:, :length].clone().requires_grad_() for n, x in tensors.items()}
            o, _ = attend(**leaves, **options, attention_mask=mask[:, :length], backend=name)
            found.append(torch.autograd.grad(o.sin().sum(), list(leaves.values())))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_gradients_of_a_call_stand_while_others_go_on_from_its_state(backend):
    """Decode steps write to the buffers that a state shares with the one that they began with."""
    tensors, options = arguments(1, 10, weights=True)
    with torch.no_grad():
        _, state = run(tensors, options | {"backend": "torch"}, [9, 1])
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    o, _ = attend(**leaves, **options, initial_state=state, backend=backend)
    expected = torch.autograd.grad(o.sum(), list(leaves.values()), retain_graph=True)
    with torch.no_grad():
        one = {name: x[:, :1] for name, x in tensors.items()}
        attend(**one, **options, initial_state=state, backend="torch")
    for a, b in zip(torch.autograd.grad(o.sum(), list(leaves.values())), expected, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=8, deadline=None)
@given(
    merge=st.sampled_from(["existing", "updated", "nearest"]),
    rate=st.sampled_from([0.0, 0.05, 1.0, 8.0]),
    pieces=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_it_does_not_matter_how_a_stream_is_split(merge, rate, pieces, seed):
    """Also one token at a time, which is decoded."""
    length = sum(pieces)
    tensors, options = arguments(2, length, merge=merge, rate=rate, seed=seed)
    with torch.no_grad():
        expected, final = run(tensors, options)
        for split in (pieces, [1] * length or [0]):
            o, state = run(tensors, options, split)
            torch.testing.assert_close(o, expected, rtol=1e-8, atol=1e-8)
            assert_same_state(state, final)


@with_rules(["backend"], [*BACKENDS, *CPU], rules=("existing", "updated", "nearest"))
def test_keys_that_repeat_go_to_the_same_slots_however_a_stream_is_split(backend, merge):
    """To the last bit, in float32: what differs by a rounding would tie no more."""
    for seed, (rate, growth) in enumerate([(0.01, "immediate"), (0.6, "plateau")]):
        tensors, options = arguments(
            1, 32, merge=merge, rate=rate, weights=bool(seed), num_slots=30, seed=seed, dtype=torch.float32
        )
        which = torch.randint(4, (32,), generator=torch.Generator().manual_seed(seed))
        tensors["k"] = tensors["k"][:, which]
        options |= {"backend": backend, "growth": growth}
        with torch.no_grad():
            o, expected = run(tensors, options)
            for pieces in ([1] * 32, [3, 14, 1, 1, 13]):
                found, state = run(tensors, options, pieces)
                torch.testing.assert_close(found, o, rtol=1e-5, atol=1e-5)
                assert_same_state(state, expected, tolerance=0)
                assert torch.equal(state.weight, expected.weight)
        _, state = in_pieces(tensors, options)
        assert_same_state(state, expected, tolerance=0)


@each_merge
def test_a_chunk_that_begins_without_weight_reads_what_is_all_but_forgotten(merge):
    """However it is split: nothing else is there to read."""
    tensors, options = arguments(1, 12, rate=20.0, weights=True, merge=merge)
    tensors["token_weights"][:, 4:11] = 0
    expected, _ = run(tensors, options)
    for pieces in ([9, 3], [10, 2], [8, 4], [1] * 12):
        o, _ = run(tensors, options, pieces)
        torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)


def test_rows_alone_padded_and_packed():
    tensors, options = arguments(1, 30, merge="nearest")
    bounds = [0, 13, 14, 30]
    packed, state = attend(**tensors, **options, cu_seqlens=torch.tensor(bounds))
    for r, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone, own = run({name: x[:, start:end] for name, x in tensors.items()}, options)
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-9, atol=1e-9)
        assert_same_state(state.select([r]), own)
        padded = {
            name: torch.nn.functional.pad(x[:, start:end], (0,) * (2 * x.dim() - 4) + (2, 3))
            for name, x in tensors.items()
        }
        # What stands at padding does not matter.
        padded["log_forget"][:, :2] = 1
        mask = torch.nn.functional.pad(torch.ones(1, end - start), (2, 3))
        o, other = attend(**padded, **options, attention_mask=mask)
        torch.testing.assert_close(o[:, 2:-3], alone, rtol=1e-9, atol=1e-9)
        assert_same_state(other, own)


@each_merge
def test_a_log_of_zero_forgets_nothing(merge):
    tensors, options = arguments(2, 27, merge=merge)
    plain = {name: x for name, x in tensors.items() if name != "log_forget"}
    expected, state = run(plain, options)
    o, found = run(plain | {"log_forget": torch.zeros_like(tensors["log_forget"])}, options)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)
    assert_same_state(found, state)
    # A state that has forgotten goes on without forgetting unless it is told to.
    _, early = run({name: x[:, :9] for name, x in tensors.items()}, options)
    rest = {name: x[:, 9:] for name, x in tensors.items()}
    zeros = rest | {"log_forget": torch.zeros_like(rest["log_forget"])}
    (a, _), (b, _) = (
        attend(**given, **options, initial_state=early)
        for given in (zeros, {name: x for name, x in rest.items() if name != "log_forget"})
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@each_merge
def test_what_is_forgotten_is_not_read(merge):
    """Two pasts, a token that forgets them, and the same future."""
    tensors, options = arguments(1, 40, merge=merge, rate=0.1)
    other, _ = arguments(1, 40, merge=merge, rate=0.1, seed=1)
    tensors["log_forget"][:, 20:24] = -1e9  # No lower than -48 / C each.
    for name in ("q", "k", "v"):
        other[name][:, 20:] = tensors[name][:, 20:]
    other["log_forget"] = tensors["log_forget"]
    (a, state), (b, _) = run(tensors, options), run(other, options)
    assert not torch.allclose(a[:, :20], b[:, :20], atol=0.1)
    # By the paper's rule later keys still go to slots that are not read any more. By "nearest" slots that are
    # all but forgotten, though not quite, take room until it is their turn.
    until = {"existing": 28, "nearest": 32}.get(merge, 40)
    torch.testing.assert_close(a[:, 24:until], b[:, 24:until], rtol=1e-6, atol=1e-6)
    if merge != "existing":
        assert bool((state.weight > LEAST_WEIGHT).all()), "slots of what is forgotten are free again"


def test_a_slot_fades_to_the_least_weight_or_to_none():
    x = torch.eye(CHUNK, dtype=torch.float64)[None, :, None]
    far = torch.full((1, CHUNK, 1), LEAST_LOG / CHUNK, dtype=torch.float64)
    options = {"num_slots": 2 * CHUNK, "chunk_size": CHUNK, "growth": "immediate"}
    for merge, expected in (("existing", LEAST_WEIGHT), ("nearest", 0.0)):
        _, state = attend(x, x, x, **options, merge=merge)
        _, state = attend(x, x, -x, **options, merge=merge, log_forget=far, initial_state=state)
        least = state.weight.min(-1).values
        torch.testing.assert_close(least, torch.full_like(least, expected))
        if expected:
            torch.testing.assert_close(state.keys.norm(dim=-1), torch.ones(1, 1, 2 * CHUNK).double())


def test_states_that_forget(tmp_path):
    tensors, options = arguments(3, 22, merge="nearest")
    _, state = run(tensors, options)
    state.save(tmp_path / "state")
    loaded = OVQState.load(tmp_path / "state")
    assert_same_state(loaded, state, tolerance=0)
    assert torch.equal(loaded.pending_forget, state.pending_forget)
    assert bool((state.pending_forget < 0).all())
    rows = torch.tensor([2, 0])
    assert torch.equal(state.select(rows).pending_forget, state.pending_forget[rows])
    plain, _ = arguments(1, 22)
    del plain["log_forget"]
    _, without = run(plain, options)
    both = OVQState.concatenate([state, without])
    assert torch.equal(both.pending_forget, torch.nn.functional.pad(state.pending_forget, (0, 0, 0, 1)))
    wrong = dataclasses.replace(state, pending_forget=state.pending_forget[:, :1])
    with pytest.raises(ValueError, match=r"pending_forget: expected \[3, 2\].*found \[3, 1\]"):
        run_from(wrong, tensors, options)


def test_files_with_sums_of_logs_in_float32_go_on_loading(tmp_path):
    """As they were written before these were in float64."""
    tensors, options = arguments(2, 22, dtype=torch.float32)
    _, state = run(tensors, options)
    old = dataclasses.replace(state, pending_forget=state.pending_forget.float())
    old.save(tmp_path / "state")
    loaded = OVQState.load(tmp_path / "state")
    assert loaded.pending_forget.dtype == torch.float64
    torch.testing.assert_close(loaded.pending_forget, state.pending_forget, rtol=1e-6, atol=0)
    run_from(loaded, tensors, options)
    # As the files of contexts are read.
    assert upgraded(state_tensors(old))["pending_forget"].dtype == torch.float64


def run_from(state, tensors, options):
    """The call continued from a state."""
    return attend(**tensors, **options, initial_state=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"log_forget": torch.zeros(1, 6, 4)},
            r"log_forget: expected a tensor \[1, 6, 2\].*found \(1, 6, 4\)",
        ),
        ({"log_forget": 0.5}, "log_forget: expected a tensor.*found float"),
        ({"log_forget": torch.zeros(1, 6, 2, dtype=torch.int64)}, "floating dtype, found torch.int64"),
        ({"log_forget": torch.full((1, 6, 2), 0.5)}, "log_forget: expected numbers of at most 0, found 0.5"),
        (
            {"log_forget": torch.full((1, 6, 2), math.nan)},
            "log_forget: expected numbers of at most 0, found nan",
        ),
        ({"ablation": {"rate": 0.5}}, "log_forget: expected none with a constant rate, found some"),
    ],
)
def test_bad_logs_are_refused(change, message):
    tensors, options = arguments(1, 6)
    with pytest.raises(ValueError, match=message):
        ovq_attention(**tensors | options | change)


@with_rules(["backend"], ["torch", *CPU], rules=MERGES)
def test_slots_are_assigned_as_the_op_does(merge, backend):
    """`slot_assignments` ends with the op's state, however it is split, padded and empty rows among them."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    tensors, options = arguments(3, 23, merge=merge, weights=True, rate=2.0, dtype=dtype)
    mask = torch.ones(3, 23)
    mask[1, :5] = mask[2] = 0
    _, expected = attend(**tensors, **options, attention_mask=mask)
    state, learning = None, {name: x for name, x in options.items() if name != "scale"} | {"backend": backend}
    for part in (slice(0, 6), slice(6, 7), slice(7, 23)):
        own = {name: x[:, part] for name, x in tensors.items() if name != "q"}
        state = slot_assignments(**own, **learning, initial_state=state, attention_mask=mask[:, part]).state
    assert_same_state(state, expected, tolerance=1e-9 if backend == "torch" else 1e-6)
    for name in ("weight", "pending_forget"):
        torch.testing.assert_close(getattr(state, name), getattr(expected, name), rtol=1e-6, atol=0)


def in_pieces(tensors, options, pieces=None):
    """What a call that is to have gradients gives: it goes to the backend chunk by chunk."""
    leaves = tensors | {"log_forget": tensors["log_forget"].clone().requires_grad_()}
    o, state = run(leaves, options, pieces)
    return o.detach(), state.detach()


@each_merge
@pytest.mark.parametrize("rate", [1e-4, 0.02, 0.3, 5.0])
@pytest.mark.parametrize("backend", CPU)
def test_all_chunks_in_one_call_give_what_they_give_one_by_one(merge, rate, backend, monkeypatch):
    """To the last bit."""
    tensors, options = arguments(
        2, 300, merge=merge, rate=rate, num_slots=40, weights=rate > 0.1, dtype=torch.float32, backend=backend
    )
    # Some heads forget nothing, and keys return.
    tensors["log_forget"][:, :, 1] *= 1e-3
    tensors["k"] = tensors["k"][:, torch.arange(300) % 130]
    options["chunk_size"] = 16
    mask = torch.ones(2, 300)
    mask[1, :27] = 0
    options["attention_mask"] = mask
    num_calls, run_backend = [], BY_NAME[backend].run
    monkeypatch.setattr(BY_NAME[backend], "run", lambda *args: num_calls.append(1) or run_backend(*args))
    expected, after = in_pieces(tensors, options)
    assert len(num_calls) == 19
    o, state = run(tensors, options)
    assert len(num_calls) == 20
    assert torch.equal(o, expected)
    assert_same_state(state, after, tolerance=0)
    assert torch.equal(state.weight, after.weight)


@pytest.mark.parametrize("backend", CPU)
def test_one_call_goes_on_from_pending_tokens_that_have_forgotten(backend):
    tensors, options = arguments(3, 60, rate=0.2, weights=True, dtype=torch.float32, backend=backend)
    pieces = [3, 10, 1, 22, 2, 22]
    expected, after = in_pieces(tensors, options, pieces)
    o, state = run(tensors, options, pieces)
    # A piece of one token is decoded, by another kernel.
    torch.testing.assert_close(o, expected, rtol=1e-6, atol=1e-6)
    assert_same_state(state, after, tolerance=0)
    whole, of_all = run(tensors, options)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_all.pending_forget, after.pending_forget)


@with_rules(["backend"], ["torch", *CPU], rules=MERGES)
def test_float32_is_enough_for_heads_that_forget_at_once(merge, backend):
    """Chunks that fade by e^-48, over and over: nothing overflows, and gradients are those of float64."""
    tensors, options = arguments(1, 160, rate=3.0, num_slots=24, merge=merge, chunk_size=16)
    expected = with_gradients(tensors, options | {"backend": "torch"})
    own = {name: x.float() for name, x in tensors.items()}
    o, _, grads = with_gradients(own, options | {"backend": backend})
    torch.testing.assert_close(o.double(), expected[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, expected[2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("backend", CPU)
def test_parameters_take_part_where_no_gradient_is_wanted(backend):
    q, k, v = inputs(1, 10, 1, 1, 4, 4, dtype=torch.float32)
    call = {"log_forget": torch.full(k.shape[:3], -0.1), "num_slots": 4, "chunk_size": 4, "backend": backend}
    scale = torch.full((1,), 2.0)
    expected, _ = ovq_attention(q, k, v, scale=scale, **call)
    with torch.no_grad():
        found, _ = ovq_attention(q, k, v, scale=scale.requires_grad_(), **call)
    assert torch.equal(found, expected)

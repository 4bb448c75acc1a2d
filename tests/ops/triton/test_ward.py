"""merge="ward" and "ward-sqrt" in the kernels: the pairs and gradients of the reference, decoded tokens."""

import pytest
import torch
from torch.nn.functional import normalize

from ovq.ops import backend_used
from ovq.ops.options import COUNT_POWERS
from tests.ops.common import assert_same_state, attend, inputs
from tests.ops.test_parity import gradients
from tests.ops.test_ward import STREAMS, gradients_from, stream
from tests.ops.triton.test_decode import decoded
from tests.ops.triton.test_kernels import assert_parity

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
# numpy, which the interpreter computes with, warns of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WARD = {"merge": "ward", "num_slots": 8, "chunk_size": 6}
SQRT = WARD | {"merge": "ward-sqrt"}


def check_state(tokens, **options):
    """The sums of the reference to the last bit."""
    (o, state), (o_ref, expected) = (attend(*tokens, **options, backend=b) for b in ("triton", "naive"))
    assert torch.equal(state.count, expected.count)
    for name in ("key_sum", "value_sum"):
        torch.testing.assert_close(
            getattr(state, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
        )
    return o, o_ref


FEW = ("random", "repeated", "not finite")
"""Streams for every run of the tests, as the interpreter is slow; the others are for `-m slow`."""


def of_streams(quick):
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in STREAMS]


@pytest.mark.parametrize("kind", of_streams(FEW))
def test_the_same_pairs_are_merged(kind):
    tokens = [x[:, :18, 1:] for x in stream(kind, torch.float32, length=33)]
    o, o_ref = check_state(tokens, **WARD)
    if kind not in ("long and short", "not finite"):
        torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", of_streams(["repeated"]))
def test_the_same_pairs_are_merged_by_the_square_root_of_counts(kind):
    tokens = [x[:, :18, 1:] for x in stream(kind, torch.float32, length=33)]
    o, o_ref = check_state(tokens, **SQRT)
    if kind not in ("long and short", "not finite"):
        torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)


def test_what_was_merged_may_come_nearer_than_its_parts():
    """Of five tokens two pairs are the cheapest, but one takes in a third token before the other's turn."""
    k = torch.zeros(5, 6)
    k[:3, :3] = torch.eye(3) / 2**0.5
    k[3:, 3] = 9
    k[4, 4] = 1.01
    squared = (k[:, None] - k).square().sum(-1)
    assert squared[3, 4] < 1.03 * squared[0, 1] < squared[2, 3]
    tokens = k[None, :, None], k[None, :, None], torch.ones(1, 5, 1, 1)
    options = {"merge": "ward-sqrt", "num_slots": 3, "chunk_size": 5, "value_weight": 0}
    check_state(tokens, **options)
    _, state = attend(*tokens, **options, backend="naive")
    assert state.count.flatten().tolist() == [3, 1, 1]


@pytest.mark.slow
def test_streams_whose_tables_are_not_held_at_once(monkeypatch):
    """Two heads, and bfloat16, with room for one table."""
    from ovq.ops.backends.triton import ward

    monkeypatch.setattr(ward, "TABLE_BYTES", 1)
    check_state(stream("clustered", torch.bfloat16, length=18), **SQRT)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_the_same_pairs_are_merged_in_lower_precision(dtype):
    check_state([x[:, :, 1:] for x in stream("repeated", dtype, length=18)], **WARD)


@pytest.mark.parametrize(
    ("growth", "value_weight"), [("plateau", 0.0), pytest.param("linear", 2.0, marks=pytest.mark.slow)]
)
def test_the_same_pairs_are_merged_with_other_options(growth, value_weight):
    tokens = [x[:, :, :1] for x in stream("one-hot", torch.float32, length=18)]
    check_state(tokens, **WARD, growth=growth, value_weight=value_weight)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 9])
def test_it_does_not_matter_which_kernel_makes_the_rounds(rounds, monkeypatch):
    from ovq.ops.backends.triton import ward

    monkeypatch.setattr(ward, "ROUNDS", rounds)
    check_state(stream("clustered", torch.float32, length=18), **WARD)


@pytest.mark.parametrize("merge", ["ward", pytest.param("ward-sqrt", marks=pytest.mark.slow)])
def test_near_ties_are_decided_as_in_float64(merge):
    """Pairs of equal distance, up to a few roundings: float32 would merge others first."""
    generator = torch.Generator().manual_seed(0)
    apart = normalize(torch.randn(12, 16, generator=generator), dim=-1)
    step = 0.1 * normalize(torch.randn(12, 16, generator=generator), dim=-1)
    k = torch.stack([apart, apart + step], 1).view(1, 24, 1, 16)
    v = torch.ones(1, 24, 1, 1)
    check_state((k, k, v), merge=merge, num_slots=18, chunk_size=24, value_weight=0)
    # The control: by distances in float32, other pairs are among the cheapest six.
    keys = k[0, :, 0]
    squared = 2 - 2 * (normalize(keys, dim=-1) @ normalize(keys, dim=-1).T)
    rough = squared.diagonal(1)[::2].argsort()[:6].sort().values
    exact = (keys[::2].double() - keys[1::2].double()).square().sum(-1).argsort()[:6].sort().values
    assert not torch.equal(rough, exact)


@pytest.mark.slow
@pytest.mark.parametrize("merge", COUNT_POWERS)
def test_several_tiles_of_slots_tokens_and_merges(merge):
    q, k, v = inputs(1, 146, 1, 1, 20, 18, dtype=torch.float32)
    o, o_ref = check_state((q, k, v), merge=merge, num_slots=70, chunk_size=73)
    torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", ["ward", pytest.param("ward-sqrt", marks=pytest.mark.slow)])
def test_gradients_through_slots_that_were_merged(merge):
    """From a full dictionary on: slots are merged, and taken by new tokens of the same chunk."""
    q, k, v = stream("random", torch.float32, length=26)
    k, v = k[:, :, :1], v[:, :, :1]
    # A stream and a weight with which slots are merged: the test says so below.
    options = {"merge": merge, "num_slots": 10, "chunk_size": 4, "value_weight": 1.0}
    _, state = attend(q[:, :18], k[:, :18], v[:, :18], **options, backend="naive")
    tokens = [x[:, 18:] for x in (q, k, v)]
    after, grads = gradients_from(state, tokens, "triton", options)
    assert backend_used() == "triton"
    after_ref, grads_ref = gradients_from(state, tokens, "naive", options)
    assert_same_state(after, after_ref, tolerance=0)
    # Some slots were free in between: what is in them now is new.
    assert (after.count < state.count).any()
    for name, grad, expected in zip("qkvs" + "kvkv", grads, grads_ref, strict=True):
        assert expected.abs().max() > 1e-3, name
        assert (grad - expected).norm() <= 2e-5 * expected.norm(), name


def test_gradients_of_packed_rows_and_of_short_segments(monkeypatch):
    """Rows of unequal lengths, one of them empty; two heads of queries for one of keys."""
    from ovq.ops.backends.triton import work

    lengths = [0, 13, 7, 3]
    q, k, v = inputs(1, sum(lengths), 2, 1, dtype=torch.float32)
    options = {
        "merge": "ward",
        "num_slots": 5,
        "chunk_size": 4,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }
    monkeypatch.setattr(work, "SEGMENT_BYTES", 1)
    runs = [gradients(backend, q, k, v, torch.ones(2), options) for backend in ("triton", "naive")]
    assert_parity(*runs)


@pytest.mark.slow
def test_padding_and_rows_that_go_on_from_a_state():
    q, k, v = inputs(2, 20, 1, 1, dtype=torch.float32)
    mask = (torch.arange(9) >= torch.tensor([[0], [3]])).long()
    options = {**WARD, "num_slots": 5, "chunk_size": 4}
    results = []
    for backend in ("triton", "naive"):
        first = [x[:, :9] for x in (q, k, v)]
        o, state = attend(*first, attention_mask=mask, backend=backend, **options)
        more, state = attend(q[:, 9:], k[:, 9:], v[:, 9:], initial_state=state, backend=backend, **options)
        results.append((torch.cat([o, more], 1), state))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert_same_state(results[0][1], results[1][1], tolerance=0)


@pytest.mark.parametrize("merge", ["ward", pytest.param("ward-sqrt", marks=pytest.mark.slow)])
def test_token_after_token(merge):
    """Two rows whose chunks end at different tokens, on from a full dictionary."""
    q, k, v = inputs(2, 20, 2, 1, 6, 5, dtype=torch.float32)
    mask = (torch.arange(14) >= torch.tensor([[0], [1]])).long()
    options = {"merge": merge, "num_slots": 6, "chunk_size": 4}
    _, state = attend(q[:, :14], k[:, :14], v[:, :14], attention_mask=mask, backend="naive", **options)
    kept = state.clone()
    rest = [x[:, 14:18] for x in (q, k, v)]
    o, after = decoded(*rest, state, "triton", **options)
    o_ref, expected = decoded(*rest, state, "naive", **options)
    torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)
    assert_same_state(after, expected, tolerance=0)
    assert_same_state(state, kept, tolerance=0)


def test_merged_slots_are_kept_only_for_a_backward():
    from ovq.ops.backends.triton import merging

    q, k, v = inputs(1, 6, 1, 1, 4, 4, dtype=torch.float32)
    made = []
    original = merging.Gone.empty.__func__

    def empty(cls, *args, **options):
        made.append(original(cls, *args, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging.Gone, "empty", classmethod(empty))
        for tokens in ((q, k, v), (q.clone().requires_grad_(), k, v)):
            attend(*tokens, merge="ward", num_slots=4, chunk_size=3, backend="triton")
    # One step, or both chunks.
    assert [len(gone.slot) for gone in made] == [1, 2]

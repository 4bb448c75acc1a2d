"""merge="nearest" in the kernels: the items and gradients of the reference, decoded tokens."""

import pytest
import torch

from ovq.ops import backend_used
from tests.ops.common import assert_same_state, attend, decoded, inputs
from tests.ops.streams import STREAMS, assert_same_sums, gradients_from, stream
from tests.ops.test_nearest import tight
from tests.ops.test_parity import gradients
from tests.ops.triton.test_kernels import assert_parity

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
# numpy, which the interpreter computes with, warns of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NEAREST = {"merge": "nearest", "num_slots": 8, "chunk_size": 6}
# Streams and slots for every run of the tests; 3 slots beside a chunk of 6 take clusters that look again.
QUICK = [("repeated", 8), ("not finite", 8), ("clustered", 3)]


def check_state(tokens, **options):
    """The sums of the reference to the last bit."""
    (o, state), (o_ref, expected) = (attend(*tokens, **options, backend=b) for b in ("triton", "naive"))
    assert_same_sums(state, expected)
    return o, o_ref


@pytest.mark.parametrize(
    ("kind", "num_slots"),
    [
        pytest.param(kind, num, marks=[] if (kind, num) in QUICK else pytest.mark.slow)
        for kind in STREAMS
        for num in (8, 3)
    ],
)
def test_the_same_items_are_joined(kind, num_slots):
    tokens = [x[:, :18, 1:] for x in stream(kind, torch.float32, length=33)]
    o, o_ref = check_state(tokens, **NEAREST | {"num_slots": num_slots})
    if kind not in ("long and short", "not finite"):
        torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_the_same_items_are_joined_in_lower_precision(dtype):
    check_state(stream("repeated", dtype, length=18), **NEAREST)


@pytest.mark.slow
@pytest.mark.parametrize(("growth", "value_weight"), [("plateau", 0.0), ("linear", 2.0)])
def test_the_same_items_are_joined_with_other_options(growth, value_weight):
    tokens = [x[:, :, :1] for x in stream("one-hot", torch.float32, length=24)]
    check_state(tokens, **NEAREST, growth=growth, value_weight=value_weight)


@pytest.mark.parametrize("spread", [1e-3, pytest.param(1e-4, marks=pytest.mark.slow)])
def test_what_a_float32_product_cannot_tell_apart_is_decided_in_float64(spread):
    tokens = [x[:, :, :1] for x in tight(48, spread)]
    check_state(tokens, merge="nearest", num_slots=16, chunk_size=16)


@pytest.mark.slow
def test_several_blocks_of_slots_and_tokens():
    q, k, v = inputs(1, 146, 1, 1, 20, 18, dtype=torch.float32)
    o, o_ref = check_state((q, k, v), merge="nearest", num_slots=70, chunk_size=73)
    torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)


def test_streams_whose_products_are_not_held_at_once(monkeypatch):
    from ovq.ops.backends.triton import merging

    sizes, nearest_roots = [], merging.nearest_roots

    def counted(items, is_mover, due):
        sizes.append(len(due))
        return nearest_roots(items, is_mover, due)

    monkeypatch.setattr(merging, "nearest_roots", counted)
    tokens = stream("clustered", torch.float32, length=18)
    check_state(tokens, **NEAREST)
    monkeypatch.setattr(merging, "PRODUCT_BYTES", 1)
    check_state(tokens, **NEAREST)
    # Two heads, of which merges are due in the second and the third chunk.
    assert sizes == [2, 2] + [1, 1] * 2


def test_rows_whose_slots_have_other_turns_and_rows_without_merges(monkeypatch):
    """Rows that have seen 16, 10 and no tokens go on together; in the last there is room for all at first."""
    from ovq.ops.backends.triton import merging

    # What was in memory before is no item of a row that has fewer slots than others.
    empty = merging.PairRecurrence._empty
    monkeypatch.setattr(
        merging.PairRecurrence, "_empty", lambda *args, **options: empty(*args, **options).fill_(1000)
    )
    q, k, v = inputs(3, 25, 1, 1, 6, 5, dtype=torch.float32)
    options = {"merge": "nearest", "num_slots": 7, "chunk_size": 3, "value_weight": 2.0}
    mask = (torch.arange(16) < torch.tensor([[16], [10], [0]])).long()
    first, rest = ([x[:, part] for x in (q, k, v)] for part in (slice(16), slice(16, 25)))
    _, state = attend(*first, attention_mask=mask, backend="naive", **options)
    results = [attend(*rest, initial_state=state, backend=b, **options) for b in ("triton", "naive")]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert_same_state(results[0][1], results[1][1], tolerance=0)


def test_gradients_through_slots_that_were_merged():
    """From a full dictionary on: slots are merged, and taken by new tokens of the same chunk."""
    q, k, v = stream("random", torch.float32, length=26)
    k, v = k[:, :, :1], v[:, :, :1]
    options = {"merge": "nearest", "num_slots": 10, "chunk_size": 4}
    _, state = attend(q[:, :18], k[:, :18], v[:, :18], **options, backend="naive")
    tokens = [x[:, 18:] for x in (q, k, v)]
    after, grads = gradients_from(state, tokens, "triton", options)
    assert backend_used() == "triton"
    after_ref, grads_ref = gradients_from(state, tokens, "naive", options)
    assert_same_state(after, after_ref, tolerance=0)
    assert (after.count < state.count).any()
    for name, grad, expected in zip("qkvs" + "kvkv", grads, grads_ref, strict=True):
        assert expected.abs().max() > 1e-3, name
        assert (grad - expected).norm() <= 2e-5 * expected.norm(), name


def test_gradients_of_packed_rows_and_of_short_segments(monkeypatch):
    """Rows of unequal lengths, one of them empty; two heads of queries for one of keys."""
    from ovq.ops.backends.triton import work

    lengths = [0, 13, 7, 3]
    q, k, v = inputs(1, sum(lengths), 2, 1, dtype=torch.float32)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    options = {"merge": "nearest", "num_slots": 5, "chunk_size": 4, "cu_seqlens": bounds}
    monkeypatch.setattr(work, "SEGMENT_BYTES", 1)
    assert_parity(*(gradients(name, q, k, v, torch.ones(2), options) for name in ("triton", "naive")))


def test_token_after_token():
    """Two rows whose chunks end at different tokens, on from a full dictionary."""
    q, k, v = inputs(2, 18, 2, 1, 6, 5, dtype=torch.float32)
    mask = (torch.arange(14) >= torch.tensor([[0], [1]])).long()
    options = {"merge": "nearest", "num_slots": 6, "chunk_size": 4}
    _, state = attend(q[:, :14], k[:, :14], v[:, :14], attention_mask=mask, backend="naive", **options)
    kept = state.clone()
    rest = {name: x[:, 14:] for name, x in (("q", q), ("k", k), ("v", v))}
    o, after = decoded(rest, state, "triton", **options)
    o_ref, expected = decoded(rest, state, "naive", **options)
    torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)
    assert_same_state(after, expected, tolerance=0)
    assert_same_state(state, kept, tolerance=0)


@pytest.mark.slow
def test_padding_and_rows_that_go_on_from_a_state():
    q, k, v = inputs(2, 20, 1, 1, dtype=torch.float32)
    mask = (torch.arange(9) >= torch.tensor([[0], [3]])).long()
    options = {**NEAREST, "num_slots": 5, "chunk_size": 4}
    results = []
    for backend in ("triton", "naive"):
        first = [x[:, :9] for x in (q, k, v)]
        o, state = attend(*first, attention_mask=mask, backend=backend, **options)
        more, state = attend(q[:, 9:], k[:, 9:], v[:, 9:], initial_state=state, backend=backend, **options)
        results.append((torch.cat([o, more], 1), state))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert_same_state(results[0][1], results[1][1], tolerance=0)


def test_merged_slots_are_kept_only_for_a_backward():
    from ovq.ops.backends.triton import merging

    q, k, v = inputs(1, 6, 1, 1, 4, 4, dtype=torch.float32)
    made = []
    original = merging.MergedSlots.empty.__func__

    def empty(cls, *args, **options):
        made.append(original(cls, *args, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging.MergedSlots, "empty", classmethod(empty))
        for tokens in ((q, k, v), (q.clone().requires_grad_(), k, v)):
            attend(*tokens, merge="nearest", num_slots=4, chunk_size=3, backend="triton")
    # One step, or both chunks.
    assert [len(merged.slot) for merged in made] == [1, 2]

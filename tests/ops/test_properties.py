"""Random shapes, options and hostile keys: the backends agree, and the identities hold."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from ovq.ops import OVQState, scheduled_slots
from ovq.ops.ablation import BIASES, Ablation
from tests.ops.common import assert_same_state, attend, inputs

pytestmark = pytest.mark.filterwarnings("error")

SETTINGS = hypothesis.settings(max_examples=40)


@st.composite
def calls(draw):
    """A call: inputs and options, with duplicate, zero or huge keys sprinkled in."""
    kv_heads = draw(st.integers(1, 2))
    chunk_size = draw(st.integers(1, 12))
    length = draw(st.sampled_from([0, 1, chunk_size - 1, chunk_size, chunk_size + 1]) | st.integers(0, 50))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    q, k, v = inputs(
        draw(st.integers(1, 3)),
        length,
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        dtype=dtype,
        seed=draw(st.integers(0, 10**6)),
    )
    for _ in range(draw(st.integers(0, 3)) if length else 0):
        t, source = (draw(st.integers(0, length - 1)) for _ in "ab")
        kind = draw(st.sampled_from(["duplicate", "zero", "huge"]))
        k[:, t] = {"duplicate": k[:, source], "zero": 0 * k[:, t], "huge": 1000 * k[:, t]}[kind]
    options = {
        "num_slots": draw(st.integers(1, 60)),
        "chunk_size": chunk_size,
        "growth": draw(st.sampled_from(["plateau", "linear", "immediate"])),
        "init": draw(st.sampled_from(["novelty", "random"])),
        "merge": draw(st.sampled_from(["existing", "updated"])),
        "ablation": Ablation(
            bias=draw(st.sampled_from(BIASES)),
            rate=draw(st.sampled_from(["count", "count", 0.01, 0.3, 1.0])),
        ),
        "generator": torch.Generator().manual_seed(draw(st.integers(0, 99))),
    }
    return q, k, v, options


def tolerance(dtype):
    return {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 0.15}[dtype]


def assert_close(actual, expected):
    """Close relative to the largest values: a key a thousand times longer makes scores just as large."""
    bound = tolerance(expected.dtype)
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


@SETTINGS
@hypothesis.given(calls())
def test_backends_agree(call):
    q, k, v, options = call
    o_ref, state_ref = attend(q, k, v, backend="naive", **options)
    # "auto" takes the compiled kernels where they run the call.
    for backend in ("torch", "auto"):
        o, state = attend(q, k, v, backend=backend, **options)
        assert_same_state(state, state_ref, tolerance=1e-9)
        assert torch.isfinite(o).all()
        assert_close(o, o_ref)


@hypothesis.settings(max_examples=20)
@hypothesis.given(calls(), st.sampled_from([0, 0.5, 2]), st.integers(0, 50))
def test_pairs_are_merged_alike_by_every_backend_and_in_parts(call, value_weight, cut):
    q, k, v, options = call
    ablation = Ablation(bias=options["ablation"].bias)
    options |= {"merge": "nearest", "init": "novelty", "ablation": ablation, "value_weight": value_weight}
    _, expected = attend(q, k, v, backend="naive", **options)
    for backend in ("torch", "auto"):
        state = None
        for part in (slice(0, cut), slice(cut, None)):
            tokens = (x[:, part] for x in (q, k, v))
            _, state = attend(*tokens, initial_state=state, backend=backend, **options)
        assert_same_state(state, expected, tolerance=1e-9)


@SETTINGS
@hypothesis.given(calls())
def test_bookkeeping(call):
    q, k, v, options = call
    _, state = attend(q, k, v, **options)
    batch, length = q.shape[:2]
    merged = length - length % options["chunk_size"]
    assert state.count.sum(-1).flatten().tolist() == [merged] * (batch * k.shape[2])
    if options["ablation"].rate == "count":
        total = k[:, :merged].double().sum(1)
        torch.testing.assert_close(
            state.key_sum.double().sum(2), total, rtol=1e-4, atol=1e-4 * max(1, length)
        )
    if merged:
        slots = scheduled_slots(merged, num_slots=options["num_slots"], growth=options["growth"])
        assert state.num_open.tolist() == [slots] * batch
        assert state.count.shape[2] == slots


@SETTINGS
@hypothesis.given(calls(), st.data())
def test_any_split(call, data):
    q, k, v, options = call
    length = q.shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    whole, final = attend(q, k, v, **options)
    outputs, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        part = slice(start, stop)
        o, state = attend(q[:, part], k[:, part], v[:, part], initial_state=state, **options)
        outputs.append(o)
    assert_same_state(state, final, tolerance=0)
    assert_close(torch.cat(outputs, 1), whole)


@SETTINGS
@hypothesis.given(calls(), st.data())
def test_any_padding(call, data):
    q, k, v, options = call
    batch, length = q.shape[:2]
    lengths = [data.draw(st.integers(0, length)) for _ in range(batch)]
    lefts = [data.draw(st.booleans()) for _ in range(batch)]
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row, (n, is_left) in enumerate(zip(lengths, lefts, strict=True)):
        mask[row, length - n :] = is_left
        mask[row, :n] |= not is_left
    o, state = attend(q, k, v, attention_mask=mask, **options)
    assert o[~mask].abs().sum() == 0
    for row in range(batch):
        real = mask[row]
        alone, state_alone = attend(*(t[row : row + 1, real] for t in (q, k, v)), **options)
        assert_close(o[row, real], alone[0])
        assert_same_state(state.select([row]), state_alone, tolerance=0)


@SETTINGS
@hypothesis.given(calls(), st.integers(1, 20))
def test_resizing_keeps_every_token(call, num_slots):
    q, k, v, options = call
    _, state = attend(q, k, v, **options)
    resized = state.resize(num_slots)
    assert resized.count.shape[2] <= max(num_slots, 1)
    assert torch.equal(resized.count.sum(-1), state.count.sum(-1))
    assert (resized.count > 0).sum() >= min(num_slots, int(state.num_open[0])) if state.count.sum() else True
    torch.testing.assert_close(resized.value_sum.sum(2), state.value_sum.sum(2), rtol=1e-4, atol=1e-3)
    # And it can go on from there.
    o, after = attend(q, k, v, initial_state=resized, **{**options, "num_slots": num_slots})
    assert torch.isfinite(o).all()
    assert after.num_seen.tolist() == [2 * q.shape[1]] * q.shape[0]


@hypothesis.settings(max_examples=10)
@hypothesis.given(calls())
def test_save_and_load(tmp_path_factory, call):
    q, k, v, options = call
    _, state = attend(q, k, v, **options)
    path = tmp_path_factory.mktemp("state") / "s"
    state.save(path)
    assert_same_state(OVQState.load(path), state, tolerance=0)

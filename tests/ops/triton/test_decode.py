"""Decoding by the kernels: token after token what one call gives, states shared as they should be."""

import pytest
import torch

from tests.ops.common import assert_same_state, attend, decoded, inputs

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")


@pytest.mark.parametrize(("heads", "dtype"), [((3, 1), torch.bfloat16), ((2, 2), torch.float32)], ids=str)
def test_token_after_token_equals_one_call(heads, dtype):
    q, k, v = inputs(1, 8, *heads, 7, 5, dtype=dtype)
    options = {"num_slots": 8, "chunk_size": 3, "scale": torch.linspace(1, 4, 2 * heads[0])[::2]}
    o_ref, state_ref = attend(q, k, v, backend="naive", **options)
    o, state = decoded({"q": q, "k": k, "v": v}, None, "triton", **options)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(o, o_ref, rtol=tolerance, atol=tolerance)
    assert_same_state(state, state_ref, tolerance=0)


def test_rows_whose_chunks_end_at_different_tokens():
    """Many slots, split over programs; rows of unequal lengths go on together over the ends of chunks."""
    q, k, v = inputs(3, 25, 2, 1, 6, 5, dtype=torch.float32)
    options = {"num_slots": 300, "chunk_size": 10, "growth": "immediate"}
    lengths = torch.tensor([21, 18, 20])
    mask = (torch.arange(21) < lengths[:, None]).long()
    _, state = attend(q[:, :21], k[:, :21], v[:, :21], attention_mask=mask, backend="naive", **options)
    rest = {name: x[:, 21:24] for name, x in (("q", q), ("k", k), ("v", v))}
    o, after = decoded(rest, state, "triton", **options)
    o_ref, after_ref = decoded(rest, state, "naive", **options)
    torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)
    assert_same_state(after, after_ref, tolerance=0)


def test_two_continuations_of_one_state_do_not_meet():
    q, k, v = inputs(1, 9, 1, 1, 4, 4, dtype=torch.float32)
    options = {"num_slots": 4, "chunk_size": 4}
    _, state = attend(q[:, :6], k[:, :6], v[:, :6], backend="naive", **options)
    kept = state.clone()
    tokens = [[x[:, t : t + 1] for x in (q, k, v)] for t in (6, 7)]
    first, branch = attend(*tokens[0], initial_state=state, backend="triton", **options)
    attend(*tokens[1], initial_state=state, backend="triton", **options)
    again, _ = attend(*tokens[0], initial_state=kept, backend="naive", **options)
    torch.testing.assert_close(first, again)
    assert torch.equal(branch.pending_keys[0, 0, 2], k[0, 6, 0])
    assert_same_state(state, kept, tolerance=0)

"""The kernels merge without reading, and say where tokens go."""

import pytest
import torch

from ovq.ops import slot_assignments
from tests.ops.common import assert_same_state
from tests.ops.test_assignments import clustered

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(("merge", "has_weights"), [("existing", False), ("nearest", True)])
def test_they_say_where_tokens_go(merge, has_weights):
    """Rows of two lengths, the shorter one first, that begin with pending tokens and end with some."""
    k, v = clustered(2, 40)
    mask = torch.ones(2, 33, dtype=torch.int64)
    mask[0, 21:] = 0
    options = {"num_slots": 12, "chunk_size": 8, "merge": merge}
    weights = 0.5 + torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(1))
    first, rest = (
        {"k": k[:, x], "v": v[:, x], "token_weights": weights[:, x] if has_weights else None}
        for x in (slice(7), slice(7, None))
    )
    found = {}
    for backend in ("torch", "triton"):
        before = slot_assignments(**first, **options, backend=backend).state
        found[backend] = slot_assignments(
            **rest, **options, initial_state=before, attention_mask=mask, backend=backend
        )
    expected, actual = found.values()
    for name in ("slots", "chunk_slots", "earlier_slots", "earlier_pending"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert torch.equal(actual.after(20), expected.after(20))
    assert_same_state(actual.state, expected.state, tolerance=0)
    has_moved = not torch.equal(actual.slots, actual.chunk_slots)
    assert has_moved == (merge == "nearest")


def test_what_tokens_forget_is_refused_by_name():
    k, v = clustered(1, 8)
    with pytest.raises(ValueError, match=r"^backend: 'triton': expected no log_forget, found some"):
        slot_assignments(k, v, num_slots=4, chunk_size=4, log_forget=-v[..., 0].abs(), backend="triton")

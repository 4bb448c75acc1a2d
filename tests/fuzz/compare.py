"""What counts as equal: states by their counts exactly, numbers within a bound that grows with the inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ovq.ops import OVQState

#: Error allowed in an exact result of size 1 from scores of size 1.
TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 0.02, "float16": 0.0025}


def bound_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    *,
    has_norms: bool,
    added: float = 0.0,
    shortest: float = 0.0,
) -> float:
    """Error allowed in outputs: a score is wrong by its size times the precision, a weight by as much.

    What is `added` to scores is rounded with them. Of gradients, queries and keys count as at least
    `shortest`: that of a key of length 0 is as wrong as its queries are long. Without a bound where scores
    may be larger than the largest number of the dtype, 65504 in float16.
    """
    longest_q, longest_k, longest_v = (
        float(x.detach().double().nan_to_num(0, 0, 0).norm(dim=-1).max()) if x.numel() else 0.0
        for x in (q, k, v)
    )
    longest_q, longest_k = max(longest_q, shortest), max(longest_k, shortest)
    score = longest_q * longest_k + (longest_k**2 / 2 if has_norms else 0)
    score = score * float(scale.detach().abs().max()) + added
    if score > torch.finfo(q.dtype).max:
        return math.inf
    return TOLERANCES[str(q.dtype).removeprefix("torch.")] * (1 + score) * (1 + longest_v)


def assert_close(
    actual: Tensor, expected: Tensor, bound: float, what: str, *, spoilt: Tensor | None = None
) -> None:
    """Not finite in the same places, and as close as `bound` in all others; nothing if that is infinite.

    Args:
        actual: `[n, H, D]` numbers.
        expected: what they should be.
        bound: error allowed.
        what: they are, for error messages.
        spoilt: `[n, H]` where they may be NaN though the reference is not.
    """
    assert actual.shape == expected.shape, f"{what}: expected {expected.shape}, found {actual.shape}"
    assert actual.dtype == expected.dtype, f"{what}: expected {expected.dtype}, found {actual.dtype}"
    if math.isinf(bound):
        return
    is_finite = expected.isfinite()
    is_wrong = actual.isfinite() != is_finite
    if spoilt is not None:
        is_wrong &= actual.isfinite() | ~spoilt[..., None]
        is_finite &= actual.isfinite()
    places = is_wrong.nonzero().tolist()
    assert not places, f"{what}: expected NaN and Inf where the reference has them, found others at {places}"
    errors = (actual - expected).detach().double().abs()[is_finite]
    worst = float(errors.max()) if errors.numel() else 0.0
    assert worst <= bound, f"{what}: expected an error of {bound:.1e}, found {worst:.1e}"


def assert_state(actual: OVQState, expected: OVQState, what: str, *, size: float = 1.0) -> None:
    """States of one row: counts and tokens seen are equal, sums to the last bits, pending tokens to the last.

    Args:
        actual: the state; it may have spare slots.
        expected: what it should be.
        what: it is, for error messages.
        size: of the longest tokens, where sums are such that those cancel.
    """
    counts = [[[c for c in head if c] for head in state.count[0].tolist()] for state in (actual, expected)]
    assert counts[0] == counts[1], f"{what}: expected counts {counts[1]}, found {counts[0]}"
    seen = [state.num_seen.tolist() for state in (actual, expected)]
    assert seen[0] == seen[1], f"{what}: expected {seen[1]} tokens seen, found {seen[0]}"
    used = {"sum": len(counts[1][0]), "pending": int(expected.num_pending)}
    assert (actual.weight is None) == (expected.weight is None), (
        f"{what}: expected weights in both or neither"
    )
    assert actual.state_dtype == expected.state_dtype, f"{what}: expected sums in {expected.state_dtype}"
    weights = () if expected.weight is None else ("weight", "pending_weights")
    forgotten = [state.pending_forget for state in (actual, expected)]
    is_same = forgotten[0] is forgotten[1] is None or torch.equal(*forgotten)
    assert is_same, f"{what}: expected pending_forget {forgotten[1]}, found {forgotten[0]}"
    for name in ("key_sum", "value_sum", "pending_keys", "pending_values", *weights):
        places = used["pending" if "pending" in name else "sum"]
        a, b = (getattr(state.to_state_dtype("float32"), name)[:, :, :places] for state in (actual, expected))
        # One way to add up Inf gives NaN, another Inf.
        a, b = (x.masked_fill(~x.isfinite(), torch.nan) for x in (a, b))
        tolerance = 0 if "pending" in name else 1e-9
        is_same = torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)
        assert is_same, f"{what}: expected the {name} of the reference, found another"

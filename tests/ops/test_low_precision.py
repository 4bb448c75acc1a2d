"""16 bits: how far outputs and gradients are from those of float64, with weights and logs of any size."""

import pytest
import torch

from tests.ops.common import CPU, attend, inputs

#: Weights of tokens from uniform numbers, and logs that they forget: above the clamp, -48 / C, where PyTorch
#: changed the gradient in 2.15.
GIVEN = {
    "forgets little": (None, -0.02),
    "forgets": (None, -0.25),
    "forgets all": (None, -0.35),
    "weights": (lambda x: 1e3 * (x + 1e-3), None),
    "weights of any size": (lambda x: 10 ** (12 * x - 6), None),
    "both": (lambda x: 1e3 * (x + 1e-3), -0.35),
}


def results(given, options, dtype, mean):
    """Outputs and gradients of queries, keys, values (of this mean) and logs of weights, from numbers that 16
    bits can hold."""
    weigh, log = given
    q, k, v = inputs(1, 288, 4, 2, 64, 64, dtype=torch.float64)
    leaves = [x.to(options["dtype"]).to(dtype).requires_grad_() for x in (q, k, v + mean)]
    more = {}
    if weigh is not None:
        draw = torch.rand(1, 288, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        leaves.append(weigh(draw).log().requires_grad_())
        more["token_weights"] = leaves[-1].exp()
    if log is not None:
        leaves.append(torch.full((1, 288, 2), log, dtype=torch.float64, requires_grad=True))
        more["log_forget"] = leaves[-1]
    own = {name: x for name, x in options.items() if name != "dtype"}
    o, state = attend(*leaves[:3], **more, **own)
    draw = torch.randn(o.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return [o.detach(), *torch.autograd.grad((o * draw.to(dtype)).sum(), leaves)], state.count


def errors(given, options, mean=0.0):
    """Of outputs and of each gradient, relative to its size."""
    own, count = results(given, options, options["dtype"], mean)
    exact, expected = results(given, options | {"backend": "torch"}, torch.float64, mean)
    assert torch.equal(count, expected)
    return torch.tensor([float((a.double() - b).norm() / b.norm()) for a, b in zip(own, exact, strict=True)])


@pytest.mark.parametrize("backend", ["torch", *CPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logs_of_weights_cost_no_precision(dtype, backend):
    """However large they are: errors are those of a call without any, and those of gates no larger."""
    options = {"num_slots": 96, "chunk_size": 128, "scale": 8.0, "backend": backend, "dtype": dtype}
    # The mean adds to outputs, and so to their rounding, but not to gradients of scores.
    without = errors((None, None), options, mean=2.0)
    for name, given in GIVEN.items():
        found = errors(given, options, mean=2.0)
        assert bool((found[:4] <= 1.2 * without).all()), f"{name}: errors {found}, without {without}"
        assert bool((found[4:] <= 1.2 * without.max()).all()), f"{name}: errors {found}, without {without}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_means_of_values_cost_no_precision(dtype):
    """Gradients of queries and keys do not see them; outputs do, and are rounded."""
    options = {"num_slots": 96, "chunk_size": 128, "scale": 8.0, "backend": "torch", "dtype": dtype}
    found, without = (errors((None, None), options, mean=mean)[1:3] for mean in (8.0, 0.0))
    assert bool((found <= 1.5 * without).all()), f"errors {found}, without {without}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_of_keys_cost_no_precision_and_do_not_overflow(dtype):
    """Halves of squares are beyond 65504 here, scores are not."""
    options = {"num_slots": 96, "chunk_size": 128, "scale": 8.0, "backend": "torch", "dtype": dtype}
    ablated = options | {"ablation": {"bias": "count+norm"}}
    assert bool((errors((None, None), ablated) <= errors((None, None), options)).all())
    q, k, v = inputs(1, 40, 1, 1, 8, 8, dtype=torch.float32)
    q, k, v = q.to(dtype), (200 * k).to(dtype), v.to(dtype)
    sizes = {"num_slots": 12, "chunk_size": 8, "scale": 8.0, "ablation": {"bias": "count+norm"}}
    found, expected = (attend(q, k, v, **sizes, backend=name)[0] for name in ("torch", "naive"))
    assert bool(found.isfinite().all())
    # Products of 1600 are rounded to whole numbers or less exactly: most queries have one key, the same.
    assert float((found - expected).abs().median()) < 0.01


def test_a_score_that_overflows_reaches_no_earlier_output():
    """In float16, with weights: its own token on may be NaN."""
    q, k, v = inputs(1, 20, 1, 1, 8, 8, dtype=torch.float16)
    k[:, 11] *= 6e4
    weights = torch.ones(1, 20, 1)
    found, expected = (
        attend(q * 8, k, v, num_slots=4, chunk_size=8, token_weights=weights, backend=name)[0]
        for name in ("torch", "naive")
    )
    torch.testing.assert_close(found[:, :11], expected[:, :11], rtol=1e-2, atol=1e-2)

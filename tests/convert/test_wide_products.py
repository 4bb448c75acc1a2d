"""Weights in 16 bits, multiplied in float32 where that is faster: the same numbers, rounded once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ovq.convert import wide_products
from ovq.convert.captures import capture
from tests.convert.common import original, tokens


@pytest.fixture(params=[True, False], ids=["faster", "slower"])
def is_faster(request, monkeypatch):
    """Whether float32 products are said to be faster."""
    monkeypatch.setattr(wide_products, "_is_faster_wide", lambda dtype: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_and_gradients_of_inputs_are_those_of_float32(is_faster, dtype, has_bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 20, has_bias, dtype=dtype), torch.randn(2, 9, 48, dtype=dtype)
    x.requires_grad_(True)
    with wide_products.wide_products(linear):
        y = linear(x)
    slope = torch.randn_like(y)
    y.backward(slope)
    assert y.dtype == x.grad.dtype == dtype
    wide = F.linear(x.float(), linear.weight.float()).to(dtype)
    wide = wide if linear.bias is None else wide + linear.bias
    of_x = (slope.float() @ linear.weight.float()).to(dtype)
    # PyTorch's products round differently, or add the bias first.
    limits = {} if is_faster else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, wide, **limits or {"rtol": 0, "atol": 0})
    torch.testing.assert_close(x.grad, of_x, **limits or {"rtol": 0, "atol": 0})
    assert (linear.weight.grad is None) == is_faster
    assert not torch.overrides._get_current_function_mode_stack()


def test_float32_weights_are_left_alone(monkeypatch):
    monkeypatch.setattr(wide_products, "_is_faster_wide", lambda dtype: 1 / 0)
    linear = nn.Linear(4, 4)
    with wide_products.wide_products(linear):
        linear(torch.ones(1, 4)).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 2.0), True), ((2.0, 1.0), False)])
def test_what_is_faster_is_measured(monkeypatch, seconds, expected):
    times = iter(seconds)
    monkeypatch.setattr(wide_products, "_seconds", lambda function: next(times))
    assert wide_products._is_faster_wide.__wrapped__(torch.bfloat16) is expected


def test_captures_differ_by_rounding_alone(monkeypatch):
    model, text, found, dtypes = original().to(torch.bfloat16), tokens(90), [], []
    product = wide_products.product
    monkeypatch.setattr(wide_products, "product", lambda a, b: dtypes.append(a.dtype) or product(a, b))
    num_linear = sum(isinstance(module, nn.Linear) for module in model.model.modules())
    for is_wide in (True, False):
        monkeypatch.setattr(wide_products, "_is_faster_wide", lambda dtype, is_wide=is_wide: is_wide)
        found.append(capture(model, text, torch.arange(90) > 60, 0))
        # Tokens before the first counted one; the others, and their gradients, in the output layer too.
        assert dtypes == [torch.float32] * (3 * num_linear + 2) * is_wide
        dtypes.clear()
    for a, b in zip(*found, strict=True):
        for name in ("q", "k", "v", "o", "g"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            assert (x.float() - y.float()).norm() <= 0.05 * y.float().norm()

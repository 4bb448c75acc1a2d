"""The compiled parts of layers against PyTorch's operations in float64: outputs and every gradient."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from ovq.layers.common import QKNorm, RMSNorm, ShortConvolution, rotary_tables, swiglu
from ovq.layers.products import Linear
from ovq.layers.softmax import SlidingWindowAttention, windowed_read
from ovq.ops import ovq_attention
from ovq.ops.backends.cpu import linear
from ovq.ops.backends.cpu.kernels import cpu_kernels
from ovq.ops.backends.cpu.linear import FEW_TOKENS, FasterLinear, few_products, product
from ovq.ops.backends.cpu.roof import product_loop
from ovq.ops.backends.cpu.window import CompiledWindow

pytestmark = pytest.mark.skipif(
    not cpu_kernels().startswith("compiled"), reason="expected compiled kernels, found none"
)


def assert_same(function, reference, *inputs, tolerance=2e-5):
    """`function` of float32 inputs and `reference` of the same in float64, with all gradients."""
    found = [x.clone().requires_grad_() for x in inputs]
    expected = [x.double().requires_grad_() for x in inputs]
    outputs, references = function(*found), reference(*expected)
    weights = [torch.randn_like(x) for x in outputs]
    grads = torch.autograd.grad(outputs, found, weights)
    of_references = torch.autograd.grad(references, expected, [w.double() for w in weights])
    for x, y in zip((*outputs, *grads), (*references, *of_references), strict=True):
        torch.testing.assert_close(
            x.double(), y, atol=tolerance * max(1.0, float(y.detach().abs().max())), rtol=0
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_what_is_traced_runs_in_pytorch():
    """`torch.jit.trace` gives sizes as tensors, whose addresses would be taken for numbers."""
    x, norm = torch.randn(2, 5, 32), RMSNorm(32, eps=1e-6)
    torch.testing.assert_close(torch.jit.trace(norm, x)(x), norm(x))


@pytest.mark.parametrize("dim", [7, 48])
def test_norm_and_swiglu(dim):
    torch.manual_seed(0)
    norm = RMSNorm(dim, eps=1e-6)

    def normed(x, weight):
        return (torch.func.functional_call(norm, {"weight": weight}, (x,)),)

    assert_same(
        normed, lambda x, w: (F.rms_norm(x, (dim,), w, 1e-6),), torch.randn(3, 5, dim), torch.rand(dim)
    )
    # A weight that lies with others, as a column of their matrix.
    x, weights = torch.randn(3, 5, dim), torch.rand(dim, 2)
    (found,), expected = normed(x, weights[:, 1]), F.rms_norm(x, (dim,), weights[:, 1], 1e-6)
    torch.testing.assert_close(found, expected)

    def plain(x):
        gate, up = x.chunk(2, -1)
        return (F.silu(gate) * up,)

    # Beyond 87 the exponential is 0.
    assert_same(lambda x: (swiglu(x),), plain, 40 * torch.randn(3, 5, 2 * dim))


@pytest.mark.parametrize("dim", [6, 32])
@pytest.mark.parametrize("is_rotated", [False, True])
def test_heads(dim, is_rotated):
    torch.manual_seed(0)
    norm = QKNorm(num_heads=4, head_dim=dim)

    def heads(channels):
        tables = rotary_tables(3 + torch.arange(9), dim, theta=1e4, like=channels) if is_rotated else None
        return norm(channels, 2, tables)[:3]

    channels = torch.randn(2, 9, 8 * dim)
    channels[0, 0] = 0
    assert_same(heads, heads, channels)


@pytest.mark.parametrize(
    ("num_tokens", "num_past", "window", "num_kv_heads", "dims"),
    [(150, 0, 40, 2, (16, 24)), (70, 5, 33, 1, (10, 6)), (1, 40, 20, 1, (16, 16)), (5, 100, 64, 2, (8, 8))],
)
@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
def test_windows(num_tokens, num_past, window, num_kv_heads, dims, rows):
    torch.manual_seed(0)
    num_keys = num_past + num_tokens
    segments = first = None
    if rows != "whole":
        start = num_keys // 3
        segments = (torch.arange(num_keys) >= start).long().expand(2, -1) - int(rows == "padded")
        first = (
            torch.where(torch.arange(num_keys) >= start, start, 0).expand(2, -1)[:, num_past:].contiguous()
        )

    def reference(q, k, v, scale):
        q = (q * scale[:, None]).transpose(1, 2)
        return (
            windowed_read(q, k.transpose(1, 2), v.transpose(1, 2), segments, window=window).transpose(1, 2),
        )

    q = torch.randn(2, num_tokens, 2, dims[0])
    k, v = (torch.randn(2, num_keys, num_kv_heads, dim) for dim in dims)
    assert_same(
        lambda *x: (CompiledWindow.apply(*x, first, window),), reference, q, k, v, torch.tensor([0.5, 2.0])
    )


@pytest.mark.parametrize("conv_size", [2, 4])
def test_steps_of_the_convolution(conv_size):
    torch.manual_seed(0)
    conv, x = ShortConvolution(7, conv_size), torch.randn(2, 9, 7)
    expected, last = conv(x)
    with torch.no_grad():
        _, state = conv(x[:, :4])
        for t in range(4, 9):
            y, state = conv(x[:, t : t + 1], state)
            torch.testing.assert_close(y, expected[:, t : t + 1])
    assert torch.equal(state, last)


@pytest.mark.parametrize("num_tokens", [1, 3, 9, 600])
@pytest.mark.parametrize("sizes", [(7, 5), (150, 33)])
def test_products(num_tokens, sizes):
    torch.manual_seed(0)
    dim, num_out = sizes
    layer = Linear(dim, num_out)
    x = torch.randn(1, num_tokens, dim)

    def product(x, weight):
        return (torch.func.functional_call(layer, {"weight": weight}, (x,)),)

    layer.requires_grad_(False)
    assert_same(product, lambda x, w: (x @ w.T,), x, layer.weight)
    expected = x @ layer.weight.T
    few = x[:, :FEW_TOKENS]
    torch.testing.assert_close(few_products(few, layer.weight), expected[:, :FEW_TOKENS])
    # The layer, where no gradient is wanted.
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("num_tokens", [3, 40, 600])
@pytest.mark.parametrize("product", [FasterLinear.apply, torch.ops.ovq.linear])
def test_hooks_and_adapters_may_change_products_in_place(num_tokens, product):
    torch.manual_seed(0)
    x, weight = torch.randn(2, num_tokens, 7), torch.randn(5, 7)

    def changed(product, x, weight):
        y = product(x, weight)
        y[[0]] *= 2
        return (y,)

    assert_same(
        lambda *given: changed(product, *given),
        lambda *given: changed(torch.nn.functional.linear, *given),
        x,
        weight,
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 40, 3), (131, 70, 30), (259, 65, 1100)])
@pytest.mark.parametrize("order", ["plain", "transposed a", "transposed b", "odd strides"])
def test_products_of_large_matrices(sizes, order, monkeypatch):
    # On other processors, PyTorch's library multiplies.
    monkeypatch.setattr(linear, "has_faster_products", lambda: True)
    torch.manual_seed(0)
    m, n, k = sizes
    a, b = torch.randn(m, k), torch.randn(k, n)
    if order == "transposed b":
        b = torch.randn(n, k).t()
    if order == "transposed a":
        a = torch.randn(k, m).t()
    if order == "odd strides":
        a, b = torch.randn(m, 2 * k)[:, ::2], torch.randn(k, n + 3)[:, :n]
    expected = a.double() @ b.double()
    found = product(a, b)
    # The error of PyTorch's product, and a little for luck.
    error, allowed = ((x - expected).abs().max() for x in (found, a @ b))
    assert error <= 1.5 * allowed + 1e-6
    # Sums are made in one order, whichever threads make them and whatever else is multiplied.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 4)
        assert torch.equal(product(a, b), found)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(product(a[m // 2 :], b), found[m // 2 :])
    total = torch.ones(m, n)
    assert product(a, b, added_to=total) is total
    torch.testing.assert_close(total, found + 1, atol=1e-4, rtol=1e-5)


def test_products_of_nothing():
    assert product(torch.ones(0, 3), torch.ones(3, 2)).shape == (0, 2)
    assert torch.equal(product(torch.ones(2, 0), torch.ones(0, 3)), torch.zeros(2, 3))


def test_the_roof_is_a_product():
    call, flops = product_loop()
    call()
    assert flops >= 1e9 * torch.get_num_threads()


def attended(x, **options):
    heads = x.unflatten(2, (2, 12))
    return ovq_attention(heads, heads, heads, num_slots=8, chunk_size=4, **options)[0]


@pytest.mark.parametrize(
    "function",
    [
        RMSNorm(24, eps=1e-6),
        swiglu,
        ShortConvolution(24, 4),
        lambda x: torch.cat([y.flatten() for y in QKNorm(2, 4)(x, 2)[:3]]),
        attended,
        functools.partial(attended, backend="torch"),
        functools.partial(attended, backend="torch", merge="nearest"),
        SlidingWindowAttention(24, num_heads=2, sliding_window=4, conv_size=0),
    ],
)
def test_hooks_may_give_back_saved_tensors_with_other_strides(function):
    def gradients(unpack):
        x = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with saved_tensors_hooks(lambda saved: saved, unpack):
            y = function(x)
        y = y[0] if isinstance(y, tuple) else y
        parameters = function.parameters() if isinstance(function, torch.nn.Module) else ()
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)
        return torch.autograd.grad((y * weights).sum(), [x, *parameters])

    def turned(x):
        return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() else x

    for found, expected in zip(gradients(turned), gradients(lambda saved: saved), strict=True):
        torch.testing.assert_close(found, expected)

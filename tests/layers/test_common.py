"""Normalisation, rotary embedding and the short convolution, each against an independent computation."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ovq.layers import SequenceLayout, ShortConvolution
from ovq.layers.common import QKNorm, RMSNorm, apply_rotary, l2_normalize, rotary_tables, swiglu
from ovq.layers.products import Linear
from ovq.ops import backend_used, ovq_attention
from ovq.ops.backends.cpu.kernels import cpu_kernels
from ovq.ops.backends.cpu.tokens import can_run


def conv_layout(mask=None, *, num_new, cu_seqlens=None):
    batch_size = 1 if mask is None else len(mask)
    return SequenceLayout.of(mask, batch_size=batch_size, num_past=0, num_new=num_new, cu_seqlens=cu_seqlens)


def test_l2_normalize_gives_unit_vectors_in_float32():
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    y = l2_normalize(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(y, F.normalize(x.float(), dim=-1))
    assert l2_normalize(x.double()).dtype == torch.float64


def test_l2_normalize_of_zero_is_zero_with_a_finite_gradient():
    x = torch.zeros(4, requires_grad=True)
    y = l2_normalize(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(4))
    assert x.grad.isfinite().all()


def test_tensors_of_other_classes_are_left_to_pytorch():
    """Their numbers may be elsewhere, as those of DTensors are: kernels would read at no address at all."""

    class Other(torch.Tensor):
        pass

    x = torch.randn(1, 9, 2, 8)
    other = x.as_subclass(Other)
    assert not can_run(other)
    assert isinstance(swiglu(other), Other)
    sizes = {"num_slots": 4, "chunk_size": 4}
    with pytest.raises(ValueError, match="expected plain tensors, found Other"):
        ovq_attention(other, other, other, **sizes, backend="cpu")
    o, _ = ovq_attention(other, other, other, **sizes)
    assert backend_used() == "torch"
    torch.testing.assert_close(torch.Tensor(o), ovq_attention(x, x, x, **sizes)[0])


@pytest.mark.parametrize("width", [1, 7, 9, 16])
@pytest.mark.parametrize("num_tokens", [1, 600])
@torch.no_grad()
def test_inputs_of_another_width_are_refused(width, num_tokens):
    """Kernels would read, and write, beyond them."""
    x = torch.randn(1, num_tokens, width)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Linear(8, 4)(x)
    with pytest.raises(RuntimeError, match=r"expected input with shape \[\*8\]"):
        RMSNorm(8, eps=1e-6)(x)
    with pytest.raises(ValueError, match=rf"expected x of shape \[B, T, 8\], found \[1, .*{width}\]"):
        ShortConvolution(8, conv_size=3)(x)


def test_scale_is_beta_times_root_of_head_dim_and_learns():
    norm = QKNorm(num_heads=3, head_dim=64)
    assert norm.scale.tolist() == [8.0, 8.0, 8.0]
    norm.scale.sum().backward()
    assert norm.beta.grad.tolist() == [8.0, 8.0, 8.0]


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_rotary_products_depend_on_the_distance_alone_even_at_a_million(start):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64).unbind()
    near = rotary_tables(torch.arange(8), 64, theta=10000.0, like=q)
    far = rotary_tables(start + torch.arange(8), 64, theta=10000.0, like=q)

    def product(tables, i, j):
        cos, sin = tables
        rotated_q = apply_rotary(q, cos[i : i + 1], sin[i : i + 1])
        return (rotated_q * apply_rotary(k, cos[j : j + 1], sin[j : j + 1])).sum()

    for i in range(8):
        torch.testing.assert_close(product(far, 7, i), product(near, 7, i), atol=2e-5, rtol=0)
    assert abs(product(near, 7, 0) - product(near, 7, 6)) > 0.1


def test_rotary_tables_match_a_computation_in_python_floats():
    cos, sin = rotary_tables(
        torch.tensor([999_999]), 8, theta=500.0, like=torch.empty(0, dtype=torch.float64)
    )
    for pair in range(4):
        angle = 999_999 * 500.0 ** (-2 * pair / 8)
        assert cos[0, pair].item() == pytest.approx(math.cos(angle), abs=1e-9)
        assert sin[0, pair].item() == pytest.approx(math.sin(angle), abs=1e-9)


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return ShortConvolution(6, conv_size=4).double()


@pytest.fixture
def x():
    return torch.randn(2, 11, 6, dtype=torch.float64)


def test_a_convolution_of_one_token_is_refused():
    with pytest.raises(ValueError, match="conv_size: expected at least 2, found 1"):
        ShortConvolution(6, conv_size=1)


def test_convolution_is_a_causal_depthwise_conv1d(conv, x):
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), conv.weight[:, None], groups=6).transpose(1, 2)
    y, state = conv(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, x[:, -3:].transpose(1, 2))


@pytest.mark.parametrize("cuts", [[1], [2, 3], [3, 9], list(range(1, 11))])
def test_convolution_in_parts_equals_the_whole(conv, x, cuts):
    expected, expected_state = conv(x)
    parts, state = [], None
    for part in x.tensor_split(cuts, dim=1):
        y, state = conv(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_padding_does_not_change_convolution_nor_state(conv, x, side, length):
    real = slice(0, length) if side == "right" else slice(11 - length, 11)
    mask = torch.zeros(2, 11, dtype=torch.long)
    mask[:, real] = 1
    expected, expected_state = conv(x[:, real])
    y, state = conv(x, None, conv_layout(mask, num_new=11))
    torch.testing.assert_close(y[:, real], expected)
    assert y[mask == 0].abs().max() == 0
    torch.testing.assert_close(state, expected_state)


def test_a_row_of_padding_alone_keeps_its_state(conv, x):
    _, before = conv(x)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    _, after = conv(x[:, :3], before, conv_layout(mask, num_new=3))
    torch.testing.assert_close(after[1], before[1])
    assert not torch.equal(after[0], before[0])


def test_packed_rows_do_not_leak(conv, x):
    bounds = [0, 2, 3, 3, 11]
    y, _ = conv(x[:1], None, conv_layout(num_new=11, cu_seqlens=torch.tensor(bounds)))
    rows = [x[:1, a:b] for a, b in itertools.pairwise(bounds) if a < b]
    torch.testing.assert_close(y, torch.cat([conv(row)[0] for row in rows], 1))
    assert not torch.allclose(y, conv(x[:1])[0])


def test_convolution_keeps_the_dtype_of_the_activations():
    conv = ShortConvolution(6, conv_size=3)
    y, state = conv(torch.randn(1, 4, 6, dtype=torch.bfloat16))
    assert y.dtype == state.dtype == torch.bfloat16


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_channels", "conv_size"), [(1, 2), (37, 3), (300, 4), (600, 8)])
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.parametrize("has_past", [False, True])
def test_the_compiled_convolution_equals_that_of_products(
    num_threads, num_channels, conv_size, num_tokens, has_past
):
    torch.manual_seed(0)
    conv = ShortConvolution(num_channels, conv_size=conv_size)
    x = torch.randn(3, num_tokens, num_channels, requires_grad=True)
    past = torch.randn(3, num_channels, conv_size - 1, requires_grad=True) if has_past else None
    inputs = [x, conv.weight, *([past] if has_past else [])]
    grad = torch.randn(3, num_tokens, num_channels)

    def run(dtype):
        copies = [each.detach().to(dtype).requires_grad_() for each in inputs]
        layer = ShortConvolution(num_channels, conv_size=conv_size).to(dtype)
        layer.weight = torch.nn.Parameter(copies[1].detach())
        y, state = layer(copies[0], copies[2] if has_past else None)
        sources = [copies[0], layer.weight, *copies[2:]]
        return [y, state, *torch.autograd.grad(y, sources, grad.to(dtype))]

    assert can_run(x, conv.weight) == cpu_kernels().startswith("compiled")
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = run(torch.float32)
    finally:
        torch.set_num_threads(before)
    # In float64 the products of PyTorch do it.
    for mine, exact in zip(found, run(torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bounds", [[0, 11], [0, 1, 2, 3, 11], [0, 2, 3, 3, 8, 11]])
def test_the_compiled_convolution_of_packed_rows_equals_that_of_products(bounds):
    torch.manual_seed(0)
    # More channels than a vector has, and so many tokens that the kernel would take eight at a time.
    conv, x = ShortConvolution(20, conv_size=4), torch.randn(1, 11, 20)
    layout = conv_layout(num_new=11, cu_seqlens=torch.tensor(bounds))
    grad = torch.randn(1, 11, 20)

    def run(dtype):
        layer = copy.deepcopy(conv).to(dtype)
        source = x.to(dtype).requires_grad_()
        y, _ = layer(source, None, layout)
        return [y, *torch.autograd.grad(y, [source, layer.weight], grad.to(dtype))]

    for mine, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=1e-5, rtol=1e-5)


def test_the_convolution_takes_inputs_that_are_not_contiguous():
    torch.manual_seed(0)
    conv = ShortConvolution(6, conv_size=3)
    x, grad = torch.randn(6, 9, 2), torch.randn(6, 9, 2).permute(2, 1, 0)
    strided, dense = x.permute(2, 1, 0).requires_grad_(), x.permute(2, 1, 0).contiguous().requires_grad_()
    y, expected = conv(strided)[0], conv(dense)[0]
    assert torch.equal(y, expected)
    assert torch.equal(
        torch.autograd.grad(y, strided, grad)[0], torch.autograd.grad(expected, dense, grad)[0]
    )

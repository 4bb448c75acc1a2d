"""The compiled memory, against the same in PyTorch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from ovq.convert import compiled as module
from ovq.convert.cache import MemoryLayer
from ovq.convert.compiled import is_compiled
from ovq.convert.config import MemoryConfig
from ovq.ops import cpu_kernels
from ovq.ops.state import tensors_of
from tests.convert.common import converted, tokens

pytestmark = pytest.mark.skipif(
    not cpu_kernels().startswith("compiled"), reason="there are no kernels on this machine"
)

# Key/value heads of three kinds, two query heads each; chunks that are no whole vectors, and a window larger
# than the panels of products.
SIZES = {"num_slots": [[12, 0, 40, 12]], "window": [[16, 48, 24, 16]], "num_sinks": 3, "chunk_size": 8}
TEMPERATURE = [[0.5, 1.0, 2.0, 1.0, 1.5, 0.7, 1.0, 1.0]]
BIAS = [[0.3, -1.0, 0.0, 0.0, 1.0, 0.2, 0.0, 0.5]]


# Keys of 20 numbers, of which 16 are turned.
REACH = {
    "trained_length": 60,
    "max_distance": 50,
    "rotary_frequencies": [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001],
}


USE = [[[0.2 * math.sin(5 * h + i) for i in range(40)] + [1.0] for h in range(4)]]


def layer_of(merge="nearest", *, has_learned=True, **fields):
    learned = {"slot_temperature": TEMPERATURE, "slot_bias": BIAS, "token_use": USE} if has_learned else {}
    config = MemoryConfig(merge=merge, value_weight=0.7, **SIZES, **REACH, **learned, **fields)
    return MemoryLayer(config.layer(0))


def inputs(num_tokens, dtype=torch.float32, *, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, num_tokens, h, 20, generator=generator) for h in (8, 4, 4))
    # As models hand them over: heads are not the outer dimension in memory.
    return tuple(x.to(dtype).transpose(1, 2) for x in (q, 3 * k, v))


def read(layer, q, k, v, sizes, masks=None):
    outputs, start = [], 0
    for i, size in enumerate(sizes):
        part = slice(start, start + size)
        mask = None if masks is None else masks[i]
        outputs.append(layer.attend(q[:, :, part], k[:, :, part], v[:, :, part], mask))
        start += size
    return torch.cat(outputs, 2)


def read_by_torch(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "is_compiled", lambda *args: False)
        return read(*args)


def check(layer, other, dtype):
    for name, tensor in layer.tensors().items():
        found = other.tensors()[name]
        if name.endswith(("_sum", "unit")):
            tiny = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 1e-4}
            torch.testing.assert_close(found, tensor, msg=name, **tiny)
        else:
            assert torch.equal(found, tensor), name


@pytest.mark.parametrize("merge", ["nearest", "updated", "existing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=4, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 5, 24, 33, 90]), min_size=1, max_size=5), seed=st.integers(0, 99)
)
@torch.no_grad()
def test_kernels_and_torch_agree(merge, dtype, sizes, seed):
    q, k, v = inputs(sum(sizes), dtype, seed=seed)
    layer, other = layer_of(merge), layer_of(merge)
    found, expected = read(layer, q, k, v, sizes), read_by_torch(other, q, k, v, sizes)
    tiny = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(found, expected, **tiny)
    check(layer, other, dtype)


@pytest.mark.parametrize("merge", ["nearest", "existing"])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@torch.no_grad()
def test_kernels_and_torch_round_sums_alike(state_dtype, merge):
    sizes = [70, 1, 5, 40, *[1] * 60, 30]
    q, k, v = inputs(sum(sizes))
    layer, other = layer_of(merge, state_dtype=state_dtype), layer_of(merge, state_dtype=state_dtype)
    found, expected = read(layer, q, k, v, sizes), read_by_torch(other, q, k, v, sizes)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    states = ([memory.state for memory in x.memories] for x in (layer, other))
    for own, state in zip(*states, strict=True):
        for name in {"count", "position_sum", "weight"} & tensors_of(state).keys():
            assert torch.equal(getattr(own, name), getattr(state, name)), name
        for name in ("key_sum", "value_sum"):
            assert getattr(own, name).dtype == getattr(torch, state_dtype)
            # The order of terms may tell which way a sum is rounded.
            sums = state.wide_sums(name)
            step = sums.abs().amax(-1, keepdim=True) / (127 if state_dtype == "int8" else 128)
            assert ((own.wide_sums(name) - sums).abs() <= 1.01 * step).all(), name
            assert (own.wide_sums(name) == sums).float().mean() > 0.98 or not sums.numel(), name


@pytest.mark.parametrize("length", [0.0, 1e-30])
@torch.no_grad()
def test_the_unit_of_keys_is_that_of_the_first_that_are_not_as_good_as_zero(length):
    q, k, v = inputs(160)
    k[:, :, :75] *= length
    layer, other = layer_of(), layer_of()
    found, expected = read(layer, q, k, v, [160]), read_by_torch(other, q, k, v, [9, 70, 81])
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    check(layer, other, torch.float32)
    assert {*layer.memories[0].state.key_unit.flatten().tolist()} == {8.0}


@torch.no_grad()
def test_a_few_tokens_may_merge_more_than_one_chunk():
    # They are read one by one, in one call.
    sizes, few = [40, 4, 3, 4, 2, 4], MemoryConfig(**SIZES | {"chunk_size": 1}).layer(0)
    q, k, v = inputs(sum(sizes))
    layer, other = MemoryLayer(few), MemoryLayer(few)
    found, expected = read(layer, q, k, v, sizes), read_by_torch(other, q, k, v, sizes)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    check(layer, other, torch.float32)


@torch.no_grad()
def test_rows_of_different_lengths_are_read():
    sizes = [40, 3, 1, 70, 1, 30]
    q, k, v = inputs(sum(sizes), rows=3)
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(3, size, generator=generator) < 0.7 for size in sizes]
    layer, other = layer_of(), layer_of()
    found, expected = (how(x, q, k, v, sizes, masks) for how, x in ((read, layer), (read_by_torch, other)))
    kept = torch.cat(masks, 1)[:, None, :, None]
    assert len(set(layer.memories[0].filled)) > 1
    torch.testing.assert_close(found * kept, expected * kept, atol=1e-5, rtol=1e-5)
    check(layer, other, torch.float32)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_a_call_longer_than_what_is_laid_out_at_once(state_dtype):
    q, k, v = inputs(1100, rows=1)
    layer, other = (layer_of(has_learned=False, state_dtype=state_dtype) for _ in range(2))
    whole, parts = read(layer, q, k, v, [1100]), read(other, q, k, v, [400, 3, 697])
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    # Sums are kept, and not means, so that splits do not even change what is rounded.
    for name, tensor in layer.tensors().items():
        assert torch.equal(other.tensors()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernels", "torch"])
def test_what_autograd_has_saved_does_not_change(dtype):
    model, ids = converted().to(dtype), tokens(1, 80)
    grads = []
    for reads_on in (False, True):
        model.zero_grad()
        cache = model.make_cache()
        loss = model(ids[:, :60], labels=ids[:, :60], past_key_values=cache).loss
        memory = cache.layers[0].memories[0]
        assert not is_compiled([memory], *(torch.zeros(1, 2, 1, 8, requires_grad=True),) * 2)
        if reads_on:
            with torch.no_grad():
                model(ids[:, 60:], past_key_values=cache)
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for alone, found in zip(*grads, strict=True):
        assert torch.equal(found, alone)


@torch.no_grad()
def test_tensors_may_lie_in_memory_in_any_order():
    given = inputs(60)
    strided = (x.mT.contiguous().mT for x in given)
    assert torch.equal(read(layer_of(), *strided, [60]), read(layer_of(), *given, [60]))


def test_gradients_reach_queries_where_keys_need_none():
    q, k, v = inputs(30, rows=1)
    layer_of().attend(q.requires_grad_(), k, v, None).sum().backward()
    assert q.grad.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_no_tangent_of_forward_mode_differentiation_is_lost():
    """Kernels read the plain numbers of tensors, so PyTorch has to run; also where tokens are merged."""
    model = converted().requires_grad_(False)
    embedded = model.get_input_embeddings()(tokens(1, 90))
    step = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))

    def squares(x):
        return model(inputs_embeds=x).logits.square().sum()

    x = embedded.clone().requires_grad_()
    expected = (torch.autograd.grad(squares(x), x)[0] * step).sum()
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(squares(forward_ad.make_dual(embedded, step))).tangent
    torch.testing.assert_close(tangent, expected, atol=0, rtol=1e-3)
    torch.testing.assert_close(torch.func.jvp(squares, (embedded,), (step,))[1], tangent, atol=0, rtol=1e-4)
    model = converted(state_dtype="int8")
    with pytest.raises(ValueError, match=r"gradients: expected slots in float32 .* found int8"):
        torch.func.jvp(squares, (embedded,), (step,))


@torch.no_grad()
def test_what_a_kernel_has_read_is_taken_out_again():
    """Heads 0 and 3 have one budget, so that groups of heads are not in the order of the heads."""
    q, k, v = inputs(50, rows=1)
    layer, other = layer_of(), layer_of()
    read(layer, q, k, v, [30])
    layer.activate_past_recording()
    before = layer.copies_before(10)
    assert before
    # As a kernel reads, without a record.
    layer.record_past = False
    layer.attend(*(x[:, :, 30:40] for x in (q, k, v)), None)
    layer.record_past = True
    layer.record_read(before, 10)
    layer.crop(-4)
    read(other, q, k, v, [30, 6])
    check(layer, other, torch.float32)

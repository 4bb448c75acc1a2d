"""How tensors lie in memory changes nothing: transposed, strided and expanded inputs, at every entry."""

import dataclasses
import importlib.util

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from ovq.ops.options import CURRENT_MERGES
from tests.ops.common import CPU, assert_same_state, attend, inputs

# How often memory is laid out anew for each of them.
WAYS = [("naive", torch.float64, 2), ("torch", torch.float64, 6), ("torch", torch.float32, 2)]
WAYS += [(x, torch.float32, 8) for x in CPU]
if importlib.util.find_spec("triton"):
    WAYS.append(("triton", torch.float32, 1))
ROW_TENSORS = ("key_sum", "value_sum", "count", "pending_keys", "pending_values")
ENTRIES = ["dense", "masked", "packed", "constant rate", "nearest", "one token", "decode"]
# What kernels refuse.
REFUSED = {"cpu": ["constant rate"], "triton": ["constant rate", "nearest"]}
CASES = [(*way, entry) for way in WAYS for entry in ENTRIES if entry not in REFUSED.get(way[0], ())]
# The interpreter takes seconds for what it does with a mask as well.
SLOW = [("triton", "dense"), ("triton", "packed")]
CASES = [
    pytest.param(*case, marks=pytest.mark.slow) if (case[0], case[3]) in SLOW else case for case in CASES
]
OPTIONS = {"num_slots": 6, "chunk_size": 4}


def relaid(x, order, spread):
    """The numbers of `x`, its dimensions in another order of memory and its elements `spread` apart."""
    order = [d for d in order if d < x.dim()]
    stored = x.detach().permute(order).contiguous()
    stored = stored.repeat_interleave(spread, -1)[..., ::spread]
    return stored.permute([order.index(d) for d in range(x.dim())])


@st.composite
def layouts(draw):
    """A function that lays tensors out anew, each in its own way."""
    ways = [(draw(st.permutations(range(4))), draw(st.sampled_from([1, 2]))) for _ in range(10)]

    def lay_out(tensors):
        return [relaid(x, *way) for x, way in zip(tensors, ways, strict=False)]

    return lay_out


def results(backend, tensors, before, entry, lay_out):
    """Outputs, final state and all gradients of a call whose tensors are laid out by `lay_out`."""
    needs_grad = entry != "decode"
    leaves = [x.requires_grad_(needs_grad) for x in lay_out(tensors)]
    state, memory = None, []
    if before is not None:
        memory = [
            x.requires_grad_(needs_grad and x.is_floating_point())
            for x in lay_out([getattr(before, name) for name in ROW_TENSORS])
        ]
        state = dataclasses.replace(before, **dict(zip(ROW_TENSORS, memory, strict=True)))
    length = leaves[0].shape[1]
    options = {**OPTIONS, "scale": leaves[3], "initial_state": state}
    if entry == "masked":
        options["attention_mask"] = relaid(torch.ones(leaves[0].shape[:2]), (1, 0), 2)
        options["attention_mask"][0, :2] = 0
    if entry == "packed":
        options["cu_seqlens"] = torch.tensor([0, 0, 3, 3, length, 0])[:5:1]
    if entry == "constant rate":
        options["ablation"] = {"rate": 0.3}
    if entry in CURRENT_MERGES:
        options["merge"] = entry
    o, after = attend(*leaves[:3], backend=backend, **options)
    if not needs_grad:
        return o, after, []
    outputs = [o, after.key_sum, after.value_sum, after.pending_keys]
    weights = lay_out([x.detach().sin() for x in outputs])
    grads = torch.autograd.grad(outputs, [*leaves, *memory[:2], *memory[3:]], weights)
    return o, after, grads


@pytest.mark.parametrize(
    ("backend", "dtype", "examples", "entry"), CASES, ids=lambda x: str(x).removeprefix("torch.")
)
def test_memory_orders_make_no_difference(backend, dtype, examples, entry):
    length = 1 if entry in ("one token", "decode") else 7
    batch = 1 if entry == "packed" or backend == "triton" else 2
    before = None
    if entry != "packed":
        _, before = attend(*inputs(batch, 11, 4, 2, 3, 5, dtype=dtype, seed=1), **OPTIONS)
    tensors = [*inputs(batch, length, 4, 2, 3, 5, dtype=dtype), torch.linspace(1, 2, 4, dtype=dtype)]
    expected = results(backend, tensors, before, entry, lambda x: [y.detach().clone() for y in x])
    bound = 1e-9 if dtype == torch.float64 else 2e-5

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(layouts())
    def holds(lay_out):
        o, after, grads = results(backend, tensors, before, entry, lay_out)
        torch.testing.assert_close(o, expected[0], rtol=bound, atol=bound)
        assert_same_state(after, expected[1], tolerance=bound)
        for grad, grad_expected in zip(grads, expected[2], strict=True):
            torch.testing.assert_close(grad, grad_expected, rtol=bound, atol=bound)

    holds()


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_numbers_that_share_memory(backend):
    """Expanded tensors, and views that begin inside another tensor."""
    q, k, v = inputs(1, 9, 2, 2, 4, 4)
    one = k[:, :, :1].expand(-1, -1, 2, -1), v[:1].expand(2, -1, -1, -1), q.new_tensor(1.5).expand(2)
    batch = q.expand(2, -1, -1, -1), one[0].expand(2, -1, -1, -1), one[1]
    o, state = attend(*batch, scale=one[2], backend=backend, **OPTIONS)
    copies = [x.contiguous() for x in batch]
    o_copies, state_copies = attend(*copies, scale=one[2].contiguous(), backend=backend, **OPTIONS)
    torch.testing.assert_close(o, o_copies)
    assert_same_state(state, state_copies)
    inside = torch.cat([q, k, v], -1).chunk(3, -1)
    o, state = attend(*inside, backend=backend, **OPTIONS)
    o_copies, state_copies = attend(*(x.contiguous() for x in inside), backend=backend, **OPTIONS)
    torch.testing.assert_close(o, o_copies)
    assert_same_state(state, state_copies)

"""The memory of heads, against the op whose dictionary it keeps and against softmax written out."""

import math

import pytest
import torch

from ovq.convert.cache import MemoryLayer
from ovq.convert.compiled import advance
from ovq.convert.config import Budget, MemoryConfig
from ovq.convert.memory import HeadMemory
from ovq.ops import options, ovq_attention
from ovq.ops.narrow import narrowed, widened
from ovq.ops.options import default_growth
from tests.written import Written

SIZES = {"num_slots": 12, "window": 16, "num_sinks": 3, "chunk_size": 8, "value_weight": 0.7}


def memory_and_tokens(*, merge="nearest", dtype=torch.float64, num_tokens=90, **fields):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, num_tokens, 5, generator=generator, dtype=dtype) for h in (4, 2, 2))
    return HeadMemory(Budget(heads=(0, 1), merge=merge, **SIZES, **fields), k, v), q, 3 * k, v


def learn(memory, k, v):
    advance([memory], k, v, [k.shape[2]] * len(k))


@pytest.mark.parametrize("merge", ["nearest", "updated", "existing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_slots_are_those_of_the_op(merge, dtype, monkeypatch):
    # Tokens of one model's texts count for each other by another power than those of trained mixers.
    monkeypatch.setattr("ovq.convert.config.MASS_POWER", options.MASS_POWER)
    memory, _, k, v = memory_and_tokens(merge=merge, dtype=dtype)
    learn(memory, k, v)
    [merged] = set(memory.num_merged)
    assert merged == 72
    unit = memory.key_unit[0, 0]
    assert (memory.key_unit == unit).all()
    assert math.log2(unit) % 1 == 0
    assert 0.5 < float(unit / k.square().sum(-1).mean().sqrt()) < 2
    part = slice(3, 3 + merged)
    keys, values = (x[:, :, part].transpose(1, 2) for x in (k / unit, v))
    _, state = ovq_attention(
        keys,
        keys,
        values,
        num_slots=12,
        chunk_size=8,
        merge=merge,
        growth=default_growth(merge),
        output_final_state=True,
        **({"value_weight": 0.7} if merge == "nearest" else {}),
    )
    used = state.count.shape[2]
    assert torch.equal(memory.count[:, :, :used], state.count)
    assert not memory.count[:, :, used:].any()
    tiny = {"atol": 1e-5 if dtype == torch.float32 else 1e-12, "rtol": 0}
    torch.testing.assert_close(memory.slot_keys[:, :, :used] / unit, state.keys, **tiny)
    torch.testing.assert_close(memory.slot_values[:, :, :used], state.values, **tiny)


def test_autocast_does_not_reach_what_is_merged(monkeypatch):
    for module in ("convert.compiled", "ops.backends.cpu"):
        monkeypatch.setattr(f"ovq.{module}.is_available", lambda: False)
    memories = []
    for is_narrow in (False, True):
        memory, _, k, v = memory_and_tokens(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
            # So close that products in bfloat16 tell little.
            learn(memory, k[:, :, :1] + 0.02 * k, v[:, :, :1] + 0.02 * v)
        memories.append(memory.tensors())
    assert all(torch.equal(memories[1][name], x) for name, x in memories[0].items())


@pytest.mark.parametrize("num_tokens", [2, 10, 40, 90])
def test_the_read_is_one_softmax_over_all_that_is_kept(num_tokens):
    memory, q, k, v = memory_and_tokens()
    learn(memory, k[:, :, :num_tokens], v[:, :, :num_tokens])
    temperature, bias = torch.tensor([1.0, 0.5, 2.0, 1.0]), torch.tensor([0.0, 1.0, -1.0, 0.0])
    before = memory.clone()
    new = slice(num_tokens - 1, num_tokens)
    found = memory.attend(
        q[:, :, new], k[:, :, new], v[:, :, new], [1, 1], temperature=temperature, bias=bias
    )
    for row in range(2):
        for head in range(4):
            own = head // 2
            filled = before.filled[row]
            keys = torch.cat([before.recent_keys[row, own, :filled], k[row, own, new]])
            values = torch.cat([before.recent_values[row, own, :filled], v[row, own, new]])
            query = q[row, head, num_tokens - 1]
            weights = (keys @ query).exp()
            counts = before.count[row, own]
            scores = before.slot_keys[row, own] @ query
            # Slots of one token are that token.
            learned = torch.where(counts > 1, scores * temperature[head] + bias[head], scores)
            slots = counts * learned.exp()
            total = weights.sum() + slots.sum()
            expected = (weights @ values + slots @ before.slot_values[row, own]) / total
            torch.testing.assert_close(found[row, head, 0], expected, atol=1e-10, rtol=0)


def test_a_copy_shares_nothing():
    memory, q, k, v = memory_and_tokens()
    learn(memory, k[:, :, :50], v[:, :, :50])
    kept = {name: t.clone() for name, t in memory.tensors().items()}
    copy = memory.clone()
    copy.attend(q[:, :, 50:], k[:, :, 50:], v[:, :, 50:], [40, 40])
    assert all(torch.equal(t, kept[name]) for name, t in memory.tensors().items())


@pytest.mark.parametrize("merge", ["nearest", "existing"])
def test_gradients_reach_what_was_merged(merge):
    # Pairs are merged as before where keys hardly change, so differences tell the gradient.
    _, q, k, v = memory_and_tokens(merge=merge)
    q, v = q / 3, v.clone()

    def total(k, v):
        memory, *_ = memory_and_tokens(merge=merge)
        found = memory.attend(q, k, v, [90, 90])
        # Queries that see the first 30 tokens in slots alone.
        return found[:, :, 60:].sin().sum(), memory

    leaves = k.clone().requires_grad_(True), v.clone().requires_grad_(True)
    value, memory = total(*leaves)
    assert memory.slot_keys.requires_grad
    gradients = torch.autograd.grad(value, leaves)
    assert not any(x.requires_grad for x in memory.detached().tensors().values())
    generator = torch.Generator().manual_seed(1)
    for i, gradient in enumerate(gradients):
        assert gradient[:, :, 3:30].abs().min() > 0
        way = torch.zeros_like(k)
        way[:, :, 3:30] = torch.randn(2, 2, 27, 5, generator=generator, dtype=k.dtype)
        step = [0.0, 0.0]
        step[i] = 1e-6
        with torch.no_grad():
            up, down = (total(k + sign * step[0] * way, v + sign * step[1] * way)[0] for sign in (1, -1))
        assert (up - down) / 2e-6 == pytest.approx(float((gradient * way).sum()), rel=1e-5)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_rounding_again_changes_nothing(state_dtype):
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(2000, 7, generator=generator) * torch.randn(2000, 1, generator=generator).exp()
    sums[:3] = torch.tensor([[0.0] * 7, [1e-30] * 7, [-3e30] * 7])
    numbers, steps = narrowed(sums, state_dtype)
    wide = widened(numbers, steps, torch.float32)
    again, same = narrowed(wide, state_dtype)
    assert torch.equal(again, numbers)
    assert steps is None or torch.equal(same, steps)
    bound = 2.0**-8 if state_dtype == "bfloat16" else 0.505 / 127
    assert ((wide - sums).abs() <= bound * sums.abs().amax(1, keepdim=True)).all()
    for odd in (torch.nan, torch.inf):
        sums[5, 3] = odd
        wide = widened(*narrowed(sums, state_dtype), torch.float32)
        assert not wide[5, 3].isfinite()
        assert wide[6].isfinite().all()


def test_a_token_alone_in_a_slot_is_that_token_in_bfloat16():
    memory, _, k, v = memory_and_tokens(dtype=torch.float32, num_tokens=19, state_dtype="bfloat16")
    k, v = k.bfloat16().float(), v.bfloat16().float()
    learn(memory, k, v)
    assert memory.num_merged == [8, 8]
    assert (memory.count[:, :, :8] == 1).all()
    assert memory.key_sum.dtype == torch.bfloat16
    for found, given in ((memory.slot_keys, k), (memory.slot_values, v)):
        assert torch.equal(found[:, :, :8], given[:, :, 3:11])


def test_gradients_need_slots_in_float32():
    memory, q, k, v = memory_and_tokens(dtype=torch.float32, state_dtype="int8")
    expected = r"gradients: expected slots in float32 \(state_dtype\) or torch.no_grad\(\), found int8"
    with pytest.raises(ValueError, match=expected):
        memory.attend(q.requires_grad_(), k, v, [90, 90])


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("trained_length", [None, 64])
def test_the_cost_of_gradients_is_linear_in_tokens(padding, trained_length):
    sizes = {"num_layers": 1, "num_kv_heads": 1, "num_slots": 8, "window": 16, "chunk_size": 8}
    reach = {"trained_length": trained_length, "rotary_frequencies": [1.0]}
    config = MemoryConfig.uniform(**sizes, **reach).layer(0)

    def written(length):
        k = torch.randn(2, 1, length, 8, requires_grad=True)
        # Rows that merge and are re-positioned at different tokens.
        mask = torch.arange(length) >= torch.tensor([[0], [padding]])
        with Written() as mode:
            MemoryLayer(config).attend(k, k, k, mask).sum().backward()
        return mode.numel

    assert written(1024) < 2.2 * written(512)

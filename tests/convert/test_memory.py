"""The memory of heads, against the op whose dictionary it keeps and against softmax written out."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.autograd import forward_ad

from ovq.convert.cache import MemoryLayer
from ovq.convert.compiled import advance, is_compiled
from ovq.convert.config import Budget, MemoryConfig
from ovq.convert.memory import HeadMemory
from ovq.ops import OVQState, options, ovq_attention
from ovq.ops.backends.cpu.kernels import is_available
from ovq.ops.narrow import narrowed, widened
from ovq.ops.options import default_growth
from ovq.ops.state import tensors_of
from tests.written import Written

SIZES = {"num_slots": 12, "window": 16, "num_sinks": 3, "chunk_size": 8, "value_weight": 0.7}


def memory_and_tokens(*, merge="nearest", dtype=torch.float64, num_tokens=90, **fields):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, num_tokens, 5, generator=generator, dtype=dtype) for h in (4, 2, 2))
    return HeadMemory.empty(Budget(heads=(0, 1), merge=merge, **SIZES, **fields), k, v), q, 3 * k, v


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
    unit = memory.state.key_unit[0, 0]
    assert (memory.state.key_unit == unit).all()
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
    assert torch.equal(memory.state.count[:, :, :used], state.count)
    assert not memory.state.count[:, :, used:].any()
    tiny = {"atol": 1e-5 if dtype == torch.float32 else 1e-12, "rtol": 0}
    torch.testing.assert_close(memory.state.keys[:, :, :used] / unit, state.keys, **tiny)
    torch.testing.assert_close(memory.state.values[:, :, :used], state.values, **tiny)


def test_autocast_does_not_reach_what_is_merged(monkeypatch):
    for module in ("convert.compiled", "ops.backends.cpu"):
        monkeypatch.setattr(f"ovq.{module}.is_available", lambda: False)
    memories = []
    for is_narrow in (False, True):
        memory, _, k, v = memory_and_tokens(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
            # So close that products in bfloat16 tell little.
            learn(memory, k[:, :, :1] + 0.02 * k, v[:, :, :1] + 0.02 * v)
        memories.append(tensors_of(memory.state))
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
            keys = torch.cat([before.state.pending_keys[row, own, :filled], k[row, own, new]])
            values = torch.cat([before.state.pending_values[row, own, :filled], v[row, own, new]])
            query = q[row, head, num_tokens - 1]
            weights = (keys @ query).exp()
            counts = before.state.count[row, own]
            scores = before.state.keys[row, own] @ query
            # Slots of one token are that token.
            learned = torch.where(counts > 1, scores * temperature[head] + bias[head], scores)
            slots = counts * learned.exp()
            total = weights.sum() + slots.sum()
            expected = (weights @ values + slots @ before.state.values[row, own]) / total
            torch.testing.assert_close(found[row, head, 0], expected, atol=1e-10, rtol=0)


def test_a_copy_shares_nothing():
    memory, q, k, v = memory_and_tokens()
    learn(memory, k[:, :, :50], v[:, :, :50])
    kept = {name: t.clone() for name, t in tensors_of(memory.state).items()}
    copy = memory.clone()
    copy.attend(q[:, :, 50:], k[:, :, 50:], v[:, :, 50:], [40, 40])
    assert all(torch.equal(t, kept[name]) for name, t in tensors_of(memory.state).items())


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
    assert memory.state.keys.requires_grad
    gradients = torch.autograd.grad(value, leaves)
    assert not any(x.requires_grad for x in tensors_of(memory.state.detach()).values())
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
    assert (memory.state.count[:, :, :8] == 1).all()
    assert memory.state.key_sum.dtype == torch.bfloat16
    for found, given in ((memory.state.keys, k), (memory.state.values, v)):
        assert torch.equal(found[:, :, :8], given[:, :, 3:11])


def test_gradients_need_slots_in_float32():
    memory, q, k, v = memory_and_tokens(dtype=torch.float32, state_dtype="int8")
    expected = r"gradients: expected slots in float32 .* or torch.no_grad\(\) and no tangents, found int8"
    with pytest.raises(ValueError, match=expected):
        memory.attend(q.requires_grad_(), k, v, [90, 90])


@pytest.mark.parametrize("padding", [pytest.param(0, marks=pytest.mark.slow), 5])
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

    assert written(512) < 2.2 * written(256)


def states_of_two_rows(**fields):
    """A memory that has read 61 tokens in one row and 20 in the other."""
    memory, q, k, v = memory_and_tokens(dtype=torch.float32, **fields)
    memory.attend(None, k[:, :, :61], v[:, :, :61], [61, 20])
    return memory, (q[:, :, 61:], k[:, :, 61:], v[:, :, 61:])


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_the_state_of_heads_is_saved_as_others_are(state_dtype, tmp_path):
    memory, tokens = states_of_two_rows(state_dtype=state_dtype)
    state, path = memory.state, tmp_path / "state.safetensors"
    assert (memory.num_merged, memory.filled) == ([48, 8], [13, 12])
    assert (state.num_merged.tolist(), state.num_pending.tolist()) == ([48, 8], [13, 12])
    assert "slots=12 of 12, sinks=3, window=16, chunk_size=8, torch.float32" in repr(state)
    assert state.summary().num_open == (12, 8)
    state.save(path)
    loaded = OVQState.load(path)
    for name, x in tensors_of(state).items():
        assert torch.equal(getattr(loaded, name), x), name
    other = HeadMemory(memory.budget, loaded)
    found, expected = (x.attend(*tokens, [29, 29]) for x in (other, memory))
    assert torch.equal(found, expected)
    tensors, header = load_file(path), {"num_slots": "12", "chunk_size": "8", "num_sinks": "3"}
    tensors["count"][0, 0, 0] += 1
    save_file(tensors, path, metadata={"format": "ovq-state", "version": "5", **header, "window": "16"})
    with pytest.raises(
        ValueError, match=r"expected counts that add up to at most the .*\[\[48, 48\], \[8, 8"
    ):
        OVQState.load(path)
    save_file(tensors, path, metadata={"format": "ovq-state", "version": "5", **header})
    with pytest.raises(ValueError, match=r"expected window to be an integer from 1 to 2\^62, found ''"):
        OVQState.load(path)


def test_the_state_of_heads_without_slots_is_saved(tmp_path):
    sizes = SIZES | {"num_slots": 0}
    k = torch.randn(1, 1, 40, 5, generator=torch.Generator().manual_seed(0))
    memory = HeadMemory.empty(Budget(heads=(0,), merge="nearest", **sizes), k, k)
    learn(memory, k, k)
    memory.state.save(tmp_path / "state.safetensors")
    loaded = OVQState.load(tmp_path / "state.safetensors")
    assert (loaded.num_slots, loaded.num_seen.tolist(), loaded.num_merged.tolist()) == (0, [40], [24])
    assert torch.equal(loaded.pending_keys, memory.state.pending_keys)


def test_a_smaller_state_of_heads_keeps_every_token_and_its_position():
    memory, _ = states_of_two_rows()
    state = memory.state
    smaller = state.resize(5)
    assert smaller.count.shape == (2, 2, 5)
    for name in ("count", "position_sum", "key_sum", "value_sum"):
        found, expected = (getattr(x, name).double().sum(2) for x in (smaller, state))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-6)


def test_the_op_refuses_the_state_of_heads():
    memory, _ = states_of_two_rows()
    x = torch.zeros(2, 1, 2, 5)
    sizes = {"num_slots": 12, "chunk_size": 8}
    with pytest.raises(ValueError, match="initial_state: window: expected None, found 16"):
        ovq_attention(x, x, x, initial_state=memory.state, **sizes)
    odd = OVQState.empty(batch_size=2, num_kv_heads=2, key_dim=5, value_dim=5, **sizes)
    odd.key_unit = torch.ones(2, 2)
    with pytest.raises(ValueError, match="key_unit: expected none outside of converted models, found some"):
        ovq_attention(x, x, x, initial_state=odd, **sizes)


def test_states_of_heads_of_other_sizes_do_not_join():
    memory, _ = states_of_two_rows()
    other, _ = states_of_two_rows()
    other.state.window = 24
    with pytest.raises(ValueError, match="states: expected window 16 in all, found 24"):
        OVQState.concatenate([memory.state, other.state])
    other.state.window, other.state.weight, other.state.token_use = (
        16,
        torch.ones(2, 2, 12),
        torch.ones(2, 2, 11),
    )
    for states in ([memory.state, other.state], [other.state, memory.state]):
        with pytest.raises(ValueError, match=r"states: expected names \['key_sum', .* in all, found"):
            OVQState.concatenate(states)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@torch.no_grad()
def test_a_memory_in_int8_reads_under_forward_mode_as_long_as_nothing_has_a_tangent():
    memory, q, k, v = memory_and_tokens(dtype=torch.float32, state_dtype="int8")
    other = memory.clone()
    expected = other.attend(q, k, v, [90, 90])
    with forward_ad.dual_level():
        assert torch.equal(memory.clone().attend(q, k, v, [90, 90]), expected)
        with pytest.raises(ValueError, match="no tangents, found int8"):
            memory.attend(forward_ad.make_dual(q, q), k, v, [90, 90])


def test_values_keep_their_dtype_beside_wider_keys():
    """As under autocast, which computes values in bfloat16, but rotary positions in float32."""
    memory, _, k, v = memory_and_tokens(dtype=torch.float32)
    memory = HeadMemory.empty(memory.budget, k, v.bfloat16())
    learn(memory, k, v.bfloat16())
    assert (memory.state.pending_keys.dtype, memory.state.pending_values.dtype) == (k.dtype, torch.bfloat16)
    # Kernels would read them as if both were alike.
    assert not is_compiled([memory], k, v)
    assert is_compiled([HeadMemory.empty(memory.budget, k, v)], k, v) == is_available()

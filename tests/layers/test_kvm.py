"""Key-Value Means against the rule written out token by token, and what its options change."""

import itertools
import math

import pytest
import torch

from ovq_lab.mixers import KVMAttention
from ovq_lab.mixers.kvm_state import KVMSchedule
from tests.layers.common import assert_alike_with_gradients

HIDDEN, HEAD = 12, 8


def make(seed=0, **options):
    """A float64 layer whose norms and temperatures are not at their initial values."""
    sizes = {"num_slots": 7, "kvm_chunk_size": 3, "conv_size": 0} | options
    torch.manual_seed(seed)
    layer = KVMAttention(HIDDEN, 4, 2, HEAD, **sizes).double()
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return layer


def random_inputs(num_tokens, rows=2):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(rows, num_tokens, HIDDEN, dtype=torch.float64, generator=generator)


def norm(x, module):
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * module.weight + module.bias


def rotated(x, position, rope_dim, theta=10000.0):
    x, half = x.clone(), rope_dim // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / rope_dim)
        a, b = x[i].clone(), x[i + half].clone()
        x[i] = a * math.cos(angle) - b * math.sin(angle)
        x[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return x


def wanted_slots(growth, num_read, num_slots):
    return {
        "immediate": num_slots,
        "plateau": math.floor(num_slots * num_read / (num_slots + num_read)),
        "sqrt": min(num_slots, math.floor(16 * num_read**0.5)),
    }[growth]


class OneHead:
    """The slots and the window of one key/value head of one row, one token after the other."""

    def __init__(self, layer):
        self.layer, self.keys, self.values, self.lengths = layer, [], [], []
        self.window, self.num_read, self.num_left = [], 0, 0

    def for_slots(self, key):
        key = torch.cat([torch.zeros_like(key[: self.layer.rope_dim]), key[self.layer.rope_dim :]])
        return self.slot_key(key)

    def slot_key(self, key_sum):
        key = norm(key_sum, self.layer.state_norm)
        if self.layer.kvm_norm_leak:
            return key
        return torch.cat([torch.zeros_like(key[: self.layer.rope_dim]), key[self.layer.rope_dim :]])

    def take_in(self, chunk):
        """Let a chunk that leaves the window enter the slots."""
        layer = self.layer
        keys = [self.for_slots(key) for key, _, _ in chunk]
        self.num_left += len(chunk)
        wanted = wanted_slots(layer.kvm_growth, self.num_read, layer.num_slots)
        target = max(len(self.keys), min(wanted, self.num_left))
        num_new = min(target - len(self.keys), len(chunk)) if self.keys else len(chunk)
        known = [self.slot_key(key_sum) for key_sum in self.keys]
        best = [max(((key @ slot).item() for slot in known), default=0.0) for key in keys]
        new = sorted(sorted(range(len(chunk)), key=lambda i: best[i])[:num_new])
        for i in new:
            _, value, _ = chunk[i]
            self.keys.append(keys[i])
            self.values.append(value)
            self.lengths.append(value.norm())
        known = [self.slot_key(key_sum) for key_sum in self.keys]
        for i in sorted(set(range(len(chunk))) - set(new)):
            _, value, gate = chunk[i]
            scores = [(keys[i] @ slot).item() for slot in known]
            place = max(range(layer.kvm_sinks, len(known)), key=lambda n: scores[n])
            self.keys[place] = self.keys[place] + gate * keys[i]
            self.values[place] = self.values[place] + gate * value

    def read(self, queries, heads, token):
        """Take in a token, and answer its queries."""
        layer = self.layer
        size, num_chunks = layer.kvm_chunk_size, layer.kvm_window_chunks
        if self.num_read % size == 0 and self.num_read >= size * num_chunks:
            self.take_in(self.window[:size])
            self.window = self.window[size:]
        self.window.append(token)
        self.num_read += 1
        outputs = []
        for query, head in zip(queries, heads, strict=True):
            query = rotated(query, self.num_read - 1, layer.rope_dim) / HEAD**0.5
            scores, values = [], []
            for key_sum, value, length in zip(self.keys, self.values, self.lengths, strict=True):
                scores.append(layer.state_temperature[head] * query @ self.slot_key(key_sum))
                values.append(value / value.norm() * length)
            for place, (key, value, _) in enumerate(self.window):
                key = rotated(key, self.num_left + place, layer.rope_dim)
                scores.append(layer.window_temperature[head] * query @ key)
                values.append(value)
            outputs.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        return outputs


def token_by_token(layer, x):
    """The output `[B, T, hidden_size]`, and the slots and windows of each row and head."""
    all_outputs, memories = [], []
    for row in x:
        heads = [OneHead(layer) for _ in range(layer.num_kv_heads)]
        group = layer.num_heads // layer.num_kv_heads
        outputs = []
        for token in row:
            channels = (layer.qkv_proj.weight @ token).unflatten(0, (-1, HEAD))
            q, k, v = channels.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads])
            logits = layer.gate_proj.weight @ token
            gates = torch.where(logits > 0, 1 + logits, logits.exp())
            mixed = []
            for i, head in enumerate(heads):
                own = range(i * group, (i + 1) * group)
                queries = [norm(q[j], layer.q_norm) for j in own]
                mixed += head.read(queries, own, (norm(k[i], layer.k_norm), v[i], gates[i]))
            outputs.append(layer.o_proj.weight @ torch.cat(mixed))
        all_outputs.append(torch.stack(outputs))
        memories.append(heads)
    return torch.stack(all_outputs), memories


@pytest.mark.parametrize("num_tokens", [2, 7, 18])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kvm_norm_leak": False},
        {"num_slots": 3},
        {"num_slots": 12, "kvm_growth": "plateau", "kvm_sinks": 2},
        {"num_slots": 40, "kvm_growth": "plateau", "kvm_window_chunks": 1, "kvm_sinks": 0},
        {"num_slots": 9, "kvm_growth": "sqrt", "kvm_window_chunks": 3, "kvm_rope_dim": 2},
        {"kvm_rope_dim": 0, "kvm_chunk_size": 5},
    ],
    ids=str,
)
def test_the_layer_equals_the_rule_token_by_token(options, num_tokens):
    layer, x = make(**options), random_inputs(num_tokens).requires_grad_()
    o, _, cache = layer(x, use_cache=True)
    expected, memories = token_by_token(layer, x)
    state = cache.layers[0].state
    for row, head in itertools.product(range(2), range(2)):
        memory = memories[row][head]
        found = [state[name][row, head] for name in ("key_sum", "value_sum", "value_length", "keys", "gate")]
        lengths = [length[None] for length in memory.lengths]
        window = [[token[i] for token in memory.window] for i in (0, 2)]
        for tensor, parts in zip(found, (memory.keys, memory.values, lengths, *window), strict=True):
            assert len(tensor) == len(parts)
            if parts:
                torch.testing.assert_close(tensor, torch.stack(parts).reshape(tensor.shape))
    assert_alike_with_gradients([x, *layer.parameters()], [o, expected])


@pytest.mark.parametrize("growth", ["immediate", "plateau", "sqrt"])
@pytest.mark.parametrize(("num_slots", "size", "chunks"), [(4, 4, 2), (30, 4, 1), (900, 4, 3), (300, 64, 2)])
def test_the_slots_at_any_length_are_those_of_going_through_the_chunks(growth, num_slots, size, chunks):
    schedule = KVMSchedule(num_slots=num_slots, chunk_size=size, window_chunks=chunks, growth=growth)
    num_open = num_left = 0
    for num_tokens in range(1, 12 * size * chunks + 300):
        if num_tokens % size == 1 and num_tokens > size * chunks:
            num_left += size
            wanted = min(wanted_slots(growth, num_tokens - 1, num_slots), num_left)
            num_new = size if num_open == 0 else min(size, max(0, wanted - num_open))
            num_open += num_new
        assert schedule.num_left(num_tokens) == num_left
        assert schedule.num_open(num_tokens) == num_open
        assert schedule.num_kept(num_tokens) <= schedule.window_size


def test_sinks_stay_as_they_were_and_other_slots_do_not():
    layer = make(kvm_sinks=2, num_slots=4)
    with torch.no_grad():
        _, _, cache = layer(random_inputs(40), use_cache=True)
        before = cache.layers[0].state["key_sum"]
        _, _, cache = layer(random_inputs(60), past_key_values=cache)
    after = cache.layers[0].state["key_sum"]
    assert torch.equal(after[:, :, :2], before[:, :, :2])
    assert not torch.equal(after[:, :, 2:], before[:, :, 2:])


def test_with_enough_slots_nothing_is_merged_and_the_gate_does_nothing():
    layer, x = make(num_slots=40, kvm_growth="immediate"), random_inputs(40)
    with torch.no_grad():
        expected, _, cache = layer(x, use_cache=True)
        torch.nn.init.normal_(layer.gate_proj.weight)
        assert torch.equal(layer(x)[0], expected)
        layer.num_slots = 5
        layer.schedule = KVMSchedule.of(layer)
        assert not torch.equal(layer(x)[0], expected)
    # Each token of the past lies in a slot of its own, with its value.
    state = cache.layers[0].state
    assert state["value_sum"].shape[2] == 36
    torch.testing.assert_close(state["value_sum"].norm(dim=-1, keepdim=True), state["value_length"])


@pytest.mark.parametrize("leak", [True, False])
def test_only_with_the_leak_does_it_matter_at_which_position_slots_are_read(leak):
    """The same slots and the same window, read from later positions."""
    layer = make(kvm_norm_leak=leak, num_slots=3)
    x = random_inputs(12, rows=1)
    with torch.no_grad():
        _, _, cache = layer(x, use_cache=True)
        expected, _, _ = layer(x[:, :2], past_key_values=cache)
        _, _, cache = layer(x, use_cache=True)
        cache.layers[0].state["num_seen"] += 30
        found, _, _ = layer(x[:, :2], past_key_values=cache)
    assert torch.allclose(found, expected) != leak


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kvm_growth": "linear"}, r"kvm_growth: expected one of .*'sqrt'\), found 'linear'"),
        ({"kvm_window_chunks": 0}, "kvm_window_chunks: expected at least 1, found 0"),
        (
            {"kvm_sinks": 3},
            "expected 0 <= kvm_sinks < kvm_chunk_size <= num_slots, found kvm_sinks=3, kvm_chunk",
        ),
        ({"kvm_sinks": -1}, "found kvm_sinks=-1"),
        ({"num_slots": 2}, "kvm_chunk_size=3, num_slots=2"),
        ({"num_slots": 1, "kvm_chunk_size": None}, "kvm_sinks=1, kvm_chunk_size=1, num_slots=1"),
        ({"kvm_rope_dim": 3}, "kvm_rope_dim: expected an even number from 0 to below head_dim=8, found 3"),
        ({"kvm_rope_dim": 8}, "found 8"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_state_of_other_sizes_is_refused():
    x = random_inputs(30)
    _, _, cache = make(kvm_growth="immediate")(x, use_cache=True)
    with pytest.raises(
        ValueError, match=r"expected key_sum of shape \[2, 2, 5, 8\] in torch.float64 in the sl"
    ):
        make(num_slots=5, kvm_growth="immediate")(x, past_key_values=cache)
    with pytest.raises(
        ValueError, match="to hold the slots of KVM and a window of 2 chunks of 4, found the sl"
    ):
        make(kvm_chunk_size=4)(x, past_key_values=cache)


def test_a_row_taken_out_of_a_batch_keeps_only_what_it_needs_and_goes_on():
    layer, x = make(), random_inputs(40)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :21] = 0
    with torch.no_grad():
        _, _, cache = layer(x[:, :30], mask, use_cache=True)
        cache.batch_select_indices(torch.tensor([1]))
        _, _, alone = layer(x[1:, 21:30], use_cache=True)
        assert cache.nbytes == alone.nbytes == layer.state_bytes(9, torch.float64)
        for name, tensor in alone.layers[0].state.items():
            torch.testing.assert_close(cache.layers[0].state[name], tensor)
        mask = torch.cat([mask[1:], torch.ones(1, 10, dtype=torch.long)], dim=1)
        o, _, _ = layer(x[1:, 30:], mask, past_key_values=cache)
        torch.testing.assert_close(o, layer(x[1:, 30:], past_key_values=alone)[0])


def test_before_there_are_slots_their_weights_have_a_gradient_of_zero():
    layer = make()
    layer(random_inputs(4))[0].sum().backward()
    zero = {name for name, parameter in layer.named_parameters() if not parameter.grad.any()}
    assert zero == {"gate_proj.weight", "state_temperature", "state_norm.weight", "state_norm.bias"}


def test_the_published_sizes_are_the_defaults():
    layer = KVMAttention(256, num_heads=2)
    assert (layer.schedule.chunk_size, layer.kvm_window_chunks, layer.kvm_sinks) == (256, 2, 1)
    assert (layer.rope_dim, layer.kvm_growth, layer.kvm_norm_leak) == (64, "plateau", True)
    assert KVMAttention(32, num_heads=2, num_slots=64).schedule.chunk_size == 64


def test_tensors_are_made_where_the_inputs_are():
    layer, x = make(), random_inputs(23, rows=1)
    given = {"cu_seqlens": torch.tensor([0, 9, 23])}
    expected = layer(x)[0], layer(x, **given)[0]
    with torch.device("meta"):
        found = layer(x)[0], layer(x, **given)[0]
    assert all(map(torch.equal, found, expected))

"""What `layer_memory` says of a layer, against the op and against `slot_assignments` of the whole text."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovq.inspect import layer_memory, levels, read_weights, sharing
from ovq.inspect.layer import read_with
from ovq.ops import ovq_attention
from tests.inspect.common import kept_by_hand, recorded


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ablation": {"bias": "count+norm"}},
        {"ablation": {"rate": 0.3}},
        {"merge": "updated", "init": "random"},
        {"merge": "nearest"},
        {"merge": "nearest", "growth": "plateau", "ablation": {"bias": "count+norm"}},
        {"merge_gate": True, "merge": "nearest"},
        {"forget_gate": True, "merge": "nearest"},
        {"forget_gate": True, "merge_gate": True},
    ],
)
def test_weights_times_values_are_the_outputs_of_the_op(options):
    call = recorded(43, **options)
    if "log_forget" in call.options:
        # The op forgets so much, but not more.
        call.options["log_forget"][:, 1::7] = -1e6
    expected, _ = ovq_attention(call.q, call.k, call.v, scale=call.scale, **call.options)
    counts_for = call.options.get("token_weights", torch.ones(1, 43, 2))
    forgets = call.options.get("log_forget", torch.zeros(1, 43, 2))
    tensors = (call.q, call.k, call.v, counts_for, forgets)
    state, outputs = None, []
    for q, k, v, gate, logs in zip(*(x.split(5, 1) for x in tensors), strict=True):
        of_tokens = read_with(gate, logs, 5) if "log_forget" in call.options else None
        scoring = {"scale": call.scale, "bias": call.options["ablation"].bias, "log_weights": of_tokens}
        weights = read_weights(q[0], k[0], state, **scoring)
        values = v[0].transpose(0, 1)
        if state is not None:
            values = torch.cat([state.values[0, :, : int(state.num_open[0])], values], 1)
        outputs.append((weights @ values.repeat_interleave(2, 0)).transpose(0, 1))
        given = call.options | {"initial_state": state}
        if "token_weights" in given:
            given["token_weights"] = gate
        if "log_forget" in given:
            given["log_forget"] = logs
        _, state = ovq_attention(q, k, v, scale=call.scale, output_final_state=True, **given)
    assert torch.allclose(torch.cat(outputs), expected[0], atol=1e-5)


@pytest.mark.parametrize("gate", ["merge_gate", "forget_gate"])
def test_what_is_recounted_chunk_by_chunk_is_what_the_layer_kept(gate):
    call = recorded(43, merge="nearest", **{gate: True})
    told = []
    memory = layer_memory(call, layer=0, num_reads=3, progress=told.append)
    found = call.assignments()
    assert told == [*range(5, 41, 5), 43]
    assert np.array_equal(memory.final_slots, found.slots[0].numpy())
    assert np.allclose(memory.shares.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("merge", ["existing", "nearest"])
def test_what_is_read_of_the_tokens_behind_slots_is_the_output_of_the_op(merge):
    call = recorded(38, merge=merge)
    expected, _ = ovq_attention(call.q, call.k, call.v, scale=call.scale, **call.options)
    memory, found = layer_memory(call, layer=3, num_reads=12), call.assignments()
    for head in range(4):
        values = call.v[0, :, memory.kv_head(head)].numpy()
        for token in range(38):
            start = token - token % 5
            slots = found.after(start)[0, memory.kv_head(head)].numpy()
            o = np.zeros(6)
            for entry, weight in zip(memory.entries[head, token], memory.weights[head, token], strict=True):
                behind = values[slots == entry] if entry >= 0 else values[[-1 - entry]]
                o += weight * behind.mean(0) if weight else 0
            assert np.allclose(o, expected[0, token, head], atol=1e-5)


@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 20),
    st.sampled_from(["existing", "updated", "nearest"]),
    st.integers(0, 99),
)
@settings(max_examples=12)
def test_slots_and_moves_tell_where_tokens_are_at_any_time(num_tokens, chunk_size, num_slots, merge, seed):
    call = recorded(num_tokens, seed=seed, chunk_size=chunk_size, num_slots=num_slots, merge=merge)
    memory, found = layer_memory(call, layer=0, num_reads=2), call.assignments()
    places = np.full_like(memory.slots, -1)
    for chunk in range(memory.num_chunks(0)):
        before = places.copy()
        for _, head, slot, to in memory.moves[memory.moves[:, 0] == chunk]:
            assert merge == "nearest"
            places[head, before[head] == slot] = to
        now = memory.tokens(chunk)
        assert memory.merged_after(chunk, 0) == now.stop == (chunk + 1) * chunk_size
        places[:, now] = memory.slots[:, now]
        assert np.array_equal(places, found.after(now.stop)[0])
    assert np.array_equal(memory.final_slots, places)
    assert np.array_equal(memory.final_slots, found.slots[0])
    assert np.allclose(memory.shares.sum(-1), 1, atol=1e-5)


def test_what_is_kept_of_values_is_what_the_means_of_slots_give_back():
    call = recorded(41, merge="nearest")
    memory = layer_memory(call, layer=0, num_reads=1)
    for head in range(2):
        slots = memory.final_slots[head]
        assert memory.kept[head] == pytest.approx(kept_by_hand(call.v[0, :, head], slots), abs=1e-5)
        is_exact = [slot < 0 or (slots == slot).sum() == 1 for slot in slots]
        assert np.array_equal(memory.kept[head] == 1, is_exact)
        shown = sharing(memory, head)
        assert sum(shown.num_tokens) == 41
        assert shown.num_tokens[0] == 1
        assert shown.num_tokens[1] == sum((slots == slot).sum() == 1 for slot in range(7))
        assert shown.num_open == 7
        assert shown.kept_share == pytest.approx(memory.kept[head].mean(), abs=1e-6)
        assert shown.exact_share == sum(shown.num_tokens[:2]) / 41


def test_the_same_value_again_is_not_lost():
    call = recorded(40, merge="nearest")
    # Two values in turn, and keys that tell them apart.
    halves = [torch.arange(40) % 2 == i for i in (0, 1)]
    k, v = call.k.clone(), call.v.clone()
    for x in (k, v):
        for half in halves:
            x[:, half] = x[:, half][:, :1]
    # And one value alone, from which none differs.
    for values in (v, v[:, :1].expand_as(v)):
        memory = layer_memory(dataclasses.replace(call, k=k, v=values), layer=0, num_reads=1)
        assert memory.counts().max() > 4
        assert (memory.kept == 1).all()


def test_nothing_is_kept_of_a_token_without_weight():
    call = recorded(41, merge="nearest", merge_gate=True, num_slots=64)
    call.options["token_weights"][:, 3] = 0
    memory = layer_memory(call, layer=0, num_reads=1)
    assert ((memory.kept < 1) == (np.arange(41) == 3)).all()


def test_weights_on_slots_of_one_token_and_of_several():
    call = recorded(30, num_slots=3)
    memory = layer_memory(call, layer=0, num_reads=8)
    found = call.assignments()
    for head in range(4):
        for token in range(30):
            slots = found.after(token - token % 5)[0, memory.kv_head(head)]
            expected = np.zeros(3)
            for entry, weight in zip(memory.entries[head, token], memory.weights[head, token], strict=True):
                kind = 0 if entry < 0 else 1 if (slots == entry).sum() == 1 else 2
                expected[kind] += weight
            assert np.allclose(memory.shares[head, token], expected, atol=1e-6)


def test_what_cannot_be_recounted_is_refused():
    call = recorded(12)
    two = dataclasses.replace(call, **{x: getattr(call, x).repeat(2, 1, 1, 1) for x in "qkv"})
    with pytest.raises(ValueError, match="expected a call of one row, found 2"):
        layer_memory(two, layer=0, num_reads=1)
    _, state = ovq_attention(
        call.q, call.k, call.v, scale=call.scale, output_final_state=True, **call.options
    )
    for name, value in (("initial_state", state), ("attention_mask", torch.ones(1, 12))):
        with pytest.raises(ValueError, match=r"expected a call (that begins|without padding)"):
            layer_memory(
                dataclasses.replace(call, options={**call.options, name: value}), layer=0, num_reads=1
            )
    with pytest.raises(ValueError, match="num_reads: expected an integer of at least 1, found 0"):
        layer_memory(call, layer=0, num_reads=0)


def test_levels_go_from_sharp_to_blurred():
    counts = np.array([0, 1, 2, 4, 5, 16, 17, 64, 65, 9999, -1])
    assert levels(counts).tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]

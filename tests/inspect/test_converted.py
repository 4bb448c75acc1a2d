"""What `converted_memories` says of a converted model, against what its modules compute and its cache has."""

import numpy as np
import pytest
import torch

from ovq.inspect import DROPPED, EXACT, LEVEL_NAMES, converted_memories, inspect_text, sharing
from tests.convert.common import converted, original
from tests.inspect.common import kept_by_hand

IDS = torch.arange(150)[None] * 17 % 64
# Not more tokens than the model was trained on: what is brought nearer is no mean of its tokens any more.
SHORT = IDS[:, :48]


def watched(model, ids):
    """The memories, and by layer the values `[Hkv, T, V]` and the outputs `[H, T, V]` of its attention."""
    values, outputs, hooks = [], [], []

    def keep(to, x, heads):
        to.append(x[0].unflatten(-1, (heads, 8)).transpose(0, 1))

    for block in model.model.layers:
        attention = block.self_attn
        hooks.append(attention.v_proj.register_forward_hook(lambda _, __, out: keep(values, out, 2)))
        hooks.append(attention.o_proj.register_forward_pre_hook(lambda _, args: keep(outputs, args[0], 4)))
    memories = converted_memories(model, ids, num_reads=64)
    for hook in hooks:
        hook.remove()
    return memories, values, outputs


def places_before(memory, kv_head, num_read):
    """The slot of each token once a head has read some tokens, from `slots` and `moves`."""
    places = np.full(memory.num_tokens, EXACT)
    for chunk in range(memory.num_chunks(kv_head)):
        if memory.merged_after(chunk, kv_head) > num_read:
            break
        before = places.copy()
        for at, head, slot, to in memory.moves:
            if (at, head) == (chunk, kv_head):
                places[before == slot] = to
        places[memory.tokens(chunk)] = memory.slots[kv_head, memory.tokens(chunk)]
    return places


def test_what_is_read_of_the_tokens_behind_slots_is_the_output_of_the_attention():
    memories, values, outputs = watched(converted(), SHORT)
    for memory, of_tokens, expected in zip(memories, values, outputs, strict=True):
        kept = [kept_by_hand(*each) for each in zip(of_tokens, memory.final_slots, strict=True)]
        assert np.allclose(memory.kept, kept, atol=1e-5)
        for head in range(4):
            kv_head = memory.kv_head(head)
            for token in range(48):
                places = places_before(memory, kv_head, token)
                o = torch.zeros(8)
                for entry, weight in zip(
                    memory.entries[head, token], memory.weights[head, token], strict=True
                ):
                    if weight == 0:
                        continue
                    behind = np.nonzero(places == entry)[0] if entry >= 0 else [-1 - entry]
                    # What is kept exactly is in no slot.
                    assert entry >= 0 or places[-1 - entry] == EXACT
                    o += float(weight) * of_tokens[kv_head, behind].mean(0)
                assert torch.allclose(o, expected[head, token], atol=1e-5), (head, token)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_memories_are_those_of_an_ordinary_call(kind):
    model = converted(kind)
    memories = converted_memories(model, IDS, num_reads=4)
    cache = model.make_cache()
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    for memory, layer in zip(memories, cache.layers, strict=True):
        assert (memory.num_sinks, memory.chunk_size) == (2, 8)
        assert np.allclose(memory.shares.sum(-1), 1, atol=1e-5)
        for of_heads in layer.memories:
            for i, head in enumerate(of_heads.budget.heads):
                budget = of_heads.budget
                assert (memory.num_slots[head], memory.num_exact[head]) == (
                    budget.num_slots,
                    budget.num_exact,
                )
                num_merged = memory.num_chunks(head) * 8
                assert num_merged == of_heads.num_merged[0]
                slots = memory.final_slots[head]
                assert (slots == EXACT).sum() == 150 - num_merged == of_heads.filled[0]
                assert (slots[:2] == EXACT).all()
                if not budget.num_slots:
                    assert (slots == DROPPED).sum() == num_merged
                    assert (memory.kept[head] == (slots == EXACT)).all()
                    assert (memory.counts()[head] == np.where(slots == DROPPED, -1, 0)).all()
                    shown = sharing(memory, head)
                    assert shown.kept_share == shown.exact_share == (150 - num_merged) / 150
                    continue
                found = np.bincount(slots[slots >= 0], minlength=budget.num_slots)
                # What was brought nearer counts for fewer tokens; up to 7 stay as they are.
                expected = of_heads.state.count[0, i].numpy()
                assert ((found == expected) | ((expected < found) & (found > 7))).all()
                assert (memory.kept[head][found[slots] == 1] == 1).all()


def test_how_a_text_is_read_does_not_depend_on_who_looks():
    model = converted()
    with torch.no_grad():
        expected = model.base_model(IDS).last_hidden_state
    heard = []
    hook = model.base_model.norm.register_forward_hook(lambda _, __, out: heard.append(out))
    told = []
    converted_memories(model, IDS, num_reads=1, progress=told.append)
    hook.remove()
    assert torch.allclose(heard[0], expected, atol=1e-4)
    assert told == sorted(told)
    assert told[-1] == 2 * 150


def test_a_model_without_a_memory_is_refused():
    with pytest.raises(ValueError, match="expected an OVQForCausalLM or a model converted by"):
        inspect_text(original(), [1, 2], ["a", "b"])
    with pytest.raises(ValueError, match=r"ids: expected token ids from 0 to \d+, found -1"):
        inspect_text(converted(), [1, -1], ["a", "b"])
    with pytest.raises(ValueError, match="ids: expected token ids from 0 to 63, found 64"):
        inspect_text(converted(), [1, 64], ["a", "b"])
    with pytest.raises(ValueError, match="num_reads: expected an integer of at least 1, found 0"):
        inspect_text(converted(), [1], ["a"], num_reads=0)
    with pytest.raises(ValueError, match="num_slots: expected at most 32,767, found 40,000"):
        inspect_text(converted(num_slots=[[16, 0], [8, 40_000]]), [1], ["a"])
    found = inspect_text(converted(), [1], ["a"])
    assert (found.merge, found.num_layers, found.layer(None).layer) == ("nearest", 2, 1)
    assert found.layer(None).final_slots.tolist() == [[EXACT]] * 2
    assert found.level_names == LEVEL_NAMES[:-1]

"""States in blocks equal the states that the op returns, whatever the blocks held before."""

import random

import pytest
import torch

from ovq.hf import OVQConfig
from ovq.hf.block import build_mixer
from ovq.layers import LayerCache
from ovq.layers.memory import num_bytes
from ovq_vllm.state import StateBlocks, block_spec, hosts
from ovq_vllm.step import Group

from .conftest import SIZES

GATES = [
    {},
    {"merge_gate": True},
    {"forget_gate": True},
    {"merge": "nearest", "merge_gate": True},
    {"merge": "nearest", "state_dtype": "int8"},
    {"forget_gate": True, "state_dtype": "bfloat16"},
]
NUM_BLOCKS = 6


def group_of(blocks, num_seen, lengths, block_size=1_000_000):
    return Group(
        blocks=torch.tensor(blocks),
        block_ids=tuple(blocks),
        num_seen=tuple(num_seen),
        lengths=tuple(lengths),
        block_size=block_size,
        tokens=torch.arange(sum(lengths)),
        is_packed=max(lengths) > 1,
    )


@pytest.mark.parametrize("gates", GATES, ids=str)
@torch.no_grad()
def test_requests_that_come_and_go(gates):
    torch.manual_seed(0)
    random.seed(0)
    config = OVQConfig(**SIZES | {"num_slots": 20, "chunk_size": 5, "conv_size": 0} | gates)
    mixer = build_mixer(config, 1).eval()
    # What is left in a block must not matter.
    views = {
        name: torch.full((NUM_BLOCKS, *shape), 3).to(dtype)
        for name, (shape, dtype) in block_spec(config, torch.float32).items()
    }
    blocks = StateBlocks(mixer, views)
    running = {}
    for step in range(150):
        for block in range(NUM_BLOCKS):
            if block not in running and random.random() < 0.2:
                running[block] = LayerCache(mixer.memory)
            elif block in running and random.random() < 0.03:
                del running[block]
        own = [block for block in running if step % 20 < 15 or random.random() < 0.5]
        if not own:
            continue
        lengths = [random.choice([1, 2, 5, 11]) if step % 10 == 0 else 1 for _ in own]
        inputs = torch.randn(sum(lengths), config.hidden_size)
        expected = []
        group = group_of(own, [running[block].num_columns for block in own], lengths)
        for block, x in zip(own, inputs.split(lengths), strict=True):
            expected.append(mixer(x[None], past_key_values=_holder(running[block]))[0][0])
        cache = LayerCache(mixer.memory)
        cache.state = blocks.read(group)
        x = group.take(inputs)
        o = mixer.mix(mixer.qkv_proj(x), x, group.layout(not group.is_packed), cache)
        blocks.write(group, cache.state)
        # The last digit of a product may decide how a narrow sum is rounded.
        atol = 1e-3 if "state_dtype" in gates else 1e-5
        torch.testing.assert_close(mixer.o_proj(o.flatten(0, 1)), torch.cat(expected), atol=atol, rtol=1e-4)


def _holder(cache):
    """A model cache with a single layer cache, at the mixer's index."""
    return type("Holder", (), {"layers": [None, cache], "get_seq_length": cache.get_seq_length})()


@pytest.mark.parametrize("by", ["its prompt", "a copy"])
@torch.no_grad()
def test_a_block_gets_the_state_of_another_request_that_has_read_as_much(by):
    torch.manual_seed(0)
    config = OVQConfig(**SIZES | {"num_slots": 20, "chunk_size": 5, "conv_size": 0})
    mixer = build_mixer(config, 1).eval()
    spec = block_spec(config, torch.float32)
    views = {name: torch.zeros(2, *shape, dtype=kind) for name, (shape, kind) in spec.items()}
    blocks = StateBlocks(mixer, views)

    def read(block, num_seen, length):
        """The state after some more tokens of a request."""
        group, cache = group_of([block], [num_seen], [length], block_size=7), LayerCache(mixer.memory)
        cache.state = blocks.read(group)
        x = group.take(torch.randn(length, config.hidden_size))
        mixer.mix(mixer.qkv_proj(x), x, group.layout(not group.is_packed), cache)
        blocks.write(group, cache.state)
        return cache.state.key_sum

    if by == "a copy":
        expected = read(1, 0, 7)
    read(0, 0, 6)
    first = read(0, 6, 1)
    if by == "a copy":
        # As vLLM does where prompts begin alike.
        for view in views.values():
            view[0] = view[1]
    else:
        expected = read(0, 0, 7)
    assert not torch.equal(first, expected)
    torch.testing.assert_close(blocks.read(group_of([0], [7], [1])).key_sum, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [*GATES, {"num_slots": 7, "head_dim": 6, "chunk_size": 3}], ids=str)
def test_every_tensor_of_a_block_lies_aligned(fields, dtype):
    spec = block_spec(OVQConfig(**SIZES | fields), dtype)
    offset = 0
    for shape, kind in spec.values():
        assert offset % kind.itemsize == 0
        offset += num_bytes({"": (shape, kind)})
    assert offset % 8 == 0


@pytest.mark.parametrize(
    ("mixers", "expected"),
    [("oooo", {0}), ("soso", {0, 1}), ("ssso", {0, 1, 2, 3}), ("ssoso", {0, 1, 2}), ("ososso", {0, 1})],
)
def test_room_for_what_other_layers_keep(mixers, expected):
    names = [{"o": "ovq", "s": "sliding_attention"}[mixer] for mixer in mixers]
    places = hosts(names)
    # No two layers have the same one.
    assert len(set(places)) == len(names)
    assert {index for _, index in places} == expected
    assert all(names[host] == "ovq" for host, _ in places)


def test_layers_with_a_state_of_constant_size_have_room_for_it():
    names = ["mamba2", "ovq", "gated_deltanet", "ovq", "mamba2"]
    config = OVQConfig(**SIZES | {"mixer_types": names, "num_hidden_layers": 5})
    spec = block_spec(config, torch.bfloat16)
    for i, index in ((0, 1), (2, 1), (4, 2)):
        mixer = build_mixer(config, i)
        for name, part in mixer.state_spec(1, torch.bfloat16).items():
            assert spec[f"{type(mixer).__name__}.{name}.{index}"] == part

"""States in blocks are those that the op would have kept, whatever the blocks held before."""

import random

import pytest
import torch

from ovq.hf import OVQConfig
from ovq.hf.block import build_mixer
from ovq.layers import LayerCache
from ovq.layers.memory import num_bytes
from ovq_vllm.state import StateBlocks, block_spec, guests_per_host
from ovq_vllm.step import Group

from .conftest import SIZES

GATES = [{}, {"merge_gate": True}, {"forget_gate": True}, {"merge": "nearest", "merge_gate": True}]
NUM_BLOCKS = 6


def group_of(blocks, num_seen, lengths):
    return Group(
        blocks=torch.tensor(blocks),
        block_ids=tuple(blocks),
        num_seen=tuple(num_seen),
        lengths=tuple(lengths),
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
        torch.testing.assert_close(mixer.o_proj(o.flatten(0, 1)), torch.cat(expected), atol=1e-5, rtol=1e-4)


def _holder(cache):
    """A cache of a single layer, at the place of the mixer."""
    return type("Holder", (), {"layers": [None, cache], "get_seq_length": cache.get_seq_length})()


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
    [("oooo", 0), ("soso", 1), ("ssso", 3), ("ssoso", 2), ("ososso", 1)],
)
def test_room_for_the_convolutions_of_other_layers(mixers, expected):
    names = [{"o": "ovq", "s": "sliding_attention"}[mixer] for mixer in mixers]
    config = OVQConfig(**SIZES | {"mixer_types": names, "num_hidden_layers": len(names)})
    assert guests_per_host(config) == expected

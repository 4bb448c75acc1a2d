"""Requests keep their memories from step to step and across pauses, whatever the blocks held before."""

import random

import torch

from ovq.hf.cache import CACHE_KEY
from ovq_vllm.memories import Block, Memories

from .test_state import NUM_BLOCKS, group_of


@torch.no_grad()
def test_requests_that_come_wait_and_go(saved):
    torch.manual_seed(0)
    random.seed(0)
    model = saved(family="llama").model

    def read(tokens, num_read, cache):
        places = num_read + torch.arange(tokens.shape[1])
        return model(tokens, position_ids=places.expand(len(tokens), -1), **{CACHE_KEY: cache}).logits

    like = model.make_cache()
    read(torch.tensor([[1]]), torch.zeros(1, 1, dtype=torch.int64), like)
    memories = Memories(model.make_cache, Block(like))
    blocks = torch.full((NUM_BLOCKS, memories.block.num_bytes), 3, dtype=torch.uint8)
    running, num_joined = {}, 0
    for step in range(80):
        for number in range(NUM_BLOCKS):
            if number not in running and random.random() < 0.2:
                running[number] = model.make_cache(), 0
            elif number in running and random.random() < 0.03:
                del running[number]
        own = [number for number in running if step % 20 < 15 or random.random() < 0.5]
        if not own:
            continue
        random.shuffle(own)
        lengths = [random.choice([1, 2, 30, 200]) if not running[n][1] or step % 10 == 0 else 1 for n in own]
        tokens = torch.randint(0, model.config.vocab_size, (sum(lengths),))
        expected, found = [], torch.empty(len(tokens), model.config.vocab_size)
        for number, own_tokens in zip(own, tokens.split(lengths), strict=True):
            cache, num_read = running[number]
            expected.append(read(own_tokens[None], torch.tensor([[num_read]]), cache)[0])
        group = group_of(own, [running[number][1] for number in own], lengths)
        places = torch.cat([torch.arange(n) + seen for n, seen in zip(lengths, group.num_seen, strict=True)])
        for rows, cache in memories.calls([group], blocks):
            found[rows] = read(tokens[rows], places[rows[:, :1]], cache)
            num_joined += len(rows) > 1
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)
        for number, length in zip(own, lengths, strict=True):
            running[number] = running[number][0], running[number][1] + length
    assert num_joined > 20


@torch.no_grad()
def test_a_complete_block_that_another_request_gets(saved):
    torch.manual_seed(0)
    model = saved(family="llama").model
    like = model.make_cache()
    model(torch.tensor([[1]]), **{CACHE_KEY: like})
    memories = Memories(model.make_cache, Block(like))
    blocks = torch.zeros(2, memories.block.num_bytes, dtype=torch.uint8)
    prompts = torch.randint(0, model.config.vocab_size, (2, 50))

    def read(row, block, num_seen):
        """The logits of the next 25 tokens of a prompt."""
        tokens = prompts[row, num_seen : num_seen + 25]
        group = group_of([block], [num_seen], [25], block_size=25)
        calls = memories.calls([group], blocks)
        (logits,) = [
            model(tokens[rows], position_ids=num_seen + rows, **{CACHE_KEY: cache}).logits
            for rows, cache in calls
        ]
        return logits

    read(1, 1, 0)
    read(0, 0, 0)
    # Now block 0 has what vLLM has copied for the other prompt.
    blocks[0] = blocks[1]
    torch.testing.assert_close(read(1, 0, 25), model(prompts[1:]).logits[:, 25:], atol=1e-4, rtol=1e-4)


def test_a_block_is_as_large_as_what_a_row_keeps(saved):
    # Budgets that differ take no room for the largest of them.
    model = saved(family="llama").model
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.tensor([[1]]), **{CACHE_KEY: cache})
    num_tensors = sum(len(layer.parts()) for layer in cache.layers)
    assert 0 <= Block(cache).num_bytes - cache.nbytes < 8 * num_tensors

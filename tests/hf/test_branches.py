"""Taking steps back and joining caches, in a whole model; `test_rows.py` is about a running batch."""

import pytest
import torch

from ovq.hf import OVQCache
from tests.hf.common import BASELINES, make_model, random_ids

STREAMS = random_ids(6, 80, seed=11)


@pytest.fixture(scope="module", params=["rope on the window", "rope everywhere", "baselines"])
def model(request):
    if request.param == "rope on the window":
        return make_model()
    if request.param == "baselines":
        return make_model(**BASELINES)
    return make_model(rope_mixers=["sliding_attention", "full_attention", "ovq"])


@torch.no_grad()
def read(model, cache, ids, mask=None):
    return model(ids, mask, past_key_values=cache).logits


def start(model, row, length):
    cache = OVQCache(model.config)
    read(model, cache, STREAMS[row, None, :length])
    return cache


@pytest.mark.parametrize("num_rejected", [1, 9])
def test_a_snapshot_takes_rejected_steps_back_bit_for_bit(model, num_rejected):
    """Speculation: propose tokens, reject them, go on from the snapshot as if they had never been."""
    cache = start(model, 0, 14)
    never_rejected = start(model, 0, 14)
    # Across the end of a chunk.
    for t in range(14, 18):
        before = cache.snapshot()
        for step in range(num_rejected):
            read(model, cache, STREAMS[1, None, t + step : t + step + 1])
        assert cache.get_seq_length() == before.get_seq_length() + num_rejected
        cache = before
        logits = read(model, cache, STREAMS[0, None, t : t + 1])
        assert torch.equal(logits, read(model, never_rejected, STREAMS[0, None, t : t + 1]))
    assert cache.get_seq_length() == 18


def test_branches_that_advance_in_turns_do_not_meet(model):
    """They share the buffers of pending tokens until the first of them writes where the other would."""
    caches = [start(model, 0, 13)]
    caches += [caches[0].snapshot(), caches[0].snapshot()]
    texts = torch.cat([STREAMS[:1, :13].expand(3, -1), STREAMS[:3, 13:22]], 1)
    alone = [model(text[None], use_cache=False).logits for text in texts]
    for t in range(13, 22):
        for row, cache in enumerate(caches):
            logits = read(model, cache, STREAMS[row, None, t : t + 1])
            torch.testing.assert_close(logits, alone[row][:, t : t + 1])


def test_a_snapshot_survives_whatever_happens_to_the_cache(model):
    cache = OVQCache(model.config)
    read(model, cache, STREAMS[:3, :14])
    before, third = cache.snapshot(), cache.snapshot()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    read(model, cache, STREAMS[[2, 0, 1], 14:15])
    cache.batch_select_indices(torch.tensor([1]))
    read(model, cache, STREAMS[0, None, 15:40])
    cache.reset()
    again = before.snapshot()
    expected = model(STREAMS[:3, :24]).logits[:, 14:]
    assert torch.equal(read(model, before, STREAMS[:3, 14:24]), read(model, again, STREAMS[:3, 14:24]))
    torch.testing.assert_close(read(model, third, STREAMS[:3, 14:24]), expected)


def test_caches_that_are_joined_stay_as_they_are(model):
    caches = [start(model, 0, 9), start(model, 1, 4)]
    twins = [start(model, 0, 9), start(model, 1, 4)]
    joined = OVQCache.concatenate(caches, model.config)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :5] = 0
    read(model, joined, STREAMS[:2, 9:10], mask)
    for row, (cache, twin) in enumerate(zip(caches, twins, strict=True)):
        ids = STREAMS[row, None, 20:30]
        assert torch.equal(read(model, cache, ids), read(model, twin, ids))


def test_a_forgotten_mask_over_joined_rows_is_refused(model):
    joined = OVQCache.concatenate([start(model, 0, 9), start(model, 1, 4)], model.config)
    with pytest.raises(ValueError, match="some of the cached ones are padding; found none"):
        read(model, joined, STREAMS[:2, :1])
    alike = OVQCache.concatenate([start(model, 0, 9), start(model, 1, 9)], model.config)
    torch.testing.assert_close(
        read(model, alike, STREAMS[:2, 9:12]), model(STREAMS[:2, :12], use_cache=False).logits[:, 9:]
    )


def test_what_cannot_be_joined_is_refused(model):
    with pytest.raises(ValueError, match=r"at least one column, found lengths \[\]"):
        OVQCache.concatenate([], model.config)
    with pytest.raises(ValueError, match=r"at least one column, found lengths \[9, 0\]"):
        OVQCache.concatenate([start(model, 0, 9), OVQCache(model.config)], model.config)


def test_num_rows(model):
    cache = OVQCache(model.config)
    assert cache.num_rows == 0
    read(model, cache, STREAMS[:3, :5])
    assert cache.num_rows == 3
    cache.batch_repeat_interleave(2)
    assert cache.num_rows == 6

"""Rows of a converted model that join and leave: each reads what it would read alone, in constant memory."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovq.convert import MemoryCache, build_context
from ovq.hf.cache import CACHE_KEY
from ovq.hf.rows import Rows
from tests.convert.common import converted, tokens

MODELS = {kind: converted(kind).double() for kind in ("llama", "qwen3")}
STREAMS = tokens(4, 110, seed=5)


@functools.cache
def expected(name):
    """The logits of every prefix of every stream, `[4, 110, V]`."""
    with torch.no_grad():
        return MODELS[name](STREAMS, use_cache=False).logits


def check(name, logits, streams, lengths):
    for row, stream, length in zip(logits, streams, lengths, strict=True):
        torch.testing.assert_close(row, expected(name)[stream, length - 1])


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3)
@given(data=st.data())
@torch.inference_mode()
def test_rows_read_what_each_reads_alone(name, data):
    model, rows, streams = MODELS[name], None, []
    for _ in range(3):
        newcomers = data.draw(
            st.lists(st.tuples(st.integers(0, 3), st.integers(1, 45)), min_size=1, max_size=2)
        )
        parts = [] if rows is None else [rows]
        for stream, length in newcomers:
            parts.append(Rows.start(model))
            check(name, parts[-1].read(STREAMS[stream, None, :length]), [stream], [length])
            streams.append(stream)
        rows = Rows.joined(parts)
        for num_new in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)):
            ids = [STREAMS[s, n : n + num_new].tolist() for s, n in zip(streams, rows.lengths, strict=True)]
            check(name, rows.read(ids), streams, rows.lengths)
        places = data.draw(st.lists(st.integers(0, len(streams) - 1), min_size=1, max_size=2))
        rows.keep(places)
        streams = [streams[place] for place in places]
    one = Rows.start(model)
    one.read([[1]])
    assert rows.nbytes == len(rows) * one.nbytes


@torch.inference_mode()
def test_a_row_goes_on_from_a_context_beside_rows_without_one():
    model = MODELS["llama"]
    context = build_context(model, STREAMS[0, :70])
    short = Rows.start(model)
    short.read(STREAMS[1:2, :3])
    rows = Rows.joined([short, Rows.start(model, context)])
    for _ in range(2):
        # Using a context does not change it.
        alone = Rows.start(model, context)
        check("llama", alone.read(STREAMS[:1, 70:75]), [0], [75])
    check("llama", rows.read([STREAMS[1, 3:20].tolist(), STREAMS[0, 70:87].tolist()]), [1, 0], [20, 87])


@torch.no_grad()
def test_joined_caches_can_be_read_with_a_mask():
    model, caches = MODELS["llama"], []
    for stream, length in ((0, 60), (1, 7)):
        caches.append(model.make_cache())
        model(STREAMS[stream, None, :length], **{CACHE_KEY: caches[-1]})
    joined = MemoryCache.concatenate(caches)
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, :53] = 0
    ids = torch.stack([STREAMS[0, 60:70], STREAMS[1, 7:17]])
    places = torch.tensor([[60], [7]]) + torch.arange(10)
    logits = model(ids, attention_mask=mask, position_ids=places, **{CACHE_KEY: joined}).logits
    check("llama", logits[:, -1], [0, 1], [70, 17])
    # The parts go on by themselves.
    assert [cache.get_seq_length() for cache in caches] == [60, 7]
    logits = model(STREAMS[:1, 60:80], **{CACHE_KEY: caches[0]}).logits
    check("llama", logits[:, -1], [0], [80])


def test_caches_that_do_not_fit_are_refused():
    model = MODELS["llama"]
    with pytest.raises(ValueError, match=r"read at least one column, found lengths \[\]"):
        MemoryCache.concatenate([])
    with pytest.raises(ValueError, match=r"read at least one column, found lengths \[0\]"):
        MemoryCache.concatenate([model.make_cache()])
    caches = []
    for other in (model, converted(num_sinks=4).double()):
        caches.append(other.make_cache())
        other(STREAMS[:1, :3], **{CACHE_KEY: caches[-1]})
    with pytest.raises(ValueError, match="memories of different sizes or settings"):
        MemoryCache.concatenate(caches)


@torch.no_grad()
def test_a_cache_goes_on_after_its_model_was_cast():
    model, streams = converted().double(), STREAMS[:2]
    # Rows that merge at different tokens.
    mask = torch.arange(110) >= torch.tensor([[0], [5]])
    expected, cache = model(streams, mask, use_cache=False).logits, model.make_cache()
    model(streams[:, :50], mask[:, :50], **{CACHE_KEY: cache})
    found = model.float()(streams[:, 50:], mask, **{CACHE_KEY: cache}).logits
    torch.testing.assert_close(found.double(), expected[:, 50:], atol=1e-3, rtol=0)


@torch.no_grad()
def test_rows_of_other_lengths_are_read_under_autocast():
    """It computes values in bfloat16, and keys in float32."""
    model, mask = converted(), torch.arange(110) >= torch.tensor([[0], [5]])
    with torch.autocast("cpu", torch.bfloat16):
        found = model(STREAMS[:2], mask).logits
        # Rows of their own, padded as well, as rounding depends on positions.
        alone = [model(STREAMS[row, None], mask[row, None]).logits for row in range(2)]
    torch.testing.assert_close(found[mask], torch.cat(alone)[mask], atol=0.05, rtol=0)

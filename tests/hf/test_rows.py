"""Rows at different places of different texts: each reads what it would read alone, in flat memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovq.hf import OVQCache, build_context
from ovq.hf.rows import Rows
from tests.hf.common import BASELINES, make_model, random_ids

STREAMS = random_ids(6, 120, seed=11)
MODELS = {
    "rope on the window": make_model(),
    "rope everywhere": make_model(rope_mixers=["sliding_attention", "full_attention", "ovq"]),
    "baselines": make_model(**BASELINES),
    "window and ovq": make_model(mixer_types=["sliding_attention", "ovq"], num_hidden_layers=2),
    "window and ovq, rope on both": make_model(
        mixer_types=["sliding_attention", "ovq"],
        num_hidden_layers=2,
        rope_mixers=["sliding_attention", "ovq"],
    ),
    "window and ovq, log-n": make_model(
        mixer_types=["sliding_attention", "ovq"], num_hidden_layers=2, logn_length=8
    ),
    "ovq": make_model(mixer_types=["ovq"], num_hidden_layers=1, merge="nearest"),
}
EXPECTED = {}


def expected(name):
    """The logits of every prefix of every stream, `[6, 120, V]`."""
    if name not in EXPECTED:
        with torch.no_grad():
            EXPECTED[name] = MODELS[name](STREAMS, use_cache=False).logits
    return EXPECTED[name]


class Batch:
    """Rows, and which stream each of them reads."""

    def __init__(self, name):
        self.name, self.model, self.rows, self.streams = name, MODELS[name], None, []

    @torch.inference_mode()
    def join(self, newcomers):
        parts = [] if self.rows is None else [self.rows]
        for stream, length in newcomers:
            part = Rows.start(self.model)
            self.check(part.read(STREAMS[stream, None, :length]), [stream], [length])
            parts.append(part)
            self.streams.append(stream)
        self.rows = Rows.joined(parts)

    def keep(self, places):
        self.rows.keep(places)
        self.streams = [self.streams[place] for place in places]

    @torch.inference_mode()
    def step(self):
        lengths = [length + 1 for length in self.rows.lengths]
        ids = [[int(STREAMS[s, n - 1])] for s, n in zip(self.streams, lengths, strict=True)]
        self.check(self.rows.read(ids), self.streams, lengths)

    def check(self, logits, streams, lengths):
        for row, stream, length in zip(logits, streams, lengths, strict=True):
            torch.testing.assert_close(row, expected(self.name)[stream, length - 1])


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2)
@given(data=st.data())
def test_rows_read_what_each_reads_alone(name, data):
    batch = Batch(name)
    newcomer = st.tuples(st.integers(0, 5), st.integers(1, 40))
    batch.join(data.draw(st.lists(newcomer, min_size=1, max_size=3)))
    for _ in range(3):
        for _ in range(data.draw(st.integers(1, 12))):
            batch.step()
        places = st.integers(0, len(batch.streams) - 1)
        batch.keep(data.draw(st.lists(places, min_size=1, max_size=3)))
        batch.join(data.draw(st.lists(newcomer, max_size=2)))
    batch.step()


@torch.inference_mode()
def test_a_batch_that_never_ends_stays_small():
    """There is always a row that is still reading, and still neither masks nor keys pile up."""
    model = make_model()  # with full attention, which keeps every column that a row has
    sizes, rows = [], None
    for turn in range(26):
        newcomer = Rows.start(model)
        newcomer.read(STREAMS[turn % 6, None, :9])
        rows = newcomer if rows is None else Rows.joined([rows, newcomer])
        rows.keep(range(max(0, len(rows) - 3), len(rows)))
        for _ in range(7):
            rows.read([[1]] * len(rows))
        sizes.append((rows.nbytes, rows._cache.get_seq_length()))
    assert max(rows.lengths) == 30
    # Twice what is needed and a little more, and not the 182 columns that were read.
    most = 2 * 30 + 64
    assert max(columns for _, columns in sizes) <= most
    assert max(nbytes for nbytes, _ in sizes) <= 3 * model.state_bytes(most)


@pytest.mark.parametrize("name", MODELS)
def test_what_only_a_row_that_left_needed_is_dropped(name):
    batch = Batch(name)
    batch.join([(0, 110), (1, 3)])
    assert batch.rows._cache.get_seq_length() in (110, 4, 3)
    batch.keep([1])
    # Full attention keeps what the row has read; no other mixer keeps more than a window.
    assert batch.rows._cache.get_seq_length() <= 4
    for _ in range(9):
        batch.step()
    batch.join([(2, 30)])
    for _ in range(3):
        batch.step()


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("window and ovq")])
@torch.inference_mode()
def test_a_long_context_needs_no_long_mask(name):
    model = MODELS[name]
    document = random_ids(1, 600)[0]
    context = build_context(model, document)
    rows = Rows.joined([Rows.start(model, context), Rows.start(model, context)])
    short = Rows.start(model)
    short.read(STREAMS[:1, :2])
    rows = Rows.joined([rows, short])
    assert rows.lengths == [600, 600, 2]
    with pytest.raises(ValueError, match="parts: expected at least one, found none"):
        Rows.joined([])
    assert rows._cache.get_seq_length() < 80
    prompts = random_ids(3, 5, seed=4)
    logits = rows.read(prompts)
    for row, context_ids in ((0, document), (2, STREAMS[0, :2])):
        text = torch.cat([context_ids, prompts[row]])[None]
        torch.testing.assert_close(logits[row], model(text, use_cache=False).logits[0, -1])


@torch.inference_mode()
def test_one_call_for_a_token_counts_what_was_dropped():
    model = make_model(mixer_types=["sliding_attention", "ovq"], num_hidden_layers=2, logn_length=8).float()
    rows, ids = Rows.start(model), random_ids(1, 200)
    rows.read(ids[:, :196])
    assert rows._cache.get_seq_length() < 80
    for token in ids[:, 196:].split(1, 1):
        logits = rows.read(token)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, -1], rtol=1e-3, atol=1e-3)


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="lengths: expected one for each of 0 rows, found 1 of them"):
        OVQCache(make_model().config).shorten([3])


@torch.no_grad()
def test_tokens_of_another_number_of_rows_are_refused():
    """Also by rows that have read nothing, whose cache would take any number."""
    rows = Rows.start(MODELS["ovq"])
    with pytest.raises(ValueError, match="tokens: expected those of 1 rows, found 2"):
        rows.read([[1], [2]])
    assert rows.read([[1]]).shape[0] == len(rows.lengths) == 1

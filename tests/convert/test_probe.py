"""The probe says what heads lose, and rows go to those that lose most."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovq.convert import Option, attach, default_options, probe
from ovq.convert.budgets import allocate
from tests.convert.common import original, tokens

OPTIONS = [Option(num_slots=n, window=w) for n, w in ((0, 8), (0, 40), (8, 8), (120, 8), (0, 128))]


def test_heads_lose_nothing_with_room_for_all_and_more_with_less():
    model = original()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = probe(model, [tokens(100), tokens(90, seed=1)], options=OPTIONS, num_sinks=2, chunk_size=8)
    losses = found.losses
    assert losses.shape == (2, 2, 5)
    # Slots of one token each, and a window as long as the text.
    assert losses[..., 3:].abs().max() < 1e-9
    assert (losses[..., 0] > losses[..., 1]).all()
    assert (losses[..., 0] > losses[..., 2]).any()
    # The model is as it was.
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_only_answers_count_where_they_are_named():
    model, ids = original(), tokens(100)
    mask = torch.zeros(100, dtype=torch.bool)
    mask[40] = True
    options = [Option(num_slots=0, window=48), Option(num_slots=0, window=16)]
    losses = probe(model, [ids], options=options, chunk_size=8, targets=[mask]).losses
    assert losses[..., 0].max() < 1e-9 < losses[..., 1].min()


def test_rows_are_shared_out_by_what_heads_lose():
    found = probe(original(), [tokens(120)], options=OPTIONS, num_sinks=2, chunk_size=8)
    config = found.config(40)
    assert config.rows_per_head <= 40
    budgets = {budget for i in range(2) for budget in zip(config.num_slots[i], config.window[i], strict=True)}
    assert len(budgets) > 1
    # Twice as large for texts twice as long.
    assert found.config(80, scale=2).rows_per_head <= 80
    with pytest.raises(ValueError, match="rows: expected at least 10 per head"):
        found.config(5)
    attach(original(), config=config)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(1, 4))
def test_no_change_of_one_head_is_left_that_helps_and_fits(seed, share):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(5, 4, generator=generator)
    rows = [10, 20, 30, 45]
    total = share * 50
    chosen = allocate(losses, rows, total)
    used = sum(rows[i] for i in chosen)
    assert used <= total
    for head, now in enumerate(chosen):
        for i, cost in enumerate(rows):
            if losses[head, i] < losses[head, now]:
                assert used + cost - rows[now] > total


def test_options_that_are_tried():
    options = default_options(260, num_sinks=4, chunk_size=32)
    assert len(set(options)) == len(options)
    assert {o.num_slots > 0 for o in options} == {True, False}
    assert max(o.rows(4) for o in options) > 2000
    shorter = default_options(260, num_sinks=4, chunk_size=32, length=1000)
    assert set(shorter) == {o for o in options if o.rows(4) < 1000}
    # More rows, larger steps.
    for larger, o in zip(default_options(4 * 768, num_sinks=4, chunk_size=32), options, strict=True):
        assert (larger.num_slots, larger.window) == (4 * o.num_slots, 4 * o.window)
    with pytest.raises(ValueError, match="options: expected at least one"):
        probe(original(), [tokens(20)], options=[])
    with pytest.raises(ValueError, match="texts: expected at least 2 tokens"):
        probe(original(), [tokens(1)], options=OPTIONS)


def test_texts_count_by_their_weights():
    texts = [tokens(60), tokens(60, seed=1)]

    def losses(*args, **kwargs):
        return probe(
            original(), *args, options=OPTIONS[:3], chunk_size=8, has_distances=False, **kwargs
        ).losses

    first, second = (losses([text]) for text in texts)
    torch.testing.assert_close(losses(texts, weights=[3, 1]), (3 * first + second) / 4)
    torch.testing.assert_close(losses(texts), (first + second) / 2)
    with pytest.raises(ValueError, match="weights: expected a number of at least 0 for each of 2 texts"):
        losses(texts, weights=[1])
    with pytest.raises(ValueError, match="weights: expected"):
        losses(texts, weights=[0, 0])

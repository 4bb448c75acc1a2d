"""The probe says what heads lose, and rows go to those that lose most."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ovq.convert import Option, Probe, attach, default_options, probe
from ovq.convert.budgets import allocate
from ovq.convert.captures import Captured
from ovq.convert.masses import fitted_bias
from ovq.convert.probe import _wanted
from ovq.convert.texts import default_texts
from ovq.convert.trials import trials
from tests.convert.common import original, tokens
from tests.ops.common import other_defaults

SIZES = {"num_sinks": 2, "chunk_size": 8}
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


def test_the_probe_does_not_depend_on_default_dtype_and_device():
    model, texts, mask = original(), [tokens(100), tokens(90, seed=1)], torch.arange(90) >= 60

    def results():
        found = probe(model, texts, options=OPTIONS, rows=50, targets=[None, mask], **SIZES)
        config = found.config(50)
        return found.losses.tolist(), config, fitted_bias(model, texts, config)

    with other_defaults():
        found = results()
    with torch.inference_mode():
        assert found == results()
    assert found == results()


def test_only_answers_count_where_they_are_named():
    model, ids = original(), tokens(100)
    mask = torch.zeros(100, dtype=torch.bool)
    mask[40] = True
    options = [Option(num_slots=0, window=48), Option(num_slots=0, window=16)]
    losses = probe(model, [ids], options=options, chunk_size=8, targets=[mask]).losses
    assert losses[..., 0].max() < 1e-9 < losses[..., 1].min()


def test_rows_are_shared_out_by_what_heads_lose():
    found = probe(original(), [tokens(120)], options=OPTIONS, num_sinks=2, chunk_size=8)
    config = found.config(50)
    assert config.rows_per_head <= 50
    budgets = {budget for i in range(2) for budget in zip(config.num_slots[i], config.window[i], strict=True)}
    assert len(budgets) > 1
    # Twice as large for texts twice as long.
    assert found.config(80, scale=2).rows_per_head <= 80
    with pytest.raises(ValueError, match="rows: expected at least 10 per head"):
        found.config(5)
    attach(original(), config=config)


def test_losses_that_are_no_numbers():
    with pytest.raises(ValueError, match=r"or inf, found nan \(head 1, option 1\)"):
        allocate(torch.tensor([[2.0, 1.0], [1.0, torch.nan]]), [1, 2], 9)


@pytest.mark.parametrize("rows", [12, 30, 50, 90])
def test_options_that_no_head_gets_are_ruled_out(rows):
    texts, options, num_done = [tokens(120), tokens(100, seed=1)], default_options(24, **SIZES), []
    found = probe(original(), texts, options=options, **SIZES)
    fewer = probe(original(), texts, options=options, rows=rows, progress=num_done.append, **SIZES)
    assert fewer.config(rows) == found.config(rows)
    is_tried = fewer.losses.isfinite()
    assert torch.equal(fewer.losses[is_tried], found.losses[is_tried])
    assert 0 < int(is_tried.sum()) < is_tried.numel()
    assert num_done == sorted(num_done)
    assert num_done[-1] == len(texts) * is_tried.numel()
    for other in ({"rows": rows + 1}, {"rows": rows, "scale": 2.0}):
        with pytest.raises(ValueError, match=f"rows: expected {rows} .scale 1., for which options were"):
            fewer.config(**other)


def test_too_few_rows_are_refused_before_a_text_is_read():
    def stopped(num):
        raise AssertionError("the text was read")

    with pytest.raises(ValueError, match="rows: expected at least 10 per head"):
        probe(original(), [tokens(100)], options=OPTIONS, rows=5, learning=stopped, **SIZES)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(1, 3))
def test_what_is_ruled_out_changes_nothing(seed, share):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(6, 12, generator=generator, dtype=torch.float64) ** 4
    rows = torch.randint(10, 60, (12,), generator=generator).tolist()
    is_tried = torch.zeros_like(losses, dtype=torch.bool)
    least = share * min(rows)
    while bool((wanted := _wanted(losses * is_tried, is_tried, rows, least)).any()):
        is_tried |= wanted
    known = losses.masked_fill(~is_tried, torch.inf)
    assert allocate(known, rows, 6 * least) == allocate(losses, rows, 6 * least)


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
    assert {o for o in shorter if o.rows(4) < 1000} == {o for o in options if o.rows(4) < 1000}
    # More rows, larger steps.
    for larger, o in zip(default_options(4 * 768, num_sinks=4, chunk_size=32), options, strict=True):
        assert (larger.num_slots, larger.window) == (4 * o.num_slots, 4 * o.window)
    with pytest.raises(ValueError, match="options: expected at least one"):
        probe(original(), [tokens(20)], options=[])
    with pytest.raises(ValueError, match="texts: expected at least 2 tokens"):
        probe(original(), [tokens(1)], options=OPTIONS)
    with pytest.raises(ValueError, match=r"texts: expected token ids from 0 to \d+, found 1000000 in text 0"):
        probe(original(), [torch.tensor([1, 10**6])], options=OPTIONS)


@pytest.mark.parametrize("length", [1000, 3072, 4000, 20_000])
def test_one_option_keeps_the_whole_text(length):
    sizes = {"num_sinks": 4, "chunk_size": 32, "length": length}
    options = default_options(length // 4, **sizes)
    rows = [o.rows(4) for o in options]
    assert rows[-1] == length == max(rows)
    assert len(set(options)) == len(options)
    # The next smaller option has nearly half as many or more.
    assert sorted(rows)[-2] > length / 3
    # But not where rows are few.
    assert max(o.rows(4) for o in default_options(length // 12, **sizes)) < length


def test_a_head_that_has_to_tell_all_tokens_apart_can_keep_them_all():
    length = 300
    generator = torch.Generator().manual_seed(0)
    # Queries that each look up a token of their own.
    k, v = (torch.randn(1, 1, length, 16, generator=generator) for _ in range(2))
    q = 4 * k[:, :, torch.randperm(length, generator=generator)[:100]]
    g = torch.randn(1, 1, 100, 16, generator=generator)
    o = F.scaled_dot_product_attention(q, k, v, scale=1.0, attn_mask=torch.ones(100, length).tril(200) > 0)
    head = Captured(q=q, k=k, v=v, o=o, g=g, num_targets=100)
    given = {"chunk_size": 8, "merge": "nearest", "value_weight": 1.0}
    options = default_options(100, num_sinks=2, chunk_size=8, length=length)
    losses = trials([head], options, 2, given)
    assert losses[0, -1] < 1e-9 < losses[0, :-1].min() / 1000
    # Beside one that needs nothing, it gets a row for each.
    both = torch.stack([losses, torch.zeros_like(losses)], 1)
    found = Probe(options=options, losses=both, num_sinks=2, settings=given).config((length + 10) / 2)
    assert 2 + found.num_slots[0][0] + found.window[0][0] == length


def test_texts_count_by_their_weights():
    texts = [tokens(60), tokens(60, seed=1)]

    def losses(*args, **kwargs):
        return probe(
            original(),
            *args,
            options=OPTIONS[:3],
            chunk_size=8,
            has_distances=False,
            has_use=False,
            **kwargs,
        ).losses

    first, second = (losses([text]) for text in texts)
    torch.testing.assert_close(losses(texts, weights=[3, 1]), (3 * first + second) / 4)
    torch.testing.assert_close(losses(texts), (first + second) / 2)
    with pytest.raises(
        ValueError, match="weights: expected a finite number of at least 0 for each of 2 texts"
    ):
        losses(texts, weights=[1])
    with pytest.raises(ValueError, match="weights: expected"):
        losses(texts, weights=[0, 0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"targets": []}, "targets: expected one for each of 1 texts, found 0"),
        ({"targets": [torch.ones(30) > 0]}, r"a mask of the 20 tokens of text 0, found \(30,\)"),
        ({"targets": [torch.ones(10) > 0]}, r"a mask of the 20 tokens of text 0, found \(10,\)"),
        ({"targets": [[True] * 20]}, "a mask of the 20 tokens of text 0, found list"),
        ({"weights": [torch.inf]}, r"weights: expected a finite number .*, found \[inf\]"),
    ],
)
def test_targets_and_weights_that_do_not_fit_the_texts(given, expected):
    with pytest.raises(ValueError, match=expected):
        probe(original(), [tokens(20)], options=OPTIONS, **given)


def test_a_config_of_impossible_numbers():
    settings = {"chunk_size": 8, "merge": "nearest", "value_weight": 1.0}
    found = Probe(
        options=tuple(OPTIONS), losses=torch.ones(1, 1, len(OPTIONS)), num_sinks=2, settings=settings
    )
    with pytest.raises(ValueError, match="rows: expected a number, found nan"):
        found.config(torch.nan)
    for scale in (0, -1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"scale: expected a finite number above 0, found {scale}"):
            found.config(40, scale=scale)


def test_default_texts_do_not_change():
    # The figures of docs/results/convert.md are of these; other texts give other budgets.
    found = [hashlib.sha256(text.encode()).hexdigest()[:8] for text in default_texts().values()]
    assert found == ["53df5a6b", "82a94440"]

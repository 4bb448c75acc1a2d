"""Rows packed into one: a converted model reads each as if it were alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from ovq.hf.cache import CACHE_KEY
from tests.convert.common import KINDS, converted, tokens
from tests.written import Written

# The last two are read together.
BOUNDS = torch.tensor([0, 61, 62, 90, 118])
POSITIONS = torch.cat([torch.arange(n) for n in BOUNDS.diff()])[None]
PACKINGS = {
    "cu_seqlens": {"cu_seqlens": BOUNDS},
    "an empty row": {"cu_seqlens": torch.tensor([0, 61, 61, 62, 90, 118])},
    "positions": {"position_ids": POSITIONS},
    "positions from 2": {"position_ids": POSITIONS + 2},
    "flash attention": {"cu_seq_lens_q": BOUNDS.int(), "cu_seq_lens_k": BOUNDS.int(), "max_length_q": 61},
    "row of each token": {"seq_idx": torch.arange(4).repeat_interleave(BOUNDS.diff())[None]},
    "all of trl": {"position_ids": POSITIONS, "cu_seq_lens_q": BOUNDS.int(), "use_cache": False},
}
IDS = tokens(1, 118)


def alone(model, first=0):
    """Logits of the rows, each read by itself: long enough to be merged, and to be re-positioned."""
    rows = IDS.split(BOUNDS.diff().tolist(), 1)
    return torch.cat(
        [model(row, position_ids=torch.arange(first, first + row.shape[1])[None]).logits for row in rows], 1
    )


@pytest.mark.parametrize("packing", PACKINGS)
@torch.no_grad()
def test_packed_rows_equal_rows_alone(packing):
    model, given = converted(), PACKINGS[packing]
    expected = alone(model, 2 if packing == "positions from 2" else 0)
    found = model(IDS, **given)
    torch.testing.assert_close(found.logits, expected)
    assert getattr(found, CACHE_KEY) is None
    # The backbone alone, which trl calls.
    torch.testing.assert_close(model.lm_head(model.model(IDS, **given).last_hidden_state), expected)
    embedded = model(inputs_embeds=model.model.embed_tokens(IDS), **given).logits
    torch.testing.assert_close(embedded, expected)


@torch.no_grad()
def test_equal_rows_beyond_what_is_read_together(monkeypatch):
    # Three rows of the five at most.
    monkeypatch.setattr("ovq.convert.attention._MOST_TOKENS", 3 * 22)
    model, ids = converted(), tokens(1, 118)
    bounds = torch.tensor([0, 22, 44, 52, 74, 96, 118])
    rows = ids.split(bounds.diff().tolist(), 1)
    expected = torch.cat([model(row).logits for row in rows], 1)
    torch.testing.assert_close(model(ids, cu_seqlens=bounds).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_in_every_architecture(kind):
    model = converted(kind)
    torch.testing.assert_close(model(IDS, position_ids=POSITIONS).logits, alone(model))


def test_losses_and_gradients_of_a_flattened_batch_are_those_of_its_rows():
    model = converted(max_distance=None)
    rows = IDS[0].split(BOUNDS.diff().tolist())

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            model(**batch, num_items_in_batch=torch.tensor(114)).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": row.tolist()} for row in rows]
    )
    expected = gradients([{"input_ids": row[None], "labels": row[None]} for row in rows if len(row) > 1])
    torch.testing.assert_close(gradients([packed]), expected)


@torch.no_grad()
def test_rows_cost_what_they_can_fill():
    row, num = tokens(1, 30), 300

    def written(num_slots):
        model = converted(num_slots=num_slots)
        expected = model(row).logits.expand(num, -1, -1)
        with Written() as mode:
            found = model(row.repeat(1, num), cu_seqlens=torch.arange(num + 1) * row.shape[1]).logits
        torch.testing.assert_close(found.view(expected.shape), expected)
        return mode.numel

    assert written(4096) == written(32)


def test_what_packed_rows_cannot_have_is_refused():
    model = converted()
    for name, given in (("attention_mask", torch.ones(1, 118)), (CACHE_KEY, model.make_cache())):
        with pytest.raises(ValueError, match=f"{name}: expected None in a call with packed rows, found one"):
            model(IDS, cu_seq_lens_q=BOUNDS, **{name: given})
    with pytest.raises(ValueError, match=f"{CACHE_KEY}: expected None in a call with packed rows"):
        model(IDS, position_ids=POSITIONS, **{CACHE_KEY: model.make_cache()})
    with pytest.raises(ValueError, match="to pack the same rows as cu_seqlens"):
        model(IDS, cu_seqlens=torch.tensor([0, 9, 118]), position_ids=POSITIONS)
    with pytest.raises(ValueError, match="cu_seqlens: expected packed rows in a batch of 1"):
        model(tokens(2, 118), cu_seqlens=BOUNDS)
    with pytest.raises(ValueError, match="packed rows in a batch of 1, found positions that start again"):
        model(tokens(2, 118), position_ids=POSITIONS.expand(2, -1))
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        model(IDS, cu_seqlens=torch.tensor([0, 9, 80]))

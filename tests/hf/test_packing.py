"""Rows packed into one, in the words of transformers' and trl's collators, give what each row gives alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from ovq.hf import OVQCache
from tests.hf.common import random_ids

BOUNDS = torch.tensor([0, 7, 8, 24])
POSITIONS = torch.cat([torch.arange(n) for n in BOUNDS.diff()])[None]
ROW_OF_TOKEN = torch.arange(3).repeat_interleave(BOUNDS.diff())[None]


@pytest.fixture(scope="module")
def rows():
    return random_ids(1, 24)[0].split(BOUNDS.diff().tolist())


SAYINGS = {
    "cu_seqlens": {"cu_seqlens": BOUNDS},
    "positions": {"position_ids": POSITIONS},
    "positions from 2": {"position_ids": POSITIONS + 2},
    "positions of a first row without its beginning": {"position_ids": POSITIONS + 5 * (ROW_OF_TOKEN == 0)},
    "flash attention": {
        "cu_seq_lens_q": BOUNDS.int(),
        "cu_seq_lens_k": BOUNDS.int(),
        "max_length_q": 16,
        "max_length_k": 16,
    },
    "row of each token": {"seq_idx": ROW_OF_TOKEN.int()},
    "all of trl": {
        "position_ids": POSITIONS,
        "cu_seq_lens_q": BOUNDS.int(),
        "cu_seq_lens_k": BOUNDS.int(),
        "max_length_q": 16,
        "max_length_k": 16,
        "seq_idx": ROW_OF_TOKEN.int(),
        "use_cache": False,
    },
}


@pytest.mark.parametrize("saying", SAYINGS.values(), ids=SAYINGS)
def test_packed_rows_equal_rows_alone(model, rows, saying):
    ids = torch.cat(rows)[None]
    expected = torch.cat([model(row[None]).logits for row in rows], 1)
    # As the model, and as its backbone alone, which trl calls.
    torch.testing.assert_close(model(ids, **saying).logits, expected)
    torch.testing.assert_close(model.lm_head(model.model(ids, **saying).last_hidden_state), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}, {"position_ids_start": 2}],
    ids=str,
)
def test_losses_and_gradients_of_a_flattened_batch_are_those_of_its_rows(model, rows, options):
    def grads_of(batches):
        model.zero_grad()
        for batch in batches:
            model(**batch, num_items_in_batch=torch.tensor(21)).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    collate = DataCollatorWithFlattening(**options)
    packed = collate([{"input_ids": row.tolist()} for row in rows])
    assert packed["input_ids"].shape == (1, 24)
    alone = [{"input_ids": row[None], "labels": row[None]} for row in rows]
    torch.testing.assert_close(grads_of([packed]), grads_of(alone))


def test_packing_that_contradicts_itself_is_refused(model):
    ids = random_ids(1, 24)
    other = torch.tensor([0, 9, 24])
    for saying in (
        {"cu_seqlens": BOUNDS, "cu_seq_lens_q": other},
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": other},
        {"cu_seq_lens_q": other, "position_ids": POSITIONS},
        {"cu_seqlens": other, "seq_idx": ROW_OF_TOKEN},
    ):
        for target in (model, model.model):
            with pytest.raises(ValueError, match=r"to pack the same rows as .* pass cu_seqlens alone"):
                target(ids, **saying)
    # Rows without tokens are rows by cu_seqlens alone.
    with_empty = torch.tensor([0, 7, 7, 8, 24])
    logits = model(ids, cu_seqlens=with_empty, position_ids=POSITIONS).logits
    torch.testing.assert_close(logits, model(ids, cu_seqlens=BOUNDS).logits)


def test_packing_that_cannot_be_read_is_refused_by_the_name_that_can(model):
    ids, two = random_ids(1, 24), random_ids(2, 24)
    with pytest.raises(ValueError, match="pass cu_seqlens"):
        model(two, position_ids=POSITIONS.expand(2, -1))
    with pytest.raises(ValueError, match="pass cu_seqlens"):
        model(ids, position_ids=POSITIONS, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="pass cu_seqlens"):
        model(ids[:, :4], position_ids=torch.tensor([[0, 1, 3, 4]]))
    with pytest.raises(ValueError, match=r"seq_idx: expected shape \[1, 24\] .*cu_seqlens"):
        model(two, seq_idx=ROW_OF_TOKEN.expand(2, -1))
    with pytest.raises(ValueError, match="cu_seqlens: expected packed rows in a batch of 1"):
        model(two, cu_seq_lens_q=BOUNDS)
    with pytest.raises(ValueError, match="expected attention_mask or cu_seqlens, found both"):
        model(ids, cu_seq_lens_q=BOUNDS, attention_mask=torch.ones_like(ids))
    cache = OVQCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="pass cu_seqlens"):
        model(ids, position_ids=POSITIONS, past_key_values=cache)

"""The loss in pieces is that of the whole, and logits of all tokens never exist."""

import pytest
import torch
from torch import nn

from ovq.hf import OVQConfig, OVQForCausalLM, loss
from tests.tiny import tiny_model
from tests.written import Written


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_add_up_to_the_whole(monkeypatch, num_items, dtype):
    monkeypatch.setattr(loss, "_PIECE", 64)
    monkeypatch.setattr(loss, "_ROWS", 4)
    torch.manual_seed(0)
    hidden, weight = torch.randn(21, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    targets = torch.randint(13, (21,))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = loss.loss_in_pieces(hidden, weight, targets, num_items)
        reduction = "mean" if num_items is None else "sum"
        whole = nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction=reduction)
    expected = whole / (1 if num_items is None else num_items)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-3}
    torch.testing.assert_close(found, expected, **tolerance)
    grads = torch.autograd.grad(found, (hidden, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (hidden, weight)), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_over_many_tokens_do_not_overflow_in_float16(dtype):
    """The gradient is divided by their number at the end."""
    hidden, targets = torch.full((1 << 17, 4), 1.25), torch.zeros(1 << 17, dtype=torch.int64)
    weight = torch.zeros(16, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float32):
        found = loss.loss_in_pieces(hidden.to(dtype), weight, targets)
    found.backward()
    expected = torch.full((16, 4), 1.25 / 16)
    expected[0] -= 1.25
    assert weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-3, atol=0)


def test_the_mean_over_no_target_has_gradients_of_zero():
    """As the loss of all logits has: a text without a target must not spoil the output layer."""
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    found = loss.loss_in_pieces(hidden, weight, torch.empty(0, dtype=torch.int64))
    assert found.isnan()
    found.backward()
    assert torch.equal(weight.grad, torch.zeros(13, 8))


def test_logits_of_all_tokens_never_exist():
    vocab_size, num_tokens = 3000, 1000
    model = tiny_model(vocab_size=vocab_size, num_slots=8, chunk_size=8).train()
    ids = torch.randint(vocab_size, (1, num_tokens))
    largest = {}
    for skip_logits in (False, True):
        with Written() as seen:
            model(ids, labels=ids, skip_logits=skip_logits).loss.backward()
        largest[skip_logits] = seen.largest
    assert largest[True] <= loss._PIECE < num_tokens * vocab_size
    # Negative control: the whole is seen where it exists.
    assert largest[False] == num_tokens * vocab_size


def test_an_output_layer_with_hooks_or_a_custom_loss_is_called_as_a_whole():
    config = OVQConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = OVQForCausalLM(config)
    assert loss.can_be_pieced(model.lm_head, model.loss_function)
    assert not loss.can_be_pieced(model.lm_head, lambda *args, **kwargs: None)
    # transformers replaces the layer.
    model.resize_token_embeddings(11)
    assert type(model.lm_head) is torch.nn.Linear
    assert loss.can_be_pieced(model.lm_head, model.loss_function)
    assert not loss.can_be_pieced(torch.nn.Linear(16, 11), model.loss_function)
    model.lm_head.register_forward_hook(lambda *args: None)
    assert not loss.can_be_pieced(model.lm_head, model.loss_function)

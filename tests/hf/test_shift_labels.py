"""Targets that come already shifted are those that the model would have shifted itself."""

import copy

import pytest
import torch
from torch.nn import functional as F

from ovq.hf import OVQConfig, OVQForCausalLM


# VQ-attention adds a loss of its own, and moves its slots at every step.
@pytest.mark.parametrize("mixer", ["ovq", "vq"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 40}])
@pytest.mark.parametrize("is_packed", [False, True])
def test_shifted_targets_have_the_loss_of_labels(mixer, options, is_packed):
    torch.manual_seed(0)
    config = OVQConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mixer_types=["sliding_attention", mixer],
        num_slots=4,
        chunk_size=4,
    )
    model = OVQForCausalLM(config).train()
    ids = torch.randint(11, (1, 20))
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    if is_packed:
        options = options | {"cu_seqlens": torch.tensor([0, 7, 20])}
        targets[:, 6] = -100
    same = copy.deepcopy(model)
    losses = [model(ids, labels=ids, **options).loss, same(ids, shift_labels=targets, **options).loss]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("shape", [(1, 4), (3,), (2, 3)])
def test_targets_have_the_shape_of_the_input(name, shape):
    model = OVQForCausalLM(
        OVQConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \[1, 3\]"):
        model(torch.tensor([[1, 2, 3]]), **{name: torch.zeros(shape, dtype=torch.long)})


def test_the_last_position_can_have_a_target():
    config = OVQConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = OVQForCausalLM(config).eval()
    ids, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[-100, -100, 7]])
    # The Trainer wants labels beside them, which then do not count.
    outputs = model(ids, labels=ids, shift_labels=targets)
    torch.testing.assert_close(outputs.loss, -outputs.logits.log_softmax(-1)[0, 2, 7])


@pytest.mark.parametrize("options", [{}, {"skip_logits": True}])
def test_targets_may_be_a_part_of_longer_rows(options):
    """Such are those of a window, and not contiguous."""
    torch.manual_seed(0)
    config = OVQConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model, rows = OVQForCausalLM(config), torch.randint(11, (2, 20))
    targets = rows[:, 1:9]
    losses = [model(rows[:, :8], shift_labels=x, **options).loss for x in (targets, targets.clone())]
    assert torch.equal(*losses)

"""Targets that come already shifted are those that the model would have shifted itself."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import tiny_model


# VQ-attention adds a loss of its own, and moves its slots at every step.
@pytest.mark.parametrize("mixer", ["ovq", "vq"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 40}])
@pytest.mark.parametrize("is_packed", [False, True])
def test_shifted_targets_have_the_loss_of_labels(mixer, options, is_packed):
    sizes = {"vocab_size": 11, "num_slots": 4, "chunk_size": 4}
    model = tiny_model(mixer_types=["sliding_attention", mixer], **sizes).train()
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
    model = tiny_model(vocab_size=11)
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \[1, 3\]"):
        model(torch.tensor([[1, 2, 3]]), **{name: torch.zeros(shape, dtype=torch.long)})


def test_the_last_position_can_have_a_target():
    model = tiny_model(vocab_size=11)
    ids, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[-100, -100, 7]])
    # The Trainer wants labels beside them, which then do not count.
    outputs = model(ids, labels=ids, shift_labels=targets)
    torch.testing.assert_close(outputs.loss, -outputs.logits.log_softmax(-1)[0, 2, 7])


@pytest.mark.parametrize("options", [{}, {"skip_logits": True}])
def test_targets_may_be_a_part_of_longer_rows(options):
    """Such are those of a window, and not contiguous."""
    model, rows = tiny_model(vocab_size=11), torch.randint(11, (2, 20))
    targets = rows[:, 1:9]
    losses = [model(rows[:, :8], shift_labels=x, **options).loss for x in (targets, targets.clone())]
    assert torch.equal(*losses)

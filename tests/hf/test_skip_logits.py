"""A loss without logits is the loss with them, and costs what the positions with targets do."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.tiny import tiny_model

SIZES = {"vocab_size": 11, "num_slots": 4, "chunk_size": 4, "tie_word_embeddings": True}


def make_model(*mixer_types):
    return tiny_model(**SIZES, mixer_types=list(mixer_types or ("sliding_attention", "vq")))


@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": 40}, {"cu_seqlens": torch.tensor([0, 7, 20])}]
)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_the_loss_and_its_gradient_are_those_with_logits(name, options):
    torch.manual_seed(0)
    ids = torch.randint(11, (1 if "cu_seqlens" in options else 2, 20))
    targets = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    found = []
    for skip_logits in (False, True):
        # VQ-attention moves its slots at every step of training.
        model = make_model().train()
        num_rows = []
        model.lm_head.register_forward_hook(
            lambda module, args, out, seen=num_rows: seen.append(out[..., 0].numel())
        )
        outputs = model(ids, **{name: targets}, skip_logits=skip_logits, **options)
        outputs.loss.backward()
        found.append([outputs.loss, *(parameter.grad for parameter in model.parameters())])
        assert (outputs.logits is None) == skip_logits
        asked = (targets if name == "shift_labels" else targets[:, 1:]) != -100
        if name == "labels" and "cu_seqlens" in options:
            # The first token of the second row belongs to no token before it.
            asked[0, 6] = False
        assert num_rows == [asked.sum() if skip_logits else ids.numel()]
    torch.testing.assert_close(found[1], found[0])


def test_without_a_target_the_loss_of_a_micro_batch_is_zero():
    model, ids = make_model().train(), torch.randint(11, (2, 8))
    loss = model(ids, labels=torch.full_like(ids, -100), skip_logits=True, num_items_in_batch=5).loss
    loss.backward()
    assert loss == 0
    assert model.lm_head.weight.grad.abs().max() == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_the_loss_can_be_transformed():
    model, ids = make_model("ovq", "ovq").double(), torch.randint(11, (2, 8))
    weights = dict(model.named_parameters())

    def loss(weights, skip_logits=True):
        inputs = {"labels": ids, "skip_logits": skip_logits}
        return torch.func.functional_call(model, weights, (ids,), inputs).loss

    grads = torch.func.grad(loss)(weights)
    torch.testing.assert_close(grads, torch.func.grad(lambda x: loss(x, skip_logits=False))(weights))
    total = sum(x.square().sum() for x in grads.values())
    torch.testing.assert_close(torch.func.jvp(loss, (weights,), (grads,))[1], total.float())


def test_gradients_of_gradients_need_what_the_error_says():
    # Kernels do not run in float64.
    model, ids = make_model("sliding_attention", "ovq").double(), torch.randint(11, (2, 8))
    model.model.layers[1].mixer.backend = "naive"

    def penalty(skip_logits):
        loss = model(ids, labels=ids, skip_logits=skip_logits).loss
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return sum(x.square().sum() for x in grads)

    needed = r"backend='naive'.* skip_logits=False and.* sdpa_kernel\(SDPBackend.MATH\)"
    with pytest.raises(RuntimeError, match=needed):
        penalty(skip_logits=True)
    with sdpa_kernel(SDPBackend.MATH):
        penalty(skip_logits=False).backward()
    assert model.lm_head.weight.grad.any()


def test_a_bias_that_is_assigned_to_the_output_layer_counts():
    model, ids = make_model(), torch.randint(11, (2, 8))
    model.lm_head.bias = torch.nn.Parameter(torch.randn(11))
    losses = [model(ids, labels=ids, skip_logits=skip_logits).loss for skip_logits in (False, True)]
    torch.testing.assert_close(losses[1], losses[0])
    losses[1].backward()
    assert model.lm_head.bias.grad.abs().max() > 0


def test_logits_that_are_needed_are_not_skipped():
    model, ids = make_model(), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="skip_logits: expected False without labels, found True"):
        model(ids, skip_logits=True)
    for kept in (1, torch.tensor([0])):
        with pytest.raises(ValueError, match=r"logits_to_keep: expected 0 with labels, .* found"):
            model(ids, skip_logits=True, labels=ids, logits_to_keep=kept)

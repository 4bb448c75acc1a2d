"""VQ-attention against attention over quantised keys in quadratic time, and how its slots are learned."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ovq.hf import OVQForCausalLM
from ovq.layers import LayerCache, SequenceLayout
from ovq_lab.mixers import VQAttention
from ovq_lab.mixers.vq import StaticDictionary, vq_read
from tests.hf.common import enable_checkpointing, make_config, random_ids
from tests.layers.common import assert_alike_with_gradients
from tests.written import Written

N, C = 6, 4


def quadratic(q, k, v, slots, means):
    """The paper's equations for all pairs: quantised keys, a gradient to keys of two chunks alone."""
    kv_heads, num_tokens = k.shape[1:3]
    quantised = torch.stack([means[h][slots[:, h]] for h in range(kv_heads)], 1)
    straight = k + (quantised - k).detach()
    q = q.unflatten(1, (kv_heads, -1))
    token = torch.arange(num_tokens)
    is_recent = token[:, None] // C - token // C <= 1
    scores = torch.where(
        is_recent,
        torch.einsum("bhgtk,bhsk->bhgts", q, straight),
        torch.einsum("bhgtk,bhsk->bhgts", q, quantised.detach()),
    )
    weights = scores.masked_fill(token > token[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhgts,bhsv->bhgtv", weights, v).flatten(1, 2)


@pytest.mark.parametrize("num_tokens", [1, C, C + 1, 5 * C + 3])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_reading_equals_attention_over_quantised_keys_and_its_gradients(num_tokens, kv_heads):
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = (random(2, heads, num_tokens, 3).requires_grad_() for heads in (2, kv_heads, kv_heads))
    means = random(kv_heads, N, 3)
    slots = StaticDictionary.nearest(k, means)
    distances = (k[:, :, :, None] - means[:, None]).square().sum(-1)
    assert torch.equal(slots, distances.argmin(-1))
    nearest = torch.stack([means[h][slots[:, h]] for h in range(kv_heads)], 1)
    empty = {
        "count": torch.zeros(2, kv_heads, N, dtype=torch.long),
        "value_sum": random(2, kv_heads, N, 3) * 0,
    }
    straight = k + (nearest - k).detach()
    found, count, value_sum = vq_read(q, straight, v, slots, means, **empty, is_token=None, chunk_size=C)
    expected = quadratic(q, k, v, slots, means)
    assert count.sum() == 2 * kv_heads * num_tokens
    torch.testing.assert_close(value_sum.sum(2), v.sum(2))
    assert_alike_with_gradients((q, k, v), (found, expected))


def test_slots_are_moving_averages_of_their_keys():
    torch.manual_seed(0)
    dictionary = StaticDictionary(1, num_slots=2, head_dim=2, decay=0.5)
    dictionary.key_sum.copy_(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]))
    dictionary.count.copy_(torch.tensor([[3.0, 2.0]]))
    k = torch.tensor([[[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 0.0]]]])
    slots = dictionary.nearest(k, dictionary.means)
    assert slots.tolist() == [[[0, 0, 1, 0]]]
    dictionary.learn(k, slots, torch.tensor([[True, True, True, False]]), dictionary.begin_step())
    # Nothing moves within the step; then, half of what was and half of what was seen, padding left out.
    assert dictionary.means.tolist() == [[[1, 0], [0, 1]]]
    dictionary.begin_step()
    torch.testing.assert_close(dictionary.count, torch.tensor([[2.5, 1.5]]))
    torch.testing.assert_close(dictionary.means, torch.tensor([[[4.8 / 5, 0.6 / 5], [0.0, 1.0]]]))


def test_dead_slots_begin_again_as_keys_far_from_theirs():
    torch.manual_seed(0)
    dictionary = StaticDictionary(1, num_slots=4, head_dim=2, decay=0.9)
    with torch.no_grad():
        dictionary.count.copy_(torch.tensor([[10.0, 1e-3, 10.0, 1e-3]]))
        dictionary.key_sum.copy_(dictionary.count[..., None] * torch.tensor([1.0, 0.0]))
    # All at the first slot but one, which is the only key that is not there already.
    k = torch.tensor([1.0, 0.0]).repeat(1, 1, 50, 1)
    k[0, 0, 7] = torch.tensor([-1.0, 0.5])
    dictionary.learn(k, torch.zeros(1, 1, 50, dtype=torch.long), None, dictionary.begin_step())
    dictionary.begin_step()
    means = dictionary.means[0]
    torch.testing.assert_close(means[[1, 3]], torch.tensor([[-1.0, 0.5]]).repeat(2, 1))
    torch.testing.assert_close(means[2], torch.tensor([1.0, 0.0]))


def test_evaluation_leaves_the_slots_alone_and_training_moves_them():
    torch.manual_seed(0)
    layer, x = VQAttention(8, 1, num_slots=4, chunk_size=4, conv_size=0), torch.randn(2, 20, 8)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(x)
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)
    distances = []
    for _ in range(30):
        losses = []
        layer.train()(x, auxiliary_losses=losses)
        distances.append(float(losses[0].detach()))
    assert distances[-1] < distances[0] / 2


def test_packed_rows_are_learned_from_together():
    """Those of very different lengths, too, whose reads are apart."""
    found = []
    for ends in (None, torch.tensor([0, 60, *range(61, 81)])):
        torch.manual_seed(0)
        layer, losses = VQAttention(8, 1, num_slots=4, chunk_size=4, conv_size=0), []
        layer(torch.randn(1, 80, 8), cu_seqlens=ends, auxiliary_losses=losses)
        found.append([layer.dictionary.next_key_sum, layer.dictionary.next_count, *losses])
    torch.testing.assert_close(*found)
    assert len(losses) == 1


@torch.no_grad()
def test_rows_that_leave_a_state_are_read_together():
    """As an engine has them."""
    layer, ends = VQAttention(8, 1, num_slots=4, chunk_size=4), torch.tensor([0, 60, *range(61, 81)])
    x, cache = torch.randn(1, 80, 8), LayerCache(layer.memory)
    layout = SequenceLayout.of(None, batch_size=1, num_past=0, num_new=80, cu_seqlens=ends)
    layer.mix(layer.qkv_proj(x), x, layout, cache)
    assert cache.state["count"].sum((1, 2)).tolist() == ends.diff().tolist()


@torch.no_grad()
def test_no_tensor_has_a_number_for_each_token_and_slot():
    layer = VQAttention(8, 2, num_slots=64, chunk_size=16)
    with Written() as mode:
        layer(torch.randn(1, 4096, 8))
    assert mode.largest < 2 * 4096 * 64 / 2


def make_model(**changes):
    torch.manual_seed(0)
    config = make_config(mixer_types=["vq", "vq"], num_hidden_layers=2, **changes)
    return OVQForCausalLM(config).double().train()


def test_the_loss_of_a_model_in_training_has_the_commitment_in_it():
    ids = random_ids(2, 30)
    losses = [make_model(commitment_weight=weight)(ids, labels=ids).loss for weight in (0, 1, 3)]
    assert losses[1] > losses[0]
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]))
    found = [make_model(commitment_weight=weight).eval()(ids, labels=ids).loss for weight in (0, 3)]
    assert torch.equal(*found)
    mean = make_model(commitment_weight=1)
    torch.testing.assert_close(mean.model(ids).auxiliary_loss, losses[1] - losses[0])


def test_micro_batches_weigh_the_commitment_by_their_share():
    ids = random_ids(2, 30)
    whole = make_model(commitment_weight=1)(ids, labels=ids).loss
    half = make_model(commitment_weight=1)(ids, labels=ids, num_items_in_batch=torch.tensor(4 * 29)).loss
    torch.testing.assert_close(2 * half, whole)


def grads_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_learns_the_slots_once(use_reentrant):
    ids = random_ids(2, 30)
    models = [make_model(commitment_weight=1), make_model(commitment_weight=1)]
    enable_checkpointing(models[1], use_reentrant=use_reentrant)
    for _ in range(3):
        losses = []
        for model in models:
            torch.manual_seed(1)
            losses.append(model(ids, labels=ids).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
    torch.testing.assert_close(*map(grads_of, models))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_steps_that_end_in_one_backward_pass_read_the_slots_they_began_with(use_reentrant):
    texts = [random_ids(2, 30, seed=seed) for seed in (1, 2, 3)]
    models = [make_model(vq_decay=0.5), make_model(vq_decay=0.5)]
    enable_checkpointing(models[1], use_reentrant=use_reentrant)
    for model in models:
        torch.manual_seed(1)
        sum(model(ids, labels=ids).loss for ids in texts).backward()
    torch.testing.assert_close(*map(grads_of, models))
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_slots_stay_where_the_layer_is_frozen_unless_they_are_to_be_learned():
    ids = random_ids(2, 30)

    def is_moving(model):
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            model(ids, labels=ids)
        names = [name for name in before if not torch.equal(before[name], model.state_dict()[name])]
        assert all("dictionary" in name for name in names)
        return bool(names)

    model = make_model()
    assert is_moving(model)
    model.requires_grad_(False)
    assert not is_moving(model)
    for mixer in model.mixers():
        mixer.dictionary.requires_grad_(True)
    assert is_moving(model)
    model.requires_grad_(True)
    for mixer in model.mixers():
        mixer.dictionary.requires_grad_(False)
    assert not is_moving(model)


def test_slots_of_others_do_not_grow_with_those_of_ovq():
    model = OVQForCausalLM(make_config(mixer_types=["vq", "ovq"], num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"OVQ layers alone to depend on num_slots, found \['VQAttention'\]"):
        model.set_num_slots(20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected at least 1, found 0"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, found 0"),
        ({"vq_decay": 1.0}, r"vq_decay: expected a number in \[0, 1\), found 1.0"),
        ({"commitment_weight": -0.1}, "commitment_weight: expected at least 0, found -0.1"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQAttention(8, 1, **arguments)


def test_the_layer_is_attention_over_quantised_keys_with_a_gradient_straight_through():
    torch.manual_seed(0)
    layer = VQAttention(16, 2, num_slots=N, chunk_size=C, conv_size=0).double().eval()
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    q, k, v = layer.qkv_proj(x).unflatten(-1, (6, 8)).transpose(1, 2).chunk(3, dim=1)
    q, k = F.normalize(q, dim=-1) * layer.qk_norm.scale[:, None, None], F.normalize(k, dim=-1)
    means = layer.dictionary.means
    slots = (k[:, :, :, None] - means[:, None]).square().sum(-1).argmin(-1)
    expected = layer.o_proj(quadratic(q, k, v, slots, means).transpose(1, 2).flatten(2))
    found = layer(x)[0]
    torch.testing.assert_close(found, expected)
    parameters = list(layer.parameters())
    grads = [torch.autograd.grad(o.square().sum(), parameters) for o in (found, expected)]
    torch.testing.assert_close(*grads)

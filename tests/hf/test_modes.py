"""Under a `TorchDispatchMode`, models compute with operations what they compute with kernels otherwise."""

import contextlib
import functools

import pytest
import torch

from tests.convert.common import converted
from tests.ops.common import CPU
from tests.tiny import tiny_model
from tests.written import Called, seen_by_mode, without_kernels

pytestmark = pytest.mark.skipif(not CPU, reason="no compiler")

MODELS = {
    "ovq": lambda: tiny_model(num_slots=8, chunk_size=4, num_hidden_layers=4),
    "gates": lambda: tiny_model(
        num_slots=8, chunk_size=4, mixer_types=["ovq"], merge_gate=True, forget_gate=True, output_gate=True
    ),
    "converted": converted,
}
each_model = pytest.mark.parametrize("name", MODELS)
IDS = torch.randint(1, 64, (1, 40), generator=torch.Generator().manual_seed(0))


@each_model
def test_modes_see_a_loss_and_its_gradients(name):
    model = MODELS[name]()

    def gradients():
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        return loss, [weight.grad for weight in model.parameters()]

    expected = gradients()
    torch.testing.assert_close(seen_by_mode(gradients), expected, atol=1e-4, rtol=1e-3)


@each_model
@torch.no_grad()
def test_modes_see_generation(name):
    model = MODELS[name]()
    options = {
        "max_new_tokens": 20,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    generate = functools.partial(model.generate, IDS, **options)
    expected, found = generate(), seen_by_mode(generate)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-3)


@each_model
@torch.no_grad()
def test_modes_see_tokens_amid_others(name):
    """Kernels go on with the memory that operations have left, and the other way round."""
    model = MODELS[name]()

    def logits(seen):
        """Logits of tokens, and the operations that a mode saw of some of them."""
        cache = model(IDS[:, :11], use_cache=True).past_key_values
        outputs, names = [], []
        for i in range(11, 40):
            with Called() if i in seen else contextlib.nullcontext(Called()) as mode:
                outputs.append(model(IDS[:, i : i + 1], past_key_values=cache).logits)
            names += mode.names
        return torch.cat(outputs, 1), names

    expected, (found, seen) = logits(())[0], logits(range(15, 27))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    with without_kernels():
        assert seen == logits(range(15, 27))[1]


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8", "int4"])
@torch.no_grad()
def test_modes_see_products_with_narrow_weights(weight_dtype):
    """Their inputs then are not narrowed, so that the numbers differ more."""
    model = converted(weight_dtype=weight_dtype)
    expected = model(IDS).logits
    found = seen_by_mode(lambda: model(IDS).logits)
    assert (found - expected).norm() < 0.1 * expected.norm()

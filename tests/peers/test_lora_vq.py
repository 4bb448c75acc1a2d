"""LoRA on a model with `"vq"` layers: the adapter and its base model are all that there is to save."""

import copy

import pytest
import torch

from ovq.hf import OVQForCausalLM
from tests.hf.common import make_config, random_ids

peft = pytest.importorskip("peft")

# Of names that peft uses and transformers is about to rename.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::FutureWarning")]


def make_model():
    torch.manual_seed(0)
    return OVQForCausalLM(make_config(mixer_types=["vq", "vq"], num_hidden_layers=2, vq_decay=0.5))


def trained(**options):
    """The base model, the same with an adapter that was trained, and the buffers the training began with."""
    model = make_model()
    before = copy.deepcopy(dict(model.named_buffers()))
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for step in range(4):
        ids = random_ids(2, 30, seed=step)
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    return adapted.eval(), before


def reloaded(adapted, folder):
    adapted.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(make_model(), folder).eval()


@pytest.mark.parametrize("target_modules", ["all-linear", ["qkv_proj"], ["down_proj"]], ids=str)
def test_the_adapter_holds_all_that_was_learned(tmp_path, target_modules):
    adapted, before = trained(target_modules=target_modules)
    slots = {
        name: buffer for name, buffer in adapted.get_base_model().named_buffers() if "dictionary" in name
    }
    assert slots
    for name, buffer in slots.items():
        assert torch.equal(buffer, before[name]), name
    ids = random_ids(2, 40)
    logits = adapted(ids).logits
    assert not torch.allclose(logits, make_model().eval()(ids).logits)
    torch.testing.assert_close(reloaded(adapted, tmp_path)(ids).logits, logits, rtol=0, atol=0)


def test_slots_that_are_learned_with_the_adapter_are_saved_with_it(tmp_path):
    adapted, before = trained(modules_to_save=["dictionary"])
    wrapper = adapted.get_base_model().mixers()[0].dictionary
    assert not torch.equal(
        wrapper.modules_to_save["default"].key_sum, before["model.layers.0.mixer.dictionary.key_sum"]
    )
    assert torch.equal(wrapper.original_module.key_sum, before["model.layers.0.mixer.dictionary.key_sum"])
    ids = random_ids(2, 40)
    torch.testing.assert_close(reloaded(adapted, tmp_path)(ids).logits, adapted(ids).logits, rtol=0, atol=0)
    # Without its adapter the model is the base model, in training too.
    with adapted.train().disable_adapter():
        for seed in range(2):
            adapted(random_ids(2, 30, seed=seed))
        assert torch.equal(adapted.eval()(ids).logits, make_model().eval()(ids).logits)

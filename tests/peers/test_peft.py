"""LoRA of peft on every linear layer but the last: trained, saved, loaded, merged."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from ovq.hf import OVQForCausalLM
from tests.hf.common import random_ids
from tests.peers.models import SETS, make

pytestmark = pytest.mark.peers


@pytest.fixture(params=SETS, scope="module")
def base(request, tmp_path_factory):
    """The folder of a base model, in float64: merged or not, an adapter gives the same up to rounding."""
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base):
    """A model with an adapter, some steps into training, and the losses of the steps."""
    set_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(OVQForCausalLM.from_pretrained(base), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = random_ids(4, 21), []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def outputs_of(model):
    """Logits of a text, and what is generated from it."""
    ids = random_ids(2, 17, seed=5)
    with torch.no_grad():
        return model(input_ids=ids).logits, model.generate(input_ids=ids, max_new_tokens=9, do_sample=False)


def test_every_linear_layer_of_the_mixers_and_mlps_gets_an_adapter(trained):
    model, _ = trained
    linear = {
        name
        for name, module in model.get_base_model().model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }
    adapted = {
        name.removesuffix(".lora_A") + ".base_layer"
        for name, _ in model.get_base_model().model.named_modules()
        if name.endswith(".lora_A")
    }
    assert adapted == linear
    assert len(adapted) >= 8


def test_training_moves_the_adapter_alone(base, trained):
    model, losses = trained
    assert losses[-1] < 0.9 * losses[0]
    before = OVQForCausalLM.from_pretrained(base).state_dict()
    after = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    torch.testing.assert_close(after, dict(before), rtol=0, atol=0)


def test_a_loaded_adapter_gives_what_it_gave(base, trained, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(OVQForCausalLM.from_pretrained(base), tmp_path).eval()
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(outputs_of(loaded), outputs_of(model))
    with model.disable_adapter():
        assert not torch.allclose(outputs_of(model)[0], outputs_of(loaded)[0])


def test_a_merged_adapter_gives_what_it_gave(base, trained, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(OVQForCausalLM.from_pretrained(base), tmp_path / "adapter")
    merged = loaded.merge_and_unload().eval()
    assert type(merged) is OVQForCausalLM
    torch.testing.assert_close(outputs_of(merged), outputs_of(model))
    merged.save_pretrained(tmp_path / "merged")
    again = OVQForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(dict(again.state_dict()), dict(merged.state_dict()), rtol=0, atol=0)

"""Models whose weights accelerate keeps elsewhere give what they give with all of them in memory."""

import copy
from itertools import islice

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

from ovq.hf import OVQForCausalLM, build_context, load_context, save_context
from ovq.hf.context_file import fingerprint
from ovq.hf.streaming import stream_tokens
from ovq.layers import SequenceLayout
from ovq_lab.mixers import MIXERS
from tests.hf.common import left_padded, make_model, of_mixers, random_ids


def make_one(mixer, **changes):
    """A model of one kind of mixer, between two layers that are not looked at."""
    return make_model(num_hidden_layers=2, **of_mixers([mixer] * 2, num_sinks=2, sink_window=4), **changes)


def outputs_of(model):
    """Logits of padded rows, of a text in two parts, and tokens generated from it."""
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (14, 6)])
    padded = model(ids, attention_mask=mask).logits * mask[..., None]
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    packed = model(ids[:1], cu_seqlens=torch.tensor([0, 5, 14])).logits
    return padded, packed, generated


@pytest.fixture(scope="module", params=sorted(MIXERS))
def made(request):
    """A model and its outputs."""
    model = make_one(request.param)
    return model, outputs_of(model)


@pytest.fixture
def model(made):
    return copy.deepcopy(made[0])


# None of the others has buffers.
with_buffers = pytest.mark.parametrize(
    ("made", "offload_buffers"),
    [*((mixer, False) for mixer in sorted(MIXERS)), ("vq", True)],
    indirect=["made"],
)


@with_buffers
def test_offloaded_to_the_cpu(made, model, offload_buffers):
    names = set(model.state_dict())
    cpu_offload(model, offload_buffers=offload_buffers)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert set(model.state_dict()) == names
    assert model.device == torch.device("cpu")
    torch.testing.assert_close(outputs_of(model), made[1])


@with_buffers
def test_loaded_with_layers_on_disk(tmp_path, made, model, offload_buffers):
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "disk",
        "lm_head": "disk",
    }
    loaded = OVQForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=device_map,
        offload_folder=tmp_path / "offloaded",
        offload_buffers=offload_buffers,
    ).eval()
    assert all(parameter.is_meta for parameter in loaded.model.layers[0].parameters())
    torch.testing.assert_close(outputs_of(loaded), made[1])


def parts_of(module: nn.Module, name: str = ""):
    """Names of the modules with parameters or buffers of their own; those within such a one go with it."""
    if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        yield name
        return
    for child_name, child in module.named_children():
        yield from parts_of(child, f"{name}.{child_name}".strip("."))


def test_every_part_of_a_layer_in_a_place_of_its_own(tmp_path, made, model):
    device_map = {name: "disk" if i % 2 else "cpu" for i, name in enumerate(parts_of(model))}
    assert "model.layers.1.mixer.o_proj" in device_map or "model.layers.1.mixer" in device_map
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    torch.testing.assert_close(outputs_of(model), made[1])


def test_contexts_and_streams_of_an_offloaded_model(tmp_path):
    model = make_model()
    document, prompt = random_ids(1, 30), random_ids(1, 4, seed=2)[0].tolist()
    save_context(build_context(model, document), tmp_path / "whole.ctx")
    expected = fingerprint(model), list(islice(stream_tokens(model, prompt), 6))
    answers = [
        model.generate(**load_context(tmp_path / "whole.ctx", model).inputs([prompt]), max_new_tokens=6)
    ]
    partly = copy.deepcopy(model)
    cpu_offload(partly.model.layers[0])
    assert fingerprint(partly) == expected[0]
    cpu_offload(model)
    assert (fingerprint(model), list(islice(stream_tokens(model, prompt), 6))) == expected
    answers.append(
        model.generate(**load_context(tmp_path / "whole.ctx", model).inputs([prompt]), max_new_tokens=6)
    )
    assert torch.equal(*answers)


def test_learning_slots_that_are_offloaded_is_refused():
    model = make_one("vq").train()
    cpu_offload(model, offload_buffers=True)
    with pytest.raises(ValueError, match="slots of a 'vq' layer in memory in training, found them offloaded"):
        model(random_ids(1, 8))


def test_the_own_loss_of_a_layer_comes_through_the_hooks_of_accelerate():
    model, ids = make_one("vq").train(), random_ids(2, 14)
    dispatched = copy.deepcopy(model)
    dispatch_model(dispatched, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    outputs = [m.model(ids) for m in (model, dispatched)]
    assert outputs[0].auxiliary_loss > 0
    torch.testing.assert_close(outputs[1].auxiliary_loss, outputs[0].auxiliary_loss)


def test_a_layout_moves_to_a_device():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    layout = SequenceLayout.of(mask, batch_size=2, num_past=1, num_new=2)
    moved = layout.to("meta")
    assert moved.mask.is_meta
    assert moved.new_mask is None
    assert (moved.num_past, moved.num_new, moved.has_mask) == (1, 2, True)
    packed = SequenceLayout.of(None, batch_size=1, num_past=0, num_new=2, cu_seqlens=torch.tensor([0, 2]))
    assert packed.to("meta").cu_seqlens.is_meta
    assert packed.to("meta").bounds.bounds.tolist() == [[0], [2]]

"""What is not plainly one token of a plain model takes the modules, whatever was done before."""

import functools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotation

from ovq.convert import attach
from ovq.convert.step import MOST_ROWS
from ovq.ops import cpu_kernels
from tests.convert.common import IDS, MEMORY, SIZES, converted, original, read

pytestmark = pytest.mark.skipif(
    not cpu_kernels().startswith("compiled"), reason="there are no kernels on this machine"
)


def is_step(model, steps, *, num_rows=1, **options):
    """Whether the kernel does a token of the model."""
    _, cache = read(model, IDS[:num_rows, :20])
    steps[:] = 0, 0
    with torch.no_grad():
        model(IDS[:num_rows, 20:21], past_key_values=cache, **options)
    return steps[0] == 1


PLAIN_OPTIONS = [
    {},
    {"use_cache": True, "logits_to_keep": 1, "return_dict": True, "labels": None},
    {"attention_mask": torch.tensor([[0] * 5 + [1] * 16])},
    {"position_ids": torch.tensor([[20]]), "output_attentions": False},
]
OTHER_OPTIONS = [
    {"output_hidden_states": True},
    {"use_cache": False},
    {"return_dict": False},
    {"labels": torch.tensor([[3]])},
    {"logits_to_keep": torch.tensor([0])},
    {"attention_mask": torch.tensor([[1] * 20 + [0]])},
]


def test_arguments_that_ask_for_nothing_else(steps):
    assert all(is_step(converted(), steps, **options) for options in PLAIN_OPTIONS)


@pytest.mark.parametrize("options", OTHER_OPTIONS, ids=lambda x: next(iter(x)))
def test_arguments_that_ask_for_more(options, steps):
    assert not is_step(converted(), steps, **options)


@pytest.mark.parametrize("shape", [(1, 0), (2, 21)])
def test_masks_that_do_not_fit_are_refused(shape, steps):
    with pytest.raises(ValueError, match="expected 1 rows of at least the 1 new tokens"):
        is_step(converted(), steps, attention_mask=torch.ones(shape))


def test_hooks_that_capture_outputs_do_not_count_while_nothing_is_captured(steps):
    model = converted()
    _, cache = read(model, IDS[:1, :20])
    with torch.no_grad():
        # transformers leaves its hooks in place.
        model(IDS[:1, 20:21], past_key_values=cache, output_hidden_states=True)
        steps[:] = 0, 0
        model(IDS[:1, 21:22], past_key_values=cache)
        assert steps == [1, 0]
        found = model(IDS[:1, 22:23], past_key_values=cache, output_hidden_states=True)
        assert len(found.hidden_states) == model.config.num_hidden_layers + 1
        # Another hook beside them.
        model.model.layers[1].register_forward_hook(lambda *args: None)
        model(IDS[:1, 23:24], past_key_values=cache)
        assert steps == [1, 2]


def test_embeddings_and_several_tokens_and_no_cache(steps):
    model = converted()
    _, cache = read(model, IDS[:1, :20])
    steps[:] = 0, 0
    with torch.no_grad():
        model(inputs_embeds=model.model.embed_tokens(IDS[:1, :1]), past_key_values=cache)
        model(IDS[:1, 20:22], past_key_values=cache)
        model(IDS[:1, :1])
        # A first token makes the memory.
        model(IDS[:1, :1], past_key_values=model.make_cache())
        # Padding that is not named.
        model(IDS[:1, 20:21], torch.tensor([[1] * 23 + [0]]), past_key_values=cache)
    assert steps == [0, 5]


def test_gradients_and_training(steps):
    model = converted()
    _, cache = read(model, IDS[:1, :20])
    steps[:] = 0, 0
    assert model(IDS[:1, :1], past_key_values=cache).logits.requires_grad
    with torch.no_grad():
        model.train()(IDS[:1, :1], past_key_values=cache)
        model.eval()
        model.model.layers[0].self_attn.training = True
        model(IDS[:1, :1], past_key_values=cache)
    assert steps == [0, 3]


def test_weights_that_do_not_count_their_changes(steps):
    with torch.inference_mode():
        model = converted()
    assert not is_step(model, steps)


def test_many_rows(steps):
    model, cache = converted(), converted().make_cache()
    ids = IDS[:1].expand(MOST_ROWS + 1, -1)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        steps[:] = 0, 0
        model(ids[:, 20:21], past_key_values=cache)
        cache.batch_select_indices(torch.arange(MOST_ROWS))
        model(ids[1:, 20:21], past_key_values=cache)
    assert steps == [1, 1]


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *args: None)


def pre_hooked(model):
    model.model.register_forward_pre_hook(lambda *args: None)


def replaced(model):
    layer = model.model.layers[0]
    layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)


def overridden(model):
    norm = model.model.norm
    norm.forward = functools.partial(norm.forward)


def of_another_class(model):
    norm = model.model.norm
    norm.__class__ = type("Norm", (type(norm),), {})


def swapped(model):
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[1], layers[0]]).eval()


def activated(model):
    model.model.layers[0].mlp.act_fn = nn.GELU()


def shortened(model):
    model.config.num_hidden_layers = 1


def normless(model):
    model.model.norm = nn.Identity()


def half_wide(model):
    model.lm_head.bfloat16()


def strided(model):
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()


def attending(model):
    model.config._attn_implementation = "eager"


def windowed(model):
    model.model.layers[0].self_attn.sliding_window = 4


CHANGES = [hooked, pre_hooked, replaced, overridden, of_another_class, swapped, activated, strided, normless]


@pytest.mark.parametrize("change", CHANGES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("has_written", [False, True])
def test_changed_models_take_their_modules(change, has_written, steps):
    model = converted()
    if has_written:
        assert is_step(model, steps)
    change(model)
    assert not is_step(model, steps)


class Rotation(nn.Module):
    """What the library `kernels` makes of transformers' function."""

    def forward(self, *args):
        return llama_rotation(*args)


Rotation.__module__ = "kernels.layer.layer"


@pytest.mark.parametrize("has_written", [False, True])
def test_the_library_kernels_does_not_count_where_it_changes_nothing(has_written, steps, monkeypatch):
    """As transformers sets the code of pretrained models since 5.25, on devices without other code."""
    model, rotation = converted(), Rotation()
    if has_written:
        assert is_step(model, steps)
    for each in (rotation, *model.modules()):
        each.forward = each.forward
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotation)
    assert is_step(model, steps)
    rotation.forward = functools.partial(llama_rotation)
    assert not is_step(model, steps)


def patched(name, *, as_class=False):
    """The object in which code is replaced, the name there, and a replacement that changes no result."""
    if name == "apply_rotary_pos_emb":
        return modeling_llama, name, lambda *args, **options: llama_rotation(*args, **options)
    kind = getattr(modeling_llama, name)
    forward = kind.forward

    def same(*args, **options):
        return forward(*args, **options)

    return (
        (modeling_llama, name, type(name, (kind,), {"forward": same}))
        if as_class
        else (kind, "forward", same)
    )


@pytest.mark.parametrize("has_written", [False, True])
@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaRMSNorm", "LlamaModel", "apply_rotary_pos_emb"])
def test_patched_code_of_transformers_is_run(name, has_written, steps, monkeypatch):
    model = converted()
    if has_written:
        assert is_step(model, steps)
    with monkeypatch.context() as patch:
        patch.setattr(*patched(name))
        assert not is_step(model, steps)
    assert is_step(model, steps)


def test_classes_of_other_libraries_are_run(steps, monkeypatch):
    monkeypatch.setattr(*patched("LlamaMLP", as_class=True))
    model = attach(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), **MEMORY)
    assert type(model.model.layers[0].mlp) is modeling_llama.LlamaMLP
    assert not is_step(model, steps)
    # Later versions may rename a class.
    with monkeypatch.context() as patch:
        patch.delattr(modeling_llama, "LlamaMLP")
        assert not is_step(model, steps)


def test_a_bias_that_is_added_counts(steps):
    model = converted()
    assert is_step(model, steps)
    for layer in (model.model.layers[0].mlp.down_proj, model.lm_head):
        layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features))
        _, cache = read(model, IDS[:1, :20])
        steps[:] = 0, 0
        with torch.no_grad():
            found = model(IDS[:1, 20:21], past_key_values=cache).logits
            expected = model(IDS[:1, :21]).logits[:, -1:]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert steps[0] == 1


@pytest.mark.parametrize("change", [shortened, half_wide, attending, windowed], ids=lambda x: x.__name__)
def test_models_that_modules_refuse_are_not_read_by_kernels(change, steps):
    model = converted("qwen2")
    _, cache = read(model, IDS[:1, :20])
    steps[:] = 0, 0
    change(model)

    def go_on():
        model(IDS[:1, 20:21], past_key_values=cache)
        # Fewer layers than the memory has do not fail, but are out of step.
        return cache.num_columns

    with torch.no_grad(), pytest.raises((RuntimeError, ValueError, IndexError)):
        go_on()
    assert steps == [0, 1]


def test_autocast_and_hooks_on_all_modules(steps):
    model = converted()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_step(model, steps)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not is_step(model, steps)
    finally:
        handle.remove()
    assert is_step(model, steps)


def test_models_of_other_kinds_and_numbers(steps):
    class Own(LlamaForCausalLM):
        """A class that may compute something else."""

    torch.manual_seed(0)
    assert not is_step(attach(Own(LlamaConfig(**SIZES)).eval(), **MEMORY), steps)
    assert not is_step(attach(original().double(), **MEMORY), steps)


def test_without_kernels(steps, monkeypatch):
    monkeypatch.setattr("ovq.convert.step.is_available", lambda: False)
    assert not is_step(converted(), steps)


def test_caches_of_others(steps):
    model = converted()
    with torch.no_grad():
        # Other budgets of the same heads can be read.
        _, cache = read(converted(num_slots=8), IDS[:1, :20])
        steps[:] = 0, 0
        model(IDS[:1, 20:21], past_key_values=cache)
        assert steps == [1, 0]
        _, cache = read(model, IDS[:2, :20])
        steps[:] = 0, 0
        with pytest.raises(ValueError, match="another batch"):
            model(IDS[:1, 20:21], past_key_values=cache)
    assert steps == [0, 1]


def test_a_call_that_has_failed_half_way_is_not_gone_on_from(steps):
    model = converted()
    _, cache = read(model, IDS[:1, :20])
    cache.layers[1].num_columns += 1
    with torch.no_grad(), pytest.raises(ValueError, match="layers"):
        model(IDS[:1, 20:21], past_key_values=cache)
    cache.layers[1].num_columns -= 1
    cache.layers[1].has_staged = True
    steps[:] = 0, 0
    with torch.no_grad(), pytest.raises(ValueError, match="attention function"):
        model(IDS[:1, 20:21], past_key_values=cache)
    assert steps == [0, 1]

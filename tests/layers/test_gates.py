"""OVQ layers with a window, sinks, a merge gate and a temperature of slots: alone, in a model, in parts."""

import pytest
import torch
from transformers.trainer_pt_utils import get_parameter_names

from ovq.hf import OVQCache, OVQConfig, OVQForCausalLM, build_context, load_context, save_context
from ovq.layers import OVQAttention, SequenceLayout
from ovq.ops import backend_used
from ovq.parallel.segment import Segment
from ovq.train.config import ModelArgs
from ovq.train.recipes import get_recipe

OPTIONS = {
    "window": 8,
    "num_sinks": 2,
    "exact_rope_dim": 2,
    "merge_gate": True,
    "slot_temperature": True,
    "merge": "ward-sqrt",
}
FIELDS = {"ovq_sinks" if name == "num_sinks" else name: value for name, value in OPTIONS.items()}


def layer(**options):
    """A small layer in float64, its gate and its temperatures away from where they start."""
    torch.manual_seed(0)
    made = OVQAttention(16, 4, 2, num_slots=8, chunk_size=4, conv_size=3, **options).double()
    if made.merge_gate is not None:
        torch.nn.init.normal_(made.merge_gate.weight)
    if made.slot_norm is not None:
        torch.nn.init.uniform_(made.slot_norm.beta, 0.5, 2)
    return made


def model(**fields):
    """A small model in float64, likewise."""
    torch.manual_seed(0)
    config = OVQConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_slots=8,
        chunk_size=4,
        sliding_window=4,
        initializer_range=0.3,
        **FIELDS | fields,
    )
    made = OVQForCausalLM(config).double().eval()
    for name, parameter in made.named_parameters():
        if name.endswith("merge_gate.weight"):
            assert not bool(parameter.any()), "a gate starts at 0"
            torch.nn.init.normal_(parameter)
    return made


def test_a_new_layer_with_gate_and_temperature_is_one_without():
    options = {"window": 4, "num_sinks": 1}
    plain = layer(**options)
    torch.manual_seed(0)
    gated = OVQAttention(
        16, 4, 2, num_slots=8, chunk_size=4, conv_size=3, merge_gate=True, slot_temperature=True, **options
    ).double()
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["merge_gate.weight", "slot_norm.beta"], [])
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    torch.testing.assert_close(gated(x)[0], plain(x)[0], rtol=1e-10, atol=1e-10)
    gated(x)[0].square().sum().backward()
    for parameter in (gated.merge_gate.weight, gated.slot_norm.beta):
        assert float(parameter.grad.abs().max()) > 1e-6


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_the_output(name):
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    plain, changed = (layer(**options) for options in ({}, {name: OPTIONS[name]}))
    changed.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(plain(x)[0], changed(x)[0], atol=1e-4)
    assert f"window={changed.window}" in changed.extra_repr() or not changed.window


def test_a_padded_batch_in_parts_and_its_bytes():
    mixer = layer(**OPTIONS)
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    mask = torch.ones(2, 33)
    mask[1, :5] = 0
    whole, _, cache = mixer(x, mask, use_cache=True)
    assert backend_used() == "torch"
    outputs, in_parts, start = [], None, 0
    with torch.no_grad():
        for piece in (9, 1, 1, 17, 5):
            stop = start + piece
            o, _, in_parts = mixer(x[:, start:stop], mask[:, :stop], past_key_values=in_parts, use_cache=True)
            outputs.append(o)
            start = stop
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-8, atol=1e-8)
    for each in (cache, in_parts):
        assert each.nbytes == 2 * mixer.state_bytes(33, torch.float64)
    alone, _, _ = mixer(x[1:, 5:])
    torch.testing.assert_close(whole[1:, 5:], alone, rtol=1e-8, atol=1e-8)
    assert mixer.has_bounded_state


def test_generation_and_contexts_of_a_model(tmp_path):
    own = model()
    ids = torch.randint(0, 20, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = own.generate(ids, max_new_tokens=12, do_sample=False)
        expected = own(made[:, :-1]).logits[:, 29:].argmax(-1)
    assert torch.equal(made[:, 30:], expected)
    save_context(build_context(own, ids[0]), tmp_path / "context")
    loaded = load_context(tmp_path / "context", own)
    with torch.no_grad():
        after = own(made[:, 30:], past_key_values=loaded.cache()).logits
        torch.testing.assert_close(after, own(made).logits[:, 30:], rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="window"):
        load_context(tmp_path / "context", model(window=4))


def test_saved_and_loaded_a_model_is_the_same(tmp_path):
    own = model()
    own.save_pretrained(tmp_path)
    again = OVQForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (again.config.window, again.config.ovq_sinks, again.config.merge_gate) == (8, 2, True)
    ids = torch.arange(30)[None] % 20
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, own(ids).logits, rtol=1e-12, atol=1e-12)


def test_a_document_split_over_ranks_has_the_gradients_of_the_whole():
    """What context parallelism hands on: the window, weights and sinks are part of the state."""
    own = model()
    block, config = own.model.layers[1], own.config
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    block(leaf, SequenceLayout(num_past=0, num_new=30))[0].square().sum().backward()
    expected = [p.grad.clone() for p in block.parameters()]
    own.zero_grad()
    first = Segment(block, 1, config, x[:, :14], {}, SequenceLayout(num_past=0, num_new=14), recompute=False)
    hidden, state = first.forward()
    handed = {name: t.detach().clone() for name, t in state.items()}
    spec = block.mixer.state_spec(14, torch.float64)
    assert {name: (tuple(t.shape[1:]), t.dtype) for name, t in handed.items()} == spec
    last = Segment(
        block, 1, config, x[:, 14:], handed, SequenceLayout(num_past=14, num_new=16), recompute=True
    )
    after, _ = last.forward()
    grad, grads = last.backward(2 * after.detach(), {})
    floating = {name: g for name, g in grads.items() if handed[name].is_floating_point()}
    grad_first, _ = first.backward(2 * hidden.detach(), floating)
    torch.testing.assert_close(torch.cat([grad_first, grad], 1), leaf.grad, rtol=1e-7, atol=1e-7)
    for parameter, reference in zip(block.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-7, atol=1e-7)


def test_contexts_of_different_lengths_are_joined():
    """Rows that begin later are rotated to their new columns, in the components that depend on these."""
    own = model(merge_gate=False)
    ids = torch.randint(0, 20, (2, 40), generator=torch.Generator().manual_seed(2))
    contexts = [build_context(own, ids[0, :29]), build_context(own, ids[1, :18])]
    with torch.no_grad():
        joined = OVQCache.concatenate([context.cache() for context in contexts], own.config)
        mask = torch.ones(2, 29 + 9)
        mask[1, :11] = 0
        next_ids = torch.stack([ids[0, 29:38], ids[1, 18:27]])
        o = own(next_ids, attention_mask=mask, past_key_values=joined).logits
        for row, end in ((0, 38), (1, 27)):
            alone = own(ids[row : row + 1, :end]).logits[:, -9:]
            torch.testing.assert_close(o[row : row + 1], alone, rtol=1e-7, atol=1e-7)


def test_temperatures_do_not_decay_and_gates_do():
    # The names that transformers' Trainer leaves out.
    decayed = get_parameter_names(model(), [], [r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"])
    assert any(name.endswith("merge_gate.weight") for name in decayed)
    assert not any(name.endswith("slot_norm.beta") for name in decayed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 6}, r"window: expected a multiple of chunk_size \(4\), found 6"),
        ({"ovq_sinks": 4}, "ovq_sinks: expected an integer from 0 to 3"),
        ({"exact_rope_dim": 3}, "exact_rope_dim: expected an even number, found 3"),
        ({"rope_mixers": ["ovq"]}, "exact_rope_dim: expected 0 where all components are rotated, found 2"),
        (
            {"merge": "existing", "window": 0, "ovq_sinks": 0, "exact_rope_dim": 0, "rate": 0.5},
            "merge_gate: expected False with a constant rate, found True",
        ),
    ],
    ids=str,
)
def test_a_config_refuses_what_the_op_would(fields, message):
    with pytest.raises(ValueError, match=message):
        OVQConfig(num_slots=8, chunk_size=4, **FIELDS | fields)


def test_recipes_take_the_options():
    run = get_recipe("recall-ovq").override(
        ["model.window=64", "model.ovq_sinks=2", "model.merge_gate=true", "model.slot_temperature=true"]
    )
    assert (run.model.window, run.model.ovq_sinks, run.model.merge_gate) == (64, 2, True)
    with pytest.raises(ValueError, match=r"model.window: expected at least 0, found -1"):
        ModelArgs(window=-1)
    with pytest.raises(ValueError, match="num_sinks: expected an integer from 0 to 2, less than num_slots"):
        layer(num_sinks=3).set_num_slots(3)

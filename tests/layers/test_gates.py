"""OVQ layers with a merge gate, a forget gate or both: alone, in a model, in parts."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.trainer_pt_utils import get_parameter_names

from ovq.hf import OVQConfig, OVQForCausalLM, build_context, load_context, save_context
from ovq.hf.block import build_mixer
from ovq.layers import OVQAttention, SequenceLayout
from ovq.layers.gates import ForgetGate
from ovq.parallel.segment import Segment
from ovq_lab.mixers import MIXERS
from ovq_lab.train.recipes import get_recipe
from tests.tiny import tiny_model

GATES = {
    "merge": {"merge_gate": True},
    "forget": {"forget_gate": True},
    "both": {"merge_gate": True, "forget_gate": True},
    "all": {"merge_gate": True, "forget_gate": True, "output_gate": True},
}
each_gate = pytest.mark.parametrize("gates", GATES.values(), ids=GATES)


def layer(**options):
    """A small layer in float64, its gates away from where they start."""
    torch.manual_seed(0)
    made = OVQAttention(16, 4, 2, num_slots=8, chunk_size=4, conv_size=3, **options).double()
    _move_gates(made)
    return made


def _move_gates(module):
    for name, parameter in module.named_parameters():
        if name.endswith("merge_gate.weight"):
            assert not bool(parameter.any()), "a gate starts at 0"
        if "_gate." in name:
            torch.nn.init.normal_(parameter)


def model(gates, **fields):
    """A small model in float64, likewise."""
    sizes = {"vocab_size": 20, "num_slots": 8, "chunk_size": 4, "sliding_window": 4, "initializer_range": 0.3}
    made = tiny_model(merge="nearest", **sizes, **gates | fields).double()
    _move_gates(made)
    return made


@pytest.mark.parametrize("name", [name for name in MIXERS if "output_gate" in MIXERS[name].own_fields()])
def test_outputs_of_every_attention_layer_are_normalised_per_head_and_gated(name):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "head_dim": 6, "num_slots": 8, "chunk_size": 4}
    config = OVQConfig(**sizes, num_hidden_layers=1, mixer_types=[name], output_gate=True)
    mixer = build_mixer(config, 0).double().eval()
    torch.nn.init.uniform_(mixer.output_gate.norm.weight)
    x, gate = torch.randn(2, 20, 16, dtype=torch.float64), mixer.output_gate
    found, mixer.output_gate = mixer(x)[0], None
    before = []
    mixer.o_proj.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    mixer(x)
    heads = before[0].unflatten(2, (4, 6))
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gate.norm.weight
    product = x @ gate.proj.weight.T
    gated = heads.flatten(2) * product * product.sigmoid()
    torch.testing.assert_close(found, gated @ mixer.o_proj.weight.T)


def test_a_new_layer_with_a_merge_gate_is_one_without():
    plain = layer()
    torch.manual_seed(0)
    gated = OVQAttention(16, 4, 2, num_slots=8, chunk_size=4, conv_size=3, merge_gate=True).double()
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["merge_gate.weight"], [])
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    torch.testing.assert_close(gated(x)[0], plain(x)[0], rtol=1e-10, atol=1e-10)
    gated(x)[0].square().sum().backward()
    assert float(gated.merge_gate.weight.grad.abs().max()) > 1e-6


@each_gate
def test_a_trained_gate_changes_the_output(gates):
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    plain, changed = layer(), layer(**gates)
    changed.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(plain(x)[0], changed(x)[0], atol=1e-4)


def test_a_new_forget_gate_forgets_at_the_pace_of_each_head():
    """A factor of e in 4, 128 and 4,096 tokens, whatever is read."""
    gate = ForgetGate(8, num_kv_heads=3)
    logs = gate(torch.randn(2, 5, 8))
    torch.testing.assert_close(
        -1 / logs, torch.tensor([4.0, 128.0, 4096.0]).expand(2, 5, 3), rtol=1e-3, atol=0
    )
    alone = ForgetGate(8, num_kv_heads=1)(torch.zeros(1, 1, 8))
    torch.testing.assert_close(-1 / alone, torch.full_like(alone, 4096.0), rtol=1e-2, atol=0)


@each_gate
@torch.no_grad()
def test_a_token_that_is_not_finite_spoils_its_row_alone(gates):
    """Read whole, and token by token, in a call per layer and in one for the whole model."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 16)
    made = layer(**gates).float()
    expected = made(x)[0]
    for number in (torch.nan, torch.inf, -torch.inf):
        x[1, 20, 0] = number
        found = made(x)[0]
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1, :20], expected[1, :20])
        own = model(gates).float()
        embedded = own.get_input_embeddings()(torch.arange(80).view(2, 40) % 20)
        whole = own(inputs_embeds=embedded).logits
        embedded[1, 20, 0] = number
        cache = own.make_cache()
        steps = [own(inputs_embeds=e, past_key_values=cache).logits for e in embedded.split(1, 1)]
        torch.testing.assert_close(torch.cat(steps, 1)[0], whole[0], rtol=1e-4, atol=1e-4)


@each_gate
def test_a_padded_batch_in_parts_and_its_bytes(gates):
    mixer = layer(**gates, merge="nearest")
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    mask = torch.ones(2, 33)
    mask[1, :5] = 0
    whole, _, cache = mixer(x, mask, use_cache=True)
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


@each_gate
@pytest.mark.parametrize("num_new", [1, 6])
def test_what_inference_mode_has_read_is_trained_on(gates, num_new):
    mixer, x = layer(**gates), torch.randn(1, 13, 16, dtype=torch.float64)

    def gradients(reading):
        mixer.zero_grad()
        with reading():
            _, _, cache = mixer(x[:, :7], use_cache=True)
        o, _, _ = mixer(x[:, 7 : 7 + num_new], past_key_values=cache)
        o.square().sum().backward()
        return [p.grad.clone() for p in mixer.parameters()]

    found, expected = map(gradients, (torch.inference_mode, torch.no_grad))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@each_gate
def test_generation_and_contexts_of_a_model(gates, state_dtype, tmp_path):
    own = model(gates, state_dtype=state_dtype)
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
    with pytest.raises(ValueError, match="_gate=False"):
        load_context(tmp_path / "context", model({}, state_dtype=state_dtype))


@each_gate
def test_saved_and_loaded_a_model_is_the_same(gates, tmp_path):
    own = model(gates)
    own.save_pretrained(tmp_path)
    again = OVQForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {name: getattr(again.config, name) for name in gates} == gates
    ids = torch.arange(30)[None] % 20
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, own(ids).logits, rtol=1e-12, atol=1e-12)


@each_gate
def test_a_document_split_over_ranks_has_the_gradients_of_the_whole(gates):
    """What context parallelism hands on: weights, and what was forgotten, are part of the state."""
    own = model(gates)
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


def test_gates_decay():
    # The names that transformers' Trainer leaves out.
    excluded = [r"bias", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = get_parameter_names(model(GATES["both"]), [], excluded)
    for name in GATES["both"]:
        assert any(each.endswith(f"{name}.weight") for each in decayed)
    assert not any(name.endswith("bias") for name in decayed)


@pytest.mark.parametrize("name", ["merge_gate", "forget_gate"])
def test_a_config_refuses_a_gate_at_a_constant_rate(name):
    with pytest.raises(ValueError, match=f"{name}: expected False with a constant rate, found True"):
        OVQConfig(**{name: True}, ablation={"rate": 0.5})


def test_recipes_take_gates():
    model = get_recipe("recall-ovq").override(["model.merge_gate=true", "model.forget_gate=true"]).model
    assert (model.merge_gate, model.forget_gate) == (True, True)


def test_a_sharded_gate_sets_its_own_weights():
    """As trainers do with a model that was made on the meta device and sharded before it has numbers."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            gate = ForgetGate(8, num_kv_heads=3)
        fully_shard(gate, mesh=init_device_mesh("cpu", (1,)))
        gate.to_empty(device="cpu").reset_parameters()
        for name, expected in ForgetGate(8, num_kv_heads=3).state_dict().items():
            assert torch.equal(getattr(gate, name).full_tensor(), expected)
    finally:
        torch.distributed.destroy_process_group()

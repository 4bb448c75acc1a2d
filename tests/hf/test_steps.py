"""Decoding with whole layers in one call, or parts of them, is decoding with their modules, one by one."""

import functools

import pytest
import torch
from torch import nn

from ovq.hf import OVQConfig, OVQForCausalLM, block
from ovq.layers import OVQAttention
from ovq.layers.common import QKNorm
from ovq.layers.gates import ForgetGate, MergeGate, OutputGate
from ovq.layers.products import Linear
from ovq.ops import cpu_kernels
from tests.hf.common import random_ids
from tests.ops.common import other_defaults

SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_slots": 9,
    "chunk_size": 4,
    "sliding_window": 5,
    "initializer_range": 0.3,
}
needs_kernels = pytest.mark.skipif("compiled" not in cpu_kernels(), reason=cpu_kernels())


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = OVQForCausalLM(OVQConfig(**SIZES | changes)).eval()
    for module in model.modules():
        # Temperatures that differ from head to head, and weights from token to token.
        if isinstance(module, QKNorm):
            nn.init.uniform_(module.beta, 0.5, 1.5)
        if isinstance(module, MergeGate | ForgetGate):
            nn.init.normal_(module.weight, std=0.5)
        if isinstance(module, OutputGate):
            nn.init.uniform_(module.norm.weight, 0.5, 1.5)
            # Other than those of the norms around layers.
            module.norm.eps = 0.02
    return model


@torch.no_grad()
def decoded(model, ids, num_read=6, mask=None):
    """Logits after each of the tokens that are read one by one, and the cache after all."""
    cache, found = model.make_cache(), []
    for first, end in ((0, num_read), *((t, t + 1) for t in range(num_read, ids.shape[1]))):
        seen = None if mask is None else mask[:, :end]
        found.append(model(ids[:, first:end], seen, past_key_values=cache).logits[:, -1:])
    return torch.cat(found[1:], 1), cache


@pytest.fixture
def runs(monkeypatch):
    """How many layers each call of the kernel has run."""
    numbers, run = [], block.run_layers

    def counted(hidden_states, layers):
        done = run(hidden_states, layers)
        if done is not None:
            numbers.append(len(layers))
        return done

    monkeypatch.setattr(block, "run_layers", counted)
    return numbers


def by_modules(monkeypatch, function):
    """What a function returns where no layer runs in one call."""
    with monkeypatch.context() as patch:
        patch.setattr(block.OVQBlock, "token_step", lambda *args: None)
        return function()


def assert_same(found, expected, tolerance=2e-5):
    (logits, cache), (of_modules, other) = found, expected
    torch.testing.assert_close(logits, of_modules, atol=tolerance, rtol=tolerance)
    for layer, reference in zip(cache.layers, other.layers, strict=True):
        parts, expected_parts = layer.parts(), reference.parts()
        assert parts.keys() == expected_parts.keys()
        assert layer.get_seq_length() == reference.get_seq_length()
        for name, part in parts.items():
            if name.startswith("pending") and part.dim() > 2:
                num = int(layer.state.num_pending.max())
                part, expected_parts[name] = part[:, :, :num], expected_parts[name][:, :, :num]
            # Sums of other orders may round to the next number of a narrow format.
            is_narrow = part.dtype in (torch.int8, torch.bfloat16)
            bounds = {"atol": 1.0, "rtol": 2**-7} if is_narrow else {"atol": tolerance, "rtol": tolerance}
            torch.testing.assert_close(part, expected_parts[name], **bounds)


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_mixers": ["ovq", "sliding_attention"], "num_key_value_heads": 4},
        {"merge_gate": True, "num_key_value_heads": 1},
        {"logn_length": 9},
        {"merge_gate": True, "merge": "nearest", "conv_size": 0},
        {"forget_gate": True, "num_key_value_heads": 1},
        {"forget_gate": True, "merge_gate": True, "merge": "nearest"},
        {"merge": "nearest", "conv_size": 2, "head_dim": 20, "intermediate_size": 70, "hidden_size": 40},
        {"mixer_types": ["ovq"] * 4, "growth": "linear"},
        {"output_gate": True, "forget_gate": True, "merge": "nearest"},
        {"output_gate": True, "num_key_value_heads": 1, "state_dtype": "int8"},
        {"state_dtype": "int8", "merge_gate": True},
        {"state_dtype": "int8", "forget_gate": True},
        {"state_dtype": "bfloat16", "forget_gate": True, "merge_gate": True, "merge": "nearest"},
        {"state_dtype": "bfloat16", "merge": "nearest"},
        {"mixer_types": ["sliding_attention", "mamba2", "sliding_attention", "ovq"], "rope_mixers": []},
        # So large that threads share the work.
        {
            "hidden_size": 192,
            "intermediate_size": 200,
            "head_dim": 48,
            "num_hidden_layers": 2,
            "output_gate": True,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 3])
def test_one_call_gives_what_the_modules_give(monkeypatch, runs, changes, rows):
    model, ids = make_model(**changes), random_ids(rows, 22)
    found = decoded(model, ids)
    is_mixed = "mamba2" in model.config.mixer_types
    # All but the first step are one call, or one before and one after another mixer, also after a merge.
    for num_layers in (1, 2) if is_mixed else (model.config.num_hidden_layers,):
        assert runs.count(num_layers) >= 15, runs
    # Where outputs are small, their norm magnifies rounding.
    tolerance = 1e-4 if model.config.output_gate else 2e-5
    assert_same(found, by_modules(monkeypatch, lambda: decoded(model, ids)), tolerance)


@needs_kernels
@torch.no_grad()
def test_a_step_gives_way_to_slots_of_another_format(runs):
    model, ids = make_model(num_hidden_layers=2), random_ids(1, 12)
    _, cache = decoded(model, ids)
    num_runs = len(runs)
    model.set_state_dtype("int8")
    model(ids[:, :1], past_key_values=cache)
    assert cache.layers[1].state.state_dtype == "int8"
    model(ids[:, :1], past_key_values=cache)
    # The windows alone, then both layers again.
    assert runs[num_runs:] == [1, 2]


@needs_kernels
@torch.no_grad()
def test_tokens_of_next_to_no_weight_and_sharp_queries(runs):
    """Both gates with scores beyond 34: what a token counts for must not be divided by."""
    model, ids = (
        make_model(merge_gate=True, forget_gate=True, mixer_types=["ovq"], num_hidden_layers=1),
        random_ids(2, 30),
    )
    for module in model.modules():
        if isinstance(module, QKNorm):
            nn.init.constant_(module.beta, 20.0)
        if isinstance(module, MergeGate):
            nn.init.normal_(module.weight, std=60.0)
    found, cache = decoded(model, ids)
    assert runs.count(1) >= 20
    assert bool((cache.layers[0].state.weight < 1e-30).any())
    torch.testing.assert_close(found, model(ids).logits[:, 6:], rtol=1e-3, atol=1e-3)


@needs_kernels
def test_padded_rows_at_different_places(monkeypatch, runs):
    model, ids = make_model(merge_gate=True, forget_gate=True), random_ids(3, 22)
    mask = (torch.arange(22) >= torch.tensor([0, 2, 5])[:, None]).long()
    found = decoded(model, ids, mask=mask)
    assert runs.count(4) >= 3
    assert_same(found, by_modules(monkeypatch, lambda: decoded(model, ids, mask=mask)))
    # Padding among the new tokens is for the modules.
    runs.clear()
    right = mask.clone()
    right[:, -1] = torch.tensor([1, 1, 0])
    expected = by_modules(monkeypatch, lambda: decoded(model, ids[:, :21], mask=right[:, :21]))
    model(ids[:, 21:], right, past_key_values=expected[1])
    assert not runs


@needs_kernels
def test_padded_rows_beyond_the_length_of_scaling_run_by_modules(monkeypatch, runs):
    model, ids = make_model(logn_length=9), random_ids(2, 22)
    mask = (torch.arange(22) >= torch.tensor([0, 4])[:, None]).long()
    found = decoded(model, ids, mask=mask)
    # The first step makes what the kernel needs. Beyond the length windows alone run in calls of their own.
    assert runs[:4] == [1, 1, 4, 4]
    assert set(runs[4:]) == {1}
    assert_same(found, by_modules(monkeypatch, lambda: decoded(model, ids, mask=mask)))
    alone, _ = by_modules(monkeypatch, lambda: decoded(model, ids[1:, 4:], num_read=2))
    torch.testing.assert_close(found[0][1:], alone, atol=2e-5, rtol=2e-5)


@needs_kernels
def test_the_same_text_is_generated(monkeypatch, runs):
    model, ids = make_model(merge_gate=True), random_ids(2, 9)

    # No layer needs positions, which would become longer with every token.
    positions = []
    model.register_forward_pre_hook(
        lambda model, args, kwargs: positions.append(kwargs.get("position_ids")), with_kwargs=True
    )

    def text():
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    found = text()
    assert runs.count(4) >= 15
    assert torch.equal(found, by_modules(monkeypatch, text))
    assert set(positions) == {None}


@needs_kernels
@torch.no_grad()
def test_caches_that_share_tensors_stay_as_they_are(runs):
    model, ids = make_model(), random_ids(1, 20)
    cache = decoded(model, ids[:, :10])[1]
    kept = cache.snapshot()
    expected, _ = decoded(model, ids)
    for branch in (kept.snapshot(), cache, kept):
        # Another text first, in a cache of its own.
        spoilt = kept.snapshot()
        for t in range(3):
            model(ids[:, t : t + 1] * 0 + 7, past_key_values=spoilt)
        logits = [model(ids[:, t : t + 1], past_key_values=branch).logits for t in range(10, 20)]
        torch.testing.assert_close(torch.cat(logits, 1), expected[:, -10:], atol=2e-5, rtol=2e-5)
    assert 4 in runs


class OtherLinear(Linear):
    """As an adapter would put in the place of a projection."""


class OtherMixer(OVQAttention):
    """As a plugin would have it."""


def hooked(name):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda *args: None)


def with_forward(model):
    norm = model.get_submodule("model.layers.1.mixer.qk_norm")
    norm.forward = functools.partial(type(norm).forward, norm)


def of_class(name, cls):
    return lambda model: setattr(model.get_submodule(name), "__class__", cls)


def with_transposed_weight(model):
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.t().contiguous().t())


def with_narrow_gate(model):
    model.model.layers[1].mixer.merge_gate.bfloat16()


def with_strided_gate(model):
    gate = model.model.layers[1].mixer.forget_gate
    gate.bias = nn.Parameter(torch.stack([gate.bias.detach()] * 2, 1)[:, 0])


def with_bias(model):
    down = model.model.layers[1].mlp.down_proj
    down.bias = nn.Parameter(torch.linspace(-1, 1, down.out_features))


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.model.layers[1].mixer.o_proj, "weight", nn.Identity())


def with_default_eps(model):
    model.model.layers[1].mixer.output_gate.norm.eps = None


def with_mixer(**attributes):
    return lambda model: [setattr(model.model.layers[1].mixer, *item) for item in attributes.items()]


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [
        *(
            hooked(f"model.layers.1.{name}")
            for name in (
                *("mixer_norm", "mlp_norm", "mlp", "mlp.gate_up_proj", "mlp.down_proj", "mixer"),
                *("mixer.qkv_proj", "mixer.qkv_conv", "mixer.qk_norm", "mixer.o_proj", "mixer.merge_gate"),
                *("mixer.output_gate", "mixer.output_gate.proj", "mixer.output_gate.norm"),
            )
        ),
        with_forward,
        of_class("model.layers.1.mixer.qkv_proj", OtherLinear),
        of_class("model.layers.1.mixer", OtherMixer),
        with_transposed_weight,
        with_bias,
        with_narrow_gate,
        with_strided_gate,
        parametrized,
        with_default_eps,
        with_mixer(backend="torch"),
        with_mixer(ablation={"bias": "count+norm"}),
        with_mixer(_record=[]),
    ],
)
def test_a_layer_that_is_not_plain_runs_by_its_modules(monkeypatch, runs, change):
    model = make_model(merge_gate=True, forget_gate=True, output_gate=True, num_hidden_layers=3)
    ids = random_ids(1, 12)
    change(model)
    found = decoded(model, ids)
    # The first layer and the third, each by itself.
    assert set(runs) == {1}
    assert len(runs) == 12
    assert_same(found, by_modules(monkeypatch, lambda: decoded(model, ids)))


@needs_kernels
def test_a_hook_of_a_layer_sees_what_comes_out(monkeypatch, runs):
    model, ids = make_model(), random_ids(1, 12)
    cache = decoded(model, ids[:, :11])[1]
    runs.clear()

    def states(cache):
        with torch.no_grad():
            return model(ids[:, 11:], past_key_values=cache, output_hidden_states=True).hidden_states

    found, expected = states(cache.snapshot()), by_modules(monkeypatch, lambda: states(cache.snapshot()))
    assert not runs
    assert len(found) == 5
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@needs_kernels
def test_hooks_that_capture_outputs_count_while_they_capture(runs):
    model, ids = make_model(), random_ids(2, 9)
    expected, _ = decoded(model, ids)
    runs.clear()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        # transformers leaves its hooks in place.
        found = model(ids[:, 6:7], past_key_values=cache, output_hidden_states=True)
        assert len(found.hidden_states) == model.config.num_hidden_layers + 1
        torch.testing.assert_close(found.logits, expected[:, :1], rtol=0, atol=2e-5)
        model(ids[:, 7:8], past_key_values=cache)
        assert runs == [4]
        found = model(ids[:, 8:9], past_key_values=cache, output_hidden_states=True)
        assert len(found.hidden_states) == model.config.num_hidden_layers + 1
        model.config.output_hidden_states = True
        assert model(ids[:, :1], past_key_values=cache).hidden_states
    assert runs == [4]


@needs_kernels
def test_calls_that_are_not_a_token_of_each_row_run_by_modules(runs):
    model, ids = make_model(), random_ids(5, 11)
    cache = decoded(model, ids)[1]
    assert not runs, "more rows than are worth it"
    cache = decoded(model, ids[:1], 10)[1]
    runs.clear()

    def read(num=1):
        return model(ids[:1, :num], past_key_values=cache.snapshot()).logits

    assert read().requires_grad
    with torch.no_grad():
        read(2)
        with torch.autocast("cpu", torch.bfloat16):
            decoded(model, ids[:1])
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        read()
        handle.remove()
        assert not runs
        read()
    assert runs == [4]
    with torch.no_grad():
        decoded(model.bfloat16(), ids[:1])
    assert runs == [4]


@needs_kernels
@torch.no_grad()
def test_bad_calls_are_refused_as_they_are_by_the_modules(runs):
    model, ids = make_model(merge_gate=True), random_ids(2, 12)
    cache = decoded(model, ids)[1]
    runs.clear()
    with pytest.raises(ValueError, match=r"inputs_embeds: expected shape \[B, T, 24\]"):
        model(inputs_embeds=torch.randn(2, 1, 20), past_key_values=cache.snapshot())
    with pytest.raises((ValueError, RuntimeError)):
        model(ids[:1, :1], past_key_values=cache.snapshot())
    assert 4 not in runs
    padded = decoded(model, ids, mask=(torch.arange(12) >= torch.tensor([[0], [2]])).long())[1]
    with pytest.raises(ValueError, match="expected an attention_mask over cached and new columns"):
        model(ids[:, :1], past_key_values=padded)


@needs_kernels
@pytest.mark.parametrize("gate", ["merge_gate", "forget_gate", "output_gate"])
def test_kernels_do_not_depend_on_default_dtype_and_device(gate):
    # With a base of its own, so that tables are made here and not by other tests.
    model, ids = make_model(merge="nearest", rope_theta=321.0, **{gate: True}), random_ids(2, 20)

    def results():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [decoded(model, ids)[0], *(x.grad.clone() for x in model.parameters())]

    with other_defaults():
        found = results()
    assert all(map(torch.equal, found, results()))

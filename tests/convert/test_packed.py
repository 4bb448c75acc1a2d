"""Weights of 8 and 4 bits in place of a model's own, and prompts that kernels read with them."""

import copy
import dataclasses
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ovq.convert import cache_step, load
from ovq.convert.attach import attach
from ovq.convert.packed import PackedLinear
from ovq.hf import build_context, load_context, save_context
from ovq.hf.context_file import fingerprint
from ovq.ops import cpu_kernels
from ovq.ops.backends.cpu.weights import Matrix
from tests.convert.common import IDS, KINDS, MEMORY, converted, original, tokens
from tests.convert.test_step import LEARNED, check_equal, check_equal_caches

pytestmark = pytest.mark.skipif(
    not cpu_kernels().startswith("compiled"), reason="there are no kernels on this machine"
)

both = pytest.mark.parametrize("format", ["int8", "int4"])


def linear(num_in=150, num_out=37, *, bias=True):
    torch.manual_seed(0)
    return nn.Linear(num_in, num_out, bias=bias)


def packed_model(steps=None, *args, **options):
    """A converted model, of which `steps` counts calls from now on."""
    model = converted(*args, **{"weight_dtype": "int8", **options})
    if steps is not None:
        steps[:] = 0, 0
    return model


def logits(model, ids, cache=None, **options):
    with torch.no_grad():
        return model(ids, past_key_values=model.make_cache() if cache is None else cache, **options).logits


def exactly(patch):
    """Let prompts, too, have inputs of 16 bits: no rounding then tips over, and tokens are merged alike."""
    call = Matrix.call
    patch.setattr(Matrix, "call", lambda self, first=0, *, is_rough=False: call(self, first))


@pytest.fixture
def exact(monkeypatch):
    exactly(monkeypatch)


@both
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num", [1, 5, 32, 33, 200])
def test_products_are_those_of_the_rounded_weights(num, bias, format):
    layer = linear(bias=bias)
    x = torch.randn(2, num, 150)
    own = PackedLinear(layer, format)
    expected = x @ own.matrix.dequantised().T + (layer.bias if bias else 0)
    # Two rows.
    tolerance = 1e-3 if num <= 16 else 0.03
    torch.testing.assert_close(own(x), expected, rtol=tolerance, atol=tolerance)
    if num > 16:
        assert (own(x) - expected).abs().max() > 2e-3
    output = PackedLinear(layer, format, is_output=True)
    expected = x @ output.matrix.dequantised().T + (layer.bias if bias else 0)
    torch.testing.assert_close(output(x), expected, rtol=1e-3, atol=1e-3)
    assert own(x.bfloat16()).dtype == torch.bfloat16
    assert own(x[:, :0]).shape == (2, 0, 37)


@both
def test_gradients_reach_inputs(format):
    own, x = PackedLinear(linear(), format), torch.randn(7, 150, requires_grad=True)
    own(x).sin().sum().backward()
    weight, bias = own.matrix.dequantised(), own.matrix.bias
    torch.testing.assert_close(x.grad, (x @ weight.T + bias).cos() @ weight)
    assert not list(own.parameters())


@both
def test_narrow_models_keep_the_bytes(format):
    own, x = PackedLinear(linear(), format), torch.randn(3, 150)
    expected = own(x)
    for other in (copy.deepcopy(own).bfloat16(), pickle.loads(pickle.dumps(own)), copy.deepcopy(own).half()):
        assert torch.equal(other(x), expected)
    assert "in_features=150, out_features=37, bias=True, format=" in repr(own)


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_prompts_are_read_as_by_modules(num_rows, kind, format, exact, steps, by_modules, monkeypatch):
    """In pieces, with merges in them, and rows re-positioned after some."""
    monkeypatch.setattr(cache_step, "_PIECE", 35 * num_rows)
    # Of one row, pieces are many tokens only where no row is re-positioned.
    model = packed_model(steps, kind, weight_dtype=format, max_distance=40 if num_rows > 1 else 1000)
    cache, other = model.make_cache(), model.make_cache()
    found = logits(model, IDS[:num_rows, :70], cache)
    expected = by_modules(lambda: logits(model, IDS[:num_rows, :70], other))
    check_equal(found, expected, tolerance=2e-3)
    check_equal_caches(cache, other, tolerance=2e-2)
    # The prompt goes on, and then single tokens.
    for part in (slice(70, 95), slice(95, 96)):
        found = logits(model, IDS[:num_rows, part], cache)
        check_equal(found, by_modules(lambda p=part: logits(model, IDS[:num_rows, p], other)), tolerance=2e-3)
    assert steps == [3, 0]


def test_prompts_of_models_with_all_that_is_learned(exact, steps, by_modules):
    memory = dataclasses.replace(converted().memory_config, **LEARNED)
    model = attach(original(), config=memory, weight_dtype="int8")
    steps[:] = 0, 0
    found = logits(model, IDS[:2, :90])
    check_equal(found, by_modules(lambda: logits(model, IDS[:2, :90])), tolerance=2e-3)
    assert steps == [1, 0]


@both
def test_inputs_of_8_bits_are_nearly_as_good(format, steps, by_modules, monkeypatch):
    model = packed_model(steps, weight_dtype=format, num_slots=0, window=96)
    found, of_modules = logits(model, IDS[:, :90]), by_modules(lambda: logits(model, IDS[:, :90]))
    assert steps == [1, 0]
    with monkeypatch.context() as patch:
        exactly(patch)
        expected = logits(model, IDS[:, :90])
    size = expected.square().mean().sqrt()
    # An input that tips over in one of them changes a little of what follows.
    assert (found - of_modules).square().mean().sqrt() < 0.01 * size
    assert 0.01 * size < (found - expected).square().mean().sqrt() < 0.05 * size


@both
def test_a_prompt_may_come_in_parts(format):
    """A token has the same inputs and products in any of them."""
    model = converted(weight_dtype=format)
    cache = model.make_cache()
    parts = [logits(model, part, cache) for part in IDS[:2, :90].split([40, 50], 1)]
    check_equal(torch.cat(parts, 1), logits(model, IDS[:2, :90]))


def test_arguments_of_prompts(steps):
    model = packed_model(steps)
    expected = logits(model, IDS[:2, :40])
    places = torch.arange(40)[None]
    for options in (
        {"attention_mask": torch.ones(2, 40, dtype=torch.int64)},
        {"position_ids": places},
        {"position_ids": places.expand(2, -1), "use_cache": True},
    ):
        assert torch.equal(logits(model, IDS[:2, :40], **options), expected)
    last = logits(model, IDS[:2, :40], logits_to_keep=1)
    check_equal(last, expected[:, -1:])
    assert steps == [5, 0]


def test_packed_rows_are_read_as_each_alone_and_not_into_a_cache(steps):
    model = packed_model(steps)
    places = torch.cat([torch.arange(40), torch.arange(50)])[None]
    with torch.no_grad():
        found = model(IDS[:1, :90], position_ids=places).logits
        with pytest.raises(ValueError, match="expected None in a call with packed rows"):
            logits(model, IDS[:1, :90], position_ids=places)
    assert steps == [0, 2]
    for part in (slice(40), slice(40, 90)):
        check_equal(found[:, part], logits(model, IDS[:1, part]), tolerance=0.05)


def test_what_modules_must_do_they_do_with_packed_weights(steps):
    model = converted(weight_dtype="int8")
    ids, expected = IDS[:2, :40], logits(model, IDS[:2, :40])
    steps[:] = 0, 0
    with torch.no_grad():
        model.config.output_hidden_states = True
        assert len(model(ids, past_key_values=model.make_cache()).hidden_states) == 3
        model.config.output_hidden_states = False
        seen = model(ids, past_key_values=model.make_cache(), output_hidden_states=True)
        assert len(seen.hidden_states) == 3
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(43) >= 3).long().expand(2, -1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=mask, position_ids=places)[:, 3:]
    assert model(ids[:, :5], past_key_values=model.make_cache(), labels=ids[:, :5]).loss.isfinite()
    assert steps == [0, 4]
    for other in (seen.logits, found):
        assert (other - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


@both
def test_weights_take_fewer_bytes_and_are_not_saved(format, tmp_path):
    model = converted(weight_dtype=format)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert model.lm_head.format == "int8"
    assert model.model.layers[0].mlp.up_proj.format == format
    sizes = {"num_slots": 8, "window": 16, "chunk_size": 8}
    own, plain = (attach(big(), **sizes, weight_dtype=x) for x in (format, None))
    share = num_bytes(own.model.layers) / num_bytes(plain.model.layers)
    assert share < (0.28 if format == "int8" else 0.16)
    with pytest.raises(ValueError, match=f"expected a model with its own weights, found .* {format}"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match=f"push_to_hub: .* its own weights, .* {format}"):
        model.push_to_hub("somebody/model")
    with pytest.raises(ValueError, match=f"resize_token_embeddings: .* its own weights, .* {format}"):
        model.resize_token_embeddings(72)
    assert (model.config.vocab_size, len(model.get_input_embeddings().weight)) == (64, 64)
    with pytest.raises(ValueError, match=f"load_state_dict: .* its own weights, .* {format}"):
        model.load_state_dict(converted(weight_dtype=format).state_dict())


@both
@torch.no_grad()
def test_a_tied_embedding_is_kept_once(format, exact, steps, by_modules):
    plain, model = big(tie_word_embeddings=True), big(tie_word_embeddings=True)
    model = attach(model, num_slots=8, window=16, chunk_size=8, weight_dtype=format)
    assert num_bytes(model) < (0.28 if format == "int8" else 0.2) * num_bytes(plain)
    expected = model.lm_head.matrix.dequantised()[IDS]
    model.tie_weights()
    assert torch.equal(model.get_input_embeddings()(IDS), expected)
    steps[:] = 0, 0
    check_equal(logits(model, IDS[:1]), by_modules(lambda: logits(model, IDS[:1])), tolerance=2e-3)
    assert steps == [1, 0]
    for wrong in (-1, 64):
        with pytest.raises(RuntimeError, match="out of"):
            logits(model, torch.tensor([[wrong]]))
    other = copy.deepcopy(model).bfloat16()
    assert other.model.embed_tokens.output is other.lm_head
    assert torch.equal(other.get_input_embeddings()(IDS), expected.bfloat16())


def test_packed_weights_are_not_trained():
    """Embeddings and norms, which are not packed, would learn alone; a frozen model passes gradients on."""
    model, ids = packed_model().train(), IDS[:1, :20]
    with pytest.raises(ValueError, match="training: expected a model with its own weights"):
        model(ids, labels=ids)
    assert model.eval()(ids, labels=ids).loss.isfinite()
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.train().requires_grad_(False)(inputs_embeds=inputs, labels=ids).loss.backward()
    assert inputs.grad.norm() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="nothing says what is mapped")
def test_the_file_of_the_weights_is_not_kept_mapped(tmp_path):
    converted().save_pretrained(tmp_path)
    model = load(tmp_path, weight_dtype="int8")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    plain = load(tmp_path)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert [type(x.lm_head) for x in (model, plain)] == [PackedLinear, nn.Linear]


def big(**fields):
    model = original()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    fields = {**model.config.to_dict(), **sizes, **fields}
    return type(model)(type(model.config)(**fields)).eval()


def num_bytes(module):
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def test_contexts_are_of_the_model_whatever_its_weights_are_rounded_to(tmp_path):
    plain, model = converted(), converted(weight_dtype="int8")
    assert fingerprint(plain) == fingerprint(model)
    save_context(build_context(model, tokens(60).tolist()), tmp_path / "context")
    for other in (plain, converted(weight_dtype="int4")):
        assert load_context(tmp_path / "context", other).num_tokens == 60
    with torch.no_grad():
        changed = original()
        changed.model.norm.weight.mul_(2)
    changed = attach(changed, **MEMORY, weight_dtype="int8")
    with pytest.raises(ValueError, match="model"):
        load_context(tmp_path / "context", changed)


def test_layers_that_hooks_look_into_keep_their_weights(steps):
    model, seen = original(), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    model = attach(model, **MEMORY, weight_dtype="int8")
    seen.clear()
    steps[:] = 0, 0
    logits(model, IDS[:1, :40])
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is PackedLinear
    assert seen == [1]
    assert steps == [0, 1]


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_without_kernels_weights_stay(format, monkeypatch, tmp_path):
    monkeypatch.setattr("ovq.convert.packed.is_available", lambda: False)
    converted().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"weight_dtype='{format}': expected compiled kernels") as warned:
        models = attach(original("llama"), **MEMORY, weight_dtype=format), load(tmp_path, weight_dtype=format)
    assert [each.filename for each in warned] == [__file__] * 2
    for model in models:
        assert type(model.lm_head) is nn.Linear
        assert model.weights_digest is None


def test_packed_weights_without_kernels_are_multiplied_by_pytorch(monkeypatch):
    own, x = PackedLinear(linear(), "int4"), torch.randn(5, 150)
    expected = own(x)
    monkeypatch.setattr("ovq.convert.packed.is_available", lambda: False)
    torch.testing.assert_close(own(x), expected, rtol=1e-4, atol=1e-3)

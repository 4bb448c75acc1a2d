"""One token in one call of a kernel: what the modules compute, and the calls that are left to them."""

import copy
import dataclasses
import math
import pickle
from itertools import islice

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from ovq.convert import attach, load
from ovq.hf.cache import CACHE_KEY
from ovq.hf.rows import Rows
from ovq.hf.streaming import stream_tokens
from ovq.ops import cpu_kernels
from ovq.ops.backends.cpu.weights import matrix_product, packed
from tests.convert.common import CAN_BE_PICKLED, IDS, KINDS, MEMORY, SIZES, converted, original, read
from tests.ops.common import by_turns, other_defaults
from tests.processes import handed_over

pytestmark = pytest.mark.skipif(
    not cpu_kernels().startswith("compiled"), reason="there are no kernels on this machine"
)

LEARNED = {
    "slot_temperature": [[0.5, 1.0, 2.0, 1.5], [1.5, 0.7, 1.0, 1.0]],
    "slot_bias": [[0.3, -1.0, 0.0, 0.2], [1.0, 0.2, 0.0, 0.5]],
    "key_exponents": [[[(3 * i + h) % 5 - 2 for i in range(8)] for h in range(2)]] * 2,
    "token_use": [[[0.2 * math.sin(5 * h + i) for i in range(16)] + [1.0] for h in range(2)]] * 2,
    "value_weight": [[0.5, 1.0], [2.0, 1.0]],
}


def check_equal_caches(found, expected, *, tolerance=1e-3):
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.num_columns == other.num_columns
        for name, x in other.memory.tensors(other.state).items():
            own = one.memory.tensors(one.state)[name]
            torch.testing.assert_close(own, x, rtol=tolerance, atol=tolerance)


def check_equal(found, expected, *, tolerance=1e-4):
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(("kind", "has_learned", "num_rows"), by_turns(KINDS, [False, True], [1, 5]))
def test_logits_and_memories_are_those_of_modules(kind, has_learned, num_rows, steps, by_modules):
    model = converted(kind)
    if has_learned:
        memory = dataclasses.replace(model.memory_config, **LEARNED)
        model = attach(original(kind), config=memory)
    steps[:] = 0, 0
    found, cache = read(model, IDS[:num_rows, :70])
    # All but the prompt; from the 45th token on rows are re-positioned after every fifth.
    assert steps == [50, 1]
    expected, other = by_modules(read, model, IDS[:num_rows, :70])
    check_equal(found, expected)
    check_equal_caches(cache, other)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_slots_in_fewer_bytes(state_dtype, steps, by_modules):
    model = converted(state_dtype=state_dtype)
    found, cache = read(model, IDS[:2])
    assert steps[0] == 80
    check_equal(found, by_modules(read, model, IDS[:2])[0], tolerance=1e-3)
    wide, kept = read(converted(), IDS[:2])
    assert (found - wide).abs().max() > 1e-3
    assert cache.nbytes < kept.nbytes


def test_kernels_do_not_depend_on_default_dtype_and_device(steps):
    model = attach(original(), config=dataclasses.replace(converted().memory_config, **LEARNED))
    with other_defaults():
        found, _ = read(model, IDS[:2])
    assert steps[0] == 80
    assert torch.equal(found, read(model, IDS[:2])[0])


def test_streams_of_tokens_are_written_by_the_kernel(steps):
    model = converted()
    steps[:] = 0, 0
    assert len(list(islice(stream_tokens(model, IDS[0, :20].tolist()), 5))) == 5
    # The last token is not read.
    assert steps == [4, 1]


def test_steps_of_inference_mode_go_on_outside_of_it(steps):
    model = converted()
    with torch.inference_mode():
        cache = read(model, IDS[:1, :40])[1]
    with torch.no_grad():
        found = model(IDS[:1, 40:41], past_key_values=cache).logits
    assert steps[0] == 21
    assert torch.equal(found, read(model, IDS[:1, :41])[0][:, -1:])


def test_biases_of_all_products_and_scaled_rotations(by_modules, steps):
    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_parameters=rope)
    model = LlamaForCausalLM(config).eval()
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(x)
    assert model.model.rotary_emb.attention_scaling > 1.1
    model = attach(model, **MEMORY)
    found, _ = read(model, IDS[:2])
    assert steps[0] > 60
    check_equal(found, by_modules(read, model, IDS[:2])[0])


def test_numbers_of_each_module(by_modules, steps):
    model = original("qwen3")
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.scaling = 0.7
        layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon = 0.5, 2.0
        attention.q_norm.variance_epsilon = attention.k_norm.variance_epsilon = 1.0
    model.model.norm.variance_epsilon = 3.0
    model = attach(model, **MEMORY)
    found, _ = read(model, IDS[:2, :40])
    assert steps[0] == 20
    check_equal(found, by_modules(read, model, IDS[:2, :40])[0])


def test_biases_of_qwen2(by_modules):
    model = original("qwen2")
    assert isinstance(model, Qwen2ForCausalLM)
    for layer in model.model.layers:
        for x in "qkv":
            nn.init.normal_(getattr(layer.self_attn, f"{x}_proj").bias)
    model = attach(model, **MEMORY)
    check_equal(read(model, IDS[:2])[0], by_modules(read, model, IDS[:2])[0])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "bfloat16"), ("qwen2", "int8"), ("qwen3", "int4"), ("mistral", "bfloat16"), ("llama", "int4")],
)
def test_narrow_weights_are_those_of_modules_with_these_weights(kind, name, steps, by_modules):
    model = converted(kind, weight_dtype=name)
    narrow = converted(kind)
    with torch.no_grad():
        for place, module in narrow.named_modules():
            if isinstance(module, nn.Linear):
                # The output layer in int8 where the others have 4 bits.
                own = "int8" if (place, name) == ("lm_head", "int4") else name
                module.weight.copy_(packed(module.weight, None, own).dequantised())
    # Prompts are read with the model's own weights.
    cache, own = model.make_cache(), converted(kind)
    with torch.no_grad():
        own(IDS[:2, :20], past_key_values=cache)
    other = cache.snapshot()
    found = []
    with torch.no_grad():
        for x in IDS[:2, 20:40].split(1, 1):
            found.append(model(x, past_key_values=cache).logits)
            expected = by_modules(lambda x=x: narrow(x, past_key_values=other).logits)
            # Inputs have 16 bits where weights are whole numbers.
            check_equal(found[-1], expected, tolerance=1e-4 if name == "bfloat16" else 1e-3)
    check_equal_caches(cache, other, tolerance=1e-3 if name == "bfloat16" else 1e-2)
    assert steps[0] == 20
    # They are other weights.
    assert (torch.cat(found, 1) - by_modules(read, own, IDS[:2, :40])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_narrow_formats(dtype, steps, by_modules):
    """Closer to the model in float32 than modules are, which round every sum."""
    model = attach(original().to(dtype), **MEMORY)
    wide = attach(original().to(dtype).float(), **MEMORY)
    found, cache = read(model, IDS[:, :40])
    assert steps[0] == 20
    assert found.dtype == cache.layers[0].state[0].state.pending_keys.dtype == dtype
    expected, rounded = read(wide, IDS[:, :40])[0], by_modules(read, model, IDS[:, :40])[0]
    error, most = (float((x - expected).square().mean().sqrt()) for x in (found, rounded))
    assert 0 < error < most


@pytest.mark.parametrize("dim", [1, 31, 64, 150, 576])
@pytest.mark.parametrize("name", [None, "bfloat16", "float16", "int8", "int4"])
def test_products_are_those_of_the_rounded_weights(name, dim):
    torch.manual_seed(0)
    x, norm, weight, bias = torch.randn(7, 1, dim), torch.rand(dim), torch.randn(9, dim), torch.randn(9)
    matrix = packed(weight, bias, name)
    z = nn.functional.rms_norm(x, (dim,), norm, 1e-5)
    expected = nn.functional.linear(z, matrix.dequantised(), bias)
    # Inputs have 16 bits where weights are whole numbers: each is off by half a step of the largest of 64.
    step = float(z.abs().max() * matrix.dequantised().norm(dim=1).max()) / 65534
    tolerance = {"rtol": 1e-5, "atol": 6 * step} if matrix.factors is not None else {}
    torch.testing.assert_close(matrix_product(x, matrix, norm, 1e-5), expected, **tolerance)
    torch.testing.assert_close(matrix.dequantised(), weight, rtol=0.01, atol=0.25 if name == "int4" else 0.02)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_inputs_of_any_size(name):
    """The 16 bits of inputs are those of the largest of 64 neighbours; what is not finite stays so."""
    torch.manual_seed(0)
    matrix, norm = packed(torch.randn(9, 192), None, name), torch.ones(192)
    for factors in ((1e-6, 1.0, 1e6), (0.0, 0.0, 1e-3), (0.0, 0.0, 0.0)):
        x = torch.randn(3, 1, 192) * torch.tensor(factors).repeat_interleave(64)
        z = nn.functional.rms_norm(x, (192,), norm, 1e-5)
        found = matrix_product(x, matrix, norm, 1e-5)
        error = (found - nn.functional.linear(z, matrix.dequantised())).abs().max()
        assert error <= 6 * z.abs().max() * matrix.dequantised().norm(dim=1).max() / 65534
        x[1, 0, 70] = float("nan")
        assert matrix_product(x, matrix, norm, 1e-5).isfinite().flatten(1).all(1).tolist() == [
            True,
            False,
            True,
        ]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_long_inputs_are_rounded_a_few_tokens_at_a_time(name):
    """Their rounded copy is on the stack, 8 MiB for 60,000 numbers of 64 tokens."""
    torch.manual_seed(0)
    matrix, norm, x = (
        packed(torch.randn(3, 60_000), None, name),
        torch.ones(60_000),
        torch.randn(64, 1, 60_000),
    )
    found = matrix_product(x, matrix, norm, 1e-5)
    assert torch.equal(found, torch.cat([matrix_product(row[None], matrix, norm, 1e-5) for row in x]))


def test_4_bits_keep_blocks_that_were_dequantised():
    torch.manual_seed(0)
    steps, lows = torch.rand(5, 4, 1).half().float(), torch.randn(5, 4, 1).half().float()
    numbers = torch.randint(0, 16, (5, 4, 32))
    numbers[..., :2] = torch.tensor([0, 15])
    weight = (numbers * steps + lows).flatten(1)
    matrix = packed(weight, None, "int4")
    assert torch.equal(matrix.dequantised(), weight)
    # A tile of 16 rows, of which 11 are filled up.
    assert (matrix.weight.shape, matrix.factors.shape) == ((1, 2, 8, 16, 4), (1, 2, 2, 2, 16))
    assert matrix.weight.nbytes + matrix.factors.nbytes == 16 * 128 * 5 / 8
    # Blocks Q4_0, with steps of either sign, in which not all numbers from -8 to 7 occur.
    numbers = torch.randint(-7, 7, (5, 4, 32))
    numbers[..., 3] = -8
    weight = (numbers * lows).flatten(1)
    assert torch.equal(packed(weight, None, "int4").dequantised(), weight)
    # Equal weights, and those that fill up a row, which have no range of their own.
    weight = torch.tensor([[0.5] * 40, [-3.0] * 32 + [1.5] * 8])
    assert torch.equal(packed(weight, None, "int4").dequantised(), weight)


def test_int8_rounds_to_steps_of_the_largest_of_64():
    weight = torch.tensor([[127.0, -50.4, 0.5], [0.0, 0.0, 0.0], [-2.54, 0.019, 1.0]])
    matrix = packed(weight, torch.ones(3), "int8")
    assert (matrix.weight[0, 0, 0, :3, :3] - 128.0).tolist() == [[127, -50, 0], [0, 0, 0], [-127, 1, 50]]
    torch.testing.assert_close(matrix.factors[0, 0, [0, 2]], torch.tensor([1.0, 0.02]))
    torch.testing.assert_close(matrix.dequantised()[::2], torch.tensor([[127, -50, 0], [-2.54, 0.02, 1]]))
    assert packed(torch.ones(17, 65), None, "int8").factors.shape == (2, 2, 16)
    assert packed(weight, None, None).weight.data_ptr() == weight.data_ptr()
    # Rows are rounded some at a time, each as if it were alone.
    many = torch.arange(2500.0)[:, None].sin() * torch.arange(70.0).cos()
    found, last = (packed(x, None, "int8").dequantised() for x in (many, many[2400:]))
    assert torch.equal(found[2400:], last)


def test_rows_of_different_lengths_that_join_and_leave(steps, by_modules):
    model = converted()

    def logits():
        starts = (21, 70, 33)
        rows = [Rows.start(model) for _ in starts]
        for row, start, ids in zip(rows, starts, IDS, strict=False):
            row.read(ids[None, :start])
        rows, found = Rows.joined(rows), []
        for i in range(12):
            found.append(rows.read([[int(ids[n + i])] for n, ids in zip(starts, IDS, strict=False)]))
        rows.keep([2, 0])
        found += [rows.read([[i], [i + 1]]) for i in range(1, 20)]
        return torch.cat(found)

    with torch.inference_mode():
        found = logits()
        assert steps[0] > 20
        check_equal(found, by_modules(logits))


@pytest.mark.parametrize("kind", KINDS)
def test_generate_writes_what_modules_write(kind, steps, by_modules):
    model = converted(kind)
    mask = torch.ones_like(IDS[:2, :20])
    mask[1, :7] = 0

    def written():
        options = {"max_new_tokens": 50, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        # Which of equal tokens are merged depends on roundings.
        options["no_repeat_ngram_size"] = 2
        return model.generate(IDS[:2, :20], attention_mask=mask, **options)

    found = written()
    assert steps[0] > 40
    assert torch.equal(found, by_modules(written))


def test_a_snapshot_goes_on_by_itself():
    model = converted()
    _, cache = read(model, IDS[:1, :30])
    other = cache.snapshot()
    with torch.no_grad():
        first = [model(x, past_key_values=cache).logits for x in IDS[:1, 30:50].split(1, 1)]
        beside = [model(x, past_key_values=other).logits for x in IDS[1:2, 30:50].split(1, 1)]
        again = copy.deepcopy(cache)
        second = [model(x, past_key_values=cache).logits for x in IDS[:1, 50:60].split(1, 1)]
        third = [model(x, past_key_values=again).logits for x in IDS[:1, 50:60].split(1, 1)]
    assert torch.equal(torch.cat(second), torch.cat(third))
    check_equal(torch.cat(first + second, 1), read(model, IDS[:1, :60], start=30)[0])
    ids = torch.cat([IDS[:1, :30], IDS[1:2, 30:50]], 1)
    check_equal(torch.cat(beside, 1), read(model, ids, start=30)[0])


def test_a_cache_in_another_process_goes_on_by_itself(steps):
    model = converted()
    _, cache = read(model, IDS[:1, :30])
    other = handed_over(cache)
    before = steps[0]
    with torch.no_grad():
        here, there = [], []
        for own, beside in zip(IDS[0, 30:50], IDS[1, 30:50], strict=True):
            here.append(model(own[None, None], past_key_values=cache).logits)
            there.append(model(beside[None, None], past_key_values=other).logits)
    assert steps[0] == before + 40
    check_equal(torch.cat(here, 1), read(model, IDS[:1, :50], start=30)[0])
    ids = torch.cat([IDS[:1, :30], IDS[1:2, 30:50]], 1)
    check_equal(torch.cat(there, 1), read(model, ids, start=30)[0])


def test_states_given_to_another_process_stay_where_they_are(steps):
    model = converted()
    _, cache = read(model, IDS[:1, :30])
    with torch.no_grad():
        found = [model(IDS[:1, 30:31], past_key_values=cache).logits]
        states = [state for layer in cache.layers for state in layer.slot_states]
        given = [handed_over(state) for state in states]
        for state, own in zip(states, given, strict=True):
            assert not state.pending_keys.is_shared()
            assert torch.equal(own.pending_keys, state.pending_keys)
        found += [model(x, past_key_values=cache).logits for x in IDS[:1, 31:50].split(1, 1)]
    check_equal(torch.cat(found, 1), read(model, IDS[:1, :50], start=30)[0])


def test_changed_weights_are_read(by_modules):
    model = converted(weight_dtype="float32")
    before, _ = read(model, IDS[:1, :30])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    changed, _ = read(model, IDS[:1, :30])
    check_equal(changed, by_modules(read, model, IDS[:1, :30])[0])
    # All layers at once.
    base, model.model = model.model, copy.deepcopy(model.model)
    model.model.norm.weight.data *= torch.arange(32) / 8
    check_equal(read(model, IDS[:1, :30])[0], by_modules(read, model, IDS[:1, :30])[0])
    model.model = base
    # And in another format.
    model.weight_dtype = "bfloat16"
    assert (read(model, IDS[:1, :30])[0] - changed).abs().max() > 1e-3
    model.weight_dtype = "float32"
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())
    check_equal(read(model, IDS[:1, :30])[0], -changed)
    assert (changed - before).abs().max() > 1e-2
    model.model.norm.weight.data = torch.zeros(32)
    assert not read(model, IDS[:1, :30])[0].any()


def test_a_narrow_copy_is_made_anew_when_weights_change_in_place():
    name = "bfloat16"
    model = converted(weight_dtype=name)
    for _ in range(2):
        cache = model.make_cache()
        with torch.no_grad():
            model(IDS[:1, :20], past_key_values=cache)
            found = model(IDS[:1, 20:21], past_key_values=cache).logits
            # The same weights in a model that has written nothing.
            other = converted(weight_dtype=name)
            other.load_state_dict(model.state_dict())
            cache = other.make_cache()
            other(IDS[:1, :20], past_key_values=cache)
            assert torch.equal(found, other(IDS[:1, 20:21], past_key_values=cache).logits)
            model.model.layers[1].mlp.down_proj.weight.mul_(0.5)


@pytest.mark.parametrize(("weight_dtype", "dtype"), [("bfloat16", torch.float32), (None, torch.bfloat16)])
@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj", "layers.0.input_layernorm"])
@torch.no_grad()
def test_changes_of_data_are_read_by_the_next_cache(name, weight_dtype, dtype):
    """As adapters and averages of weights make them, without a new version of the parameter."""
    models = [attach(original().to(dtype), **MEMORY, weight_dtype=weight_dtype) for _ in range(2)]
    before = read(models[0], IDS[:1, :30])[0]
    for model in models:
        weight = model.get_submodule(f"model.{name}").weight
        version = weight._version
        weight.data.add_(torch.outer(weight.new_ones(32), weight.data[0] * 3) if weight.dim() == 2 else 2)
        assert weight._version == version
    found, expected = (read(model, IDS[:1, :30])[0] for model in models)
    assert torch.equal(found, expected)
    assert (found - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "number"), [("layers.0.self_attn.scaling", 1.0), ("norm.variance_epsilon", 9.0)]
)
def test_numbers_of_modules_are_read_by_the_next_cache(name, number, by_modules):
    model = converted()
    before = read(model, IDS[:1, :30])[0]
    owner, _, name = name.rpartition(".")
    setattr(model.get_submodule(f"model.{owner}"), name, number)
    found, expected = read(model, IDS[:1, :30])[0], by_modules(read, model, IDS[:1, :30])[0]
    check_equal(found, expected)
    assert (found - before).abs().max() > 1e-2


def test_models_that_have_written_are_copied_and_pickled(steps):
    model = converted(weight_dtype="int8")
    expected, _ = read(model, IDS[:1, :30])
    copies = [copy.deepcopy(model)] + ([pickle.loads(pickle.dumps(model))] if CAN_BE_PICKLED else [])
    for other in copies:
        steps[:] = 0, 0
        assert torch.equal(read(other, IDS[:1, :30])[0], expected)
        assert steps == [11, 0]


def test_the_output_is_that_of_modules(by_modules):
    model = converted()
    _, cache = read(model, IDS[:1, :20])
    with torch.no_grad():
        found = model(IDS[:1, 20:21], past_key_values=cache)
        expected = by_modules(lambda: model(IDS[:1, 21:22], past_key_values=cache))
    assert type(found) is type(expected)
    assert list(found) == list(expected) == ["logits", CACHE_KEY]
    assert found[CACHE_KEY] is cache
    assert found.logits.shape == expected.logits.shape == (1, 1, 64)


def test_weight_dtype_is_an_option_of_loading_and_not_saved(tmp_path):
    model = converted(weight_dtype="float32")
    model.save_pretrained(tmp_path)
    assert load(tmp_path).weight_dtype is None
    assert load(tmp_path, weight_dtype="bfloat16").weight_dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"weight_dtype: expected .* found 'int2'"):
        load(tmp_path, weight_dtype="int2")
    plain = original()
    with pytest.raises(ValueError, match="weight_dtype"):
        attach(plain, weight_dtype=torch.int8)
    assert type(plain) is LlamaForCausalLM

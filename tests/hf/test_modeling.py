"""The language model's forward pass, loss, gradients, and its life on disk."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from ovq.hf import OVQCache, OVQConfig, OVQForCausalLM, OVQModel
from ovq.hf.cache import CACHE_KEY
from ovq.layers import OVQAttention, ShortConvolution
from tests.hf.common import (
    BASELINES,
    SIZES,
    enable_checkpointing,
    is_greedy,
    left_padded,
    make_config,
    make_model,
    random_ids,
)


def grads_of(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_padded_rows_equal_rows_alone(model):
    prompts = [random_ids(1, n, seed=n)[0] for n in (17, 6, 1)]
    ids, mask = left_padded(prompts)
    for ids_, mask_ in ((ids, mask), (ids.flip(1), mask.flip(1))):
        logits = model(ids_, attention_mask=mask_).logits
        for row, keep in enumerate(mask_.bool()):
            alone = model(ids_[row : row + 1, keep]).logits[0]
            torch.testing.assert_close(logits[row, keep], alone)


def test_embeddings_of_padding_may_be_anything(model):
    ids, is_real = random_ids(2, 5), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]) > 0
    inputs = [torch.where(is_real[..., None], model.model.embed_tokens(ids), x) for x in (0, torch.nan)]
    labels = ids.masked_fill(~is_real, -100)
    grads = [grads_of(model, inputs_embeds=x, attention_mask=is_real, labels=labels) for x in inputs]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    # So may its ids.
    other = torch.where(is_real, ids, ids.flip(1))
    results = [
        model(**x, attention_mask=is_real).logits
        for x in ({"inputs_embeds": inputs[1]}, {"input_ids": other})
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


class HostCopies(TorchFunctionMode):
    """Counts what would wait for a GPU: tensors of some shape that are looked at by Python."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_copy = func is torch.Tensor.tolist or (func is torch.Tensor.to and "cpu" in args)
        self.count += is_copy and args[0].shape == self.shape
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])},
        {"cu_seqlens": torch.tensor([0, 4, 9])},
    ],
    ids=lambda given: next(iter(given)),
)
def test_masks_and_offsets_are_looked_at_once_for_all_layers(given):
    (rows,) = given.values()
    model = make_model(num_hidden_layers=4, mixer_types=["ovq"] * 4, conv_size=0)
    with HostCopies(rows.shape) as copies:
        model(random_ids(rows.shape[0] if rows.dim() == 2 else 1, 9), **given)
    assert copies.count == 1


def test_embeddings_in_the_place_of_ids(model):
    ids = random_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_ids_beyond_the_vocabulary_are_named(model):
    ids = random_ids(2, 9)
    last = model.config.vocab_size - 1
    for wrong in (last + 1, -1):
        bad = ids.clone()
        bad[1, 3] = wrong
        found = f"expected ids from 0 to {last}, found .*{wrong}"
        with pytest.raises(ValueError, match=f"input_ids: {found}"):
            model(bad)
        for options in ({}, {"skip_logits": True}):
            with pytest.raises(ValueError, match=f"labels: {found}"):
                model(ids, labels=bad, **options)


def test_logits_to_keep(model):
    ids = random_ids(2, 9)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    index = torch.tensor([0, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=index).logits, logits[:, index])
    for kept in (3, index):
        with pytest.raises(ValueError, match="logits_to_keep: expected 0 with labels"):
            model(ids, labels=ids, logits_to_keep=kept)


def test_the_loss_is_that_of_the_next_token(model):
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    logits = model(ids).logits[:, :-1].float().flatten(0, 1)
    targets = labels[:, 1:].flatten()
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    total = F.cross_entropy(logits, targets, reduction="sum")
    loss = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(loss, total / 50)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("options", [{}, {"skip_logits": True}])
def test_labels_may_be_as_narrow_as_ids(model, name, options):
    ids = random_ids(2, 9).int()
    losses = [model(ids, **{name: labels}, **options).loss for labels in (ids, ids.long())]
    assert torch.equal(*losses)


def test_the_loss_of_packed_rows_does_not_predict_across_rows(model):
    ids = random_ids(1, 16)
    bounds = torch.tensor([0, 5, 5, 16])
    packed = model(ids, labels=ids, cu_seqlens=bounds).loss
    rows = [ids[:, :5], ids[:, 5:]]
    summed = [model(row, labels=row, num_items_in_batch=torch.tensor(14)).loss for row in rows]
    torch.testing.assert_close(packed, sum(summed))


def test_hidden_states_and_tuples(model):
    ids = random_ids(2, 9)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    first, *_ = model(ids, return_dict=False)
    assert torch.equal(first, out.logits)


def test_a_cache_is_returned_when_it_can_be_of_use():
    model, ids = make_model(), random_ids(1, 6)

    def returns_cache(**kwargs):
        return getattr(model(ids, **kwargs), CACHE_KEY) is not None

    assert returns_cache()
    assert not returns_cache(use_cache=False)
    assert not returns_cache(labels=ids)
    assert returns_cache(labels=ids, use_cache=True)
    assert not returns_cache(cu_seqlens=torch.tensor([0, 6]))
    model.train()
    assert not returns_cache()
    assert returns_cache(use_cache=True)
    model.eval().config.use_cache = False
    assert not returns_cache()


def test_both_names_of_the_cache_work(model):
    ids = random_ids(2, 9)
    expected = model(ids).logits[:, 5:]
    for name in ("past_key_values", "cache"):
        cache = OVQCache(model.config)
        model(ids[:, :5], **{name: cache})
        torch.testing.assert_close(model(ids[:, 5:], **{name: cache}).logits, expected)


def test_caches_that_cannot_be_are_refused():
    model, ids = make_model(), random_ids(1, 4)
    with pytest.raises(ValueError, match=r"expected an OVQCache .* found DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"expected an OVQCache .* found DynamicCache"):
        # As peft's prefix tuning does in `generate`.
        model(ids, past_key_values=DynamicCache(), cache=OVQCache(model.config))
    with pytest.raises(ValueError, match="found two caches"):
        model(ids, past_key_values=OVQCache(model.config), cache=OVQCache(model.config))
    with pytest.raises(ValueError, match="packed rows cannot be continued"):
        model(ids, cu_seqlens=torch.tensor([0, 4]), use_cache=True)
    other = OVQCache(make_config(sliding_window=3))
    with pytest.raises(ValueError, match=r"a window of 5, found the keys and values of a window of 3"):
        model(ids, past_key_values=other)
    other = OVQCache(make_config(mixer_types=["ovq"] * 4))
    with pytest.raises(
        ValueError, match=r"layer 0 .* the keys and values of a window of 5, found an OVQState"
    ):
        model(ids, past_key_values=other)
    for num_layers in (2, 6):
        other = make_model(num_hidden_layers=num_layers, mixer_types=None)
        cache = other(ids, use_cache=True)[CACHE_KEY]
        with pytest.raises(ValueError, match=f"a cache of 4 layers.* found one of {num_layers}"):
            model(ids, past_key_values=cache)


def test_inputs_without_rows_are_refused(model):
    ids = torch.arange(9)
    for inputs in ({}, {"labels": ids}):
        with pytest.raises(ValueError, match=r"input_ids: expected shape \[B, T\], found \[9\]"):
            model(ids, **inputs)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected shape \[B, T, 24\], found \[9, 24\]"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("input_ids", [[1, 2, 3]], "list"),
        ("labels", [[1, 2, 3]], "list"),
        ("shift_labels", np.zeros((1, 3)), "ndarray"),
        ("position_ids", [[0, 1, 2]], "list"),
        ("cu_seqlens", [0, 3], "list"),
        ("seq_idx", np.zeros((1, 3)), "ndarray"),
    ],
)
def test_inputs_that_are_no_tensors_are_refused(model, name, value, found):
    for others in ({}, {"labels": torch.ones(1, 3, dtype=torch.int64)}):
        inputs = {"input_ids": torch.ones(1, 3, dtype=torch.int64), **others, name: value}
        with pytest.raises(ValueError, match=f"{name}: expected a tensor, found {found}"):
            model(**inputs)


def test_ids_of_other_dtypes_are_refused(model):
    for dtype in (torch.float32, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match=f"input_ids: expected int32 or int64, found {dtype}"):
            model(torch.ones(1, 3, dtype=dtype))
        for name in ("labels", "shift_labels"):
            with pytest.raises(ValueError, match=f"^{name}: expected int32 or int64, found {dtype}"):
                model(random_ids(1, 3), **{name: torch.ones(1, 3, dtype=dtype)})


def test_keyword_arguments_nobody_reads_are_refused(model):
    ids = random_ids(1, 4)
    for target in (model, model.model):
        with pytest.raises(ValueError, match=r"found \['atention_mask'\]"):
            target(ids, atention_mask=torch.ones(1, 4))
        with pytest.raises(ValueError, match="output_attentions=False, found True"):
            target(ids, output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions=False, found True"):
            type(target)(make_config(output_attentions=True))(ids)


def test_positions_may_be_given_if_they_say_nothing_new(model):
    ids, mask = left_padded([random_ids(1, n)[0] for n in (8, 5)])
    expected = model(ids, attention_mask=mask).logits
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(logits, expected)
    with pytest.raises(ValueError, match="pass cu_seqlens"):
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 3, 4, 5, 6]]))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("changes", [{}, BASELINES], ids=["ovq", "baselines"])
def test_gradient_checkpointing_gives_the_same_gradients(changes, use_reentrant):
    model, ids = make_model(**changes).train(), random_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    # Raven's router draws noise in training.
    torch.manual_seed(0)
    # Of a copy, as a step in training may leave its mark on a model.
    expected = grads_of(copy.deepcopy(model), input_ids=ids, attention_mask=mask, labels=ids)
    assert all(g.abs().max() > 0 for g in expected.values())
    calls = []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    enable_checkpointing(model, use_reentrant=use_reentrant)
    torch.manual_seed(0)
    found = grads_of(model, input_ids=ids, attention_mask=mask, labels=ids)
    hook.remove()
    torch.testing.assert_close(found, expected)
    assert len(calls) == 2  # forward, and again in the backward pass
    with pytest.raises(ValueError, match="no cache while training with gradient checkpointing"):
        model(ids, use_cache=True)


def test_initial_weights():
    torch.manual_seed(0)
    model = OVQForCausalLM(make_config(hidden_size=96, initializer_range=0.05))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("beta"):
            assert torch.equal(p, torch.ones_like(p)), name
        elif "conv" in name:
            # Uniform in +-1/sqrt(taps), whose standard deviation is 1/3 for three taps.
            assert p.std().item() == pytest.approx(1 / 3, rel=0.1), name
        else:
            assert p.std().item() == pytest.approx(0.05, rel=0.1), name


def test_parameters_missing_from_a_checkpoint_are_initialised_as_in_a_new_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if "conv" not in n and "beta" not in n}
    save_file(kept, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for mixer in loaded.mixers():
        assert torch.equal(mixer.qk_norm.beta, torch.ones(4).double())
        assert 0.5 / 3**0.5 < mixer.qkv_conv.weight.abs().max() <= 1 / 3**0.5


@pytest.mark.parametrize("changes", [{}, BASELINES], ids=["ovq", "baselines"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_by_the_auto_classes(tmp_path, tied, changes):
    model, ids = make_model(tie_word_embeddings=tied, **changes), random_ids(2, 12)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OVQConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is OVQForCausalLM
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is OVQModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16


def test_set_num_slots_reaches_every_layer_and_is_saved(tmp_path):
    model, ids = make_model(), random_ids(1, 60)
    before = model(ids).logits
    model.set_num_slots(40)
    assert [m.num_slots for m in model.mixers() if isinstance(m, OVQAttention)] == [40, 40]
    after = model(ids).logits
    assert not torch.allclose(before, after)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, after)
    with pytest.raises(ValueError, match="num_slots: expected an integer of at least 1, found 0"):
        model.set_num_slots(0)
    with pytest.raises(ValueError, match=r"num_slots: expected an integer of at least 1, found 1\.5"):
        model.set_num_slots(1.5)
    assert torch.equal(model(ids).logits, after)
    with pytest.raises(ValueError, match="expected a model with 'ovq' layers"):
        make_model(mixer_types=["full_attention"] * 4).set_num_slots(4)


# What a call of set_merge leaves in the config of a model with growth "linear" and value weight 0.25.
MERGES = {
    "nearest, all given": ({"merge": "nearest", "growth": "plateau", "value_weight": 2.0}, {}),
    "nearest": ({"merge": "nearest"}, {"growth": "immediate", "value_weight": 0.25}),
    "updated": ({"merge": "updated"}, {"growth": "plateau", "value_weight": 0.25}),
    "existing, immediate": ({"merge": "existing", "growth": "immediate"}, {"value_weight": 0.25}),
}


@pytest.mark.parametrize(("given", "left"), MERGES.values(), ids=MERGES)
def test_set_merge_is_the_changed_config(tmp_path, given, left):
    model, ids = make_model(growth="linear", value_weight=0.25), random_ids(1, 60)
    model.save_pretrained(tmp_path / "before")
    before = model(ids).logits
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "before", **given).eval()
    assert {name: getattr(expected.config, name) for name in left} == left
    model.set_merge(**given)
    after = model(ids).logits
    assert torch.equal(after, expected(ids).logits)
    assert not torch.allclose(after, before)
    assert model.state_bytes(60) == expected.state_bytes(60)
    of_loading = {"_name_or_path": "", "auto_map": None}
    assert model.config.to_dict() | of_loading == expected.config.to_dict() | of_loading
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()(ids).logits, after)
    model.set_merge("existing", growth="linear", value_weight=0.25)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("forget_gate", [False, True])
@torch.no_grad()
def test_set_state_dtype_is_the_changed_config(tmp_path, forget_gate):
    model, ids = make_model(forget_gate=forget_gate), random_ids(1, 60)
    model.save_pretrained(tmp_path / "before")
    before, num_bytes = model(ids).logits, model.state_bytes(60)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "before", state_dtype="int8").eval()
    model.set_state_dtype("int8")
    after = model(ids).logits
    assert torch.equal(after, expected(ids).logits)
    assert not torch.allclose(after, before)
    assert model.state_bytes(60) == expected.state_bytes(60) < num_bytes
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()(ids).logits, after)
    text = model.generate(ids, max_new_tokens=12, do_sample=False)[0]
    assert is_greedy(model, text, 12)
    model.set_state_dtype("float32")
    assert torch.equal(model(ids).logits, before)
    for made in (model.set_state_dtype, lambda name: make_model(state_dtype=name)):
        with pytest.raises(ValueError, match="state_dtype: expected one of float32, bfloat16, int8, found"):
            made("int4")


def test_set_logn_length_is_the_changed_config(tmp_path):
    model, ids = make_model(), random_ids(1, 60)
    model.save_pretrained(tmp_path / "before")
    before = model(ids).logits
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "before", logn_length=16).eval()
    model.set_logn_length(16)
    after = model(ids).logits
    assert torch.equal(after, expected(ids).logits)
    assert torch.equal(after[:, :16], before[:, :16])
    assert not torch.allclose(after, before)
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()(ids).logits, after)
    model.set_logn_length(None)
    assert torch.equal(model(ids).logits, before)
    windows = make_model(mixer_types=["sliding_attention", "mamba2"] * 2)
    with pytest.raises(ValueError, match="expected layers with log-n scaling, such as 'ovq'"):
        windows.set_logn_length(16)
    for made in (model.set_logn_length, lambda length: make_model(logn_length=length)):
        with pytest.raises(ValueError, match="expected logn_length to be None or an integer of at least 2"):
            made(1)


@pytest.mark.parametrize(("first", "then"), [("existing", "nearest"), ("nearest", "existing")])
def test_a_cached_context_goes_on_under_another_rule(first, then):
    model, slow = make_model(merge=first), make_model(merge=first)
    for layer in slow.mixers():
        layer.backend = "naive"
    ids, logits, caches = random_ids(2, 70), [], []
    for each, rule in ((model, then), (slow, then), (model, first)):
        each.set_merge(first)
        caches.append(OVQCache(each.config))
        each(ids[:, :40], past_key_values=caches[-1])
        each.set_merge(rule)
        logits.append(each(ids[:, 40:], past_key_values=caches[-1]).logits)
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    # The tokens that are not pending, in each row and key/value head.
    state = caches[0].layers[1].state
    size = state.chunk_size
    assert (state.count.sum(-1) == 70 // size * size).all()


def test_set_merge_refuses_what_the_config_refuses():
    model = make_model(init="random")
    before = model.config.to_dict()
    for given, message in (
        ({"merge": "neither"}, "merge: expected one of"),
        ({"merge": "updated", "growth": "fast"}, "growth: expected one of"),
        ({"merge": "updated", "value_weight": -1.0}, "value_weight: expected a finite number"),
        ({"merge": "nearest"}, "init: expected 'novelty' with merge 'nearest'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(init="random", **given)
        with pytest.raises(ValueError, match=message):
            model.set_merge(**given)
    assert model.config.to_dict() == before
    assert [m.merge for m in model.mixers() if isinstance(m, OVQAttention)] == ["existing", "existing"]
    with pytest.raises(ValueError, match="expected a model with 'ovq' layers"):
        make_model(mixer_types=["full_attention"] * 4).set_merge("nearest")


@pytest.mark.parametrize("changes", [{}, BASELINES], ids=["ovq", "baselines"])
@pytest.mark.parametrize("num_tokens", [1, 4, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_is_the_size_of_a_real_cache(changes, num_tokens, dtype):
    model = make_model(**changes).to(dtype)
    cache = OVQCache(model.config)
    model(random_ids(2, num_tokens), past_key_values=cache)
    assert cache.nbytes == 2 * model.state_bytes(num_tokens)


@pytest.mark.parametrize("changes", [SIZES, BASELINES], ids=["ovq", "baselines"])
def test_one_convolution_class_for_every_mixer(changes):
    convolutions = [m for m in make_model(**changes).modules() if isinstance(m, ShortConvolution)]
    assert len(convolutions) == len(changes["mixer_types"])
    without = make_model(**changes | {"conv_size": 0})
    assert not [m for m in without.modules() if isinstance(m, ShortConvolution)]

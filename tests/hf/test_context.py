"""Persistent contexts: prompts from one give what re-reading the document gives, and no other file passes."""

import itertools
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ovq.hf import OVQForCausalLM, build_context, context_info, load_context, save_context
from ovq.hf.cache import CACHE_KEY
from ovq.hf.context_file import digest
from tests.disks import full_disk
from tests.hf.common import BASELINES, is_greedy, make_config, make_model, random_ids
from tests.ops.common import other_defaults

DOCUMENT = random_ids(1, 61, seed=3)[0]
# Unequal lengths, two of them alike, one of a single token; chunks of 4 end at different steps.
PROMPTS = [random_ids(1, n, seed=seed)[0] for seed, n in enumerate((7, 3, 1, 7))]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def context(model):
    return build_context(model, DOCUMENT, prefill_chunk_size=10)


@pytest.fixture
def saved(context, tmp_path):
    save_context(context, tmp_path / "book.ctx")
    return tmp_path / "book.ctx"


def is_reread(model, prompt, tokens, document=DOCUMENT):
    """Whether these tokens follow document and prompt when all are read at once."""
    return is_greedy(model, torch.cat([document, prompt, tokens]), len(tokens))


def test_prompts_of_any_lengths_go_on_as_if_the_document_were_read_again(model, saved):
    context = load_context(saved, model)
    inputs = context.inputs(PROMPTS)
    out = model.generate(**inputs, **GREEDY)
    assert out.shape == (4, 7 + 8)
    for row, prompt in zip(out, PROMPTS, strict=True):
        assert is_reread(model, prompt, row[7:])
        assert torch.equal(row[7 - len(prompt) : 7], prompt)
    assert len({tuple(row[7:].tolist()) for row in out}) == 4, "a model that repeats itself shows nothing"


def test_prompts_do_not_depend_on_default_dtype_and_device(model, context):
    prompts = [prompt.tolist() for prompt in PROMPTS]

    def results():
        inputs = context.inputs(prompts)
        cache = inputs.pop(CACHE_KEY)
        cache.batch_repeat_interleave(2)
        return [*inputs.values(), *(x for layer in cache.layers for x in layer.parts().values())]

    with other_defaults():
        found = results()
    assert all(map(torch.equal, found, results()))


def test_a_context_is_used_any_number_of_times(model, context):
    for prompt in (*PROMPTS, PROMPTS[0]):
        out = model.generate(**context.inputs([prompt]), **GREEDY)
        assert is_reread(model, prompt, out[0, len(prompt) :])
    both = torch.stack([PROMPTS[0], PROMPTS[3]])
    out = model.generate(**context.inputs(both), **GREEDY)
    assert is_reread(model, PROMPTS[3], out[1, 7:])


def test_branches_of_a_context_advance_in_turns(model, context):
    caches = [context.cache(), context.cache(), context.cache(2)]
    texts = [random_ids(1, 9, seed=7), random_ids(1, 9, seed=8), random_ids(2, 9, seed=9)]
    with torch.no_grad():
        for t, (cache, text) in itertools.product(range(9), zip(caches, texts, strict=True)):
            logits = model(text[:, t : t + 1], past_key_values=cache).logits
            expected = model(torch.cat([DOCUMENT.expand(len(text), -1), text[:, : t + 1]], 1)).logits[:, -1:]
            torch.testing.assert_close(logits, expected)


def test_caches_of_a_context_share_no_buffers(context):
    """Threads may each decode from a cache of their own."""
    one, two = context.cache(), context.cache()
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.parts()
        for name, part in a.parts().items():
            assert part.data_ptr() != b.parts()[name].data_ptr(), name


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.0, "output_logits": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_every_way_of_generating(model, context, options):
    prompt = PROMPTS[0]
    text = torch.cat([DOCUMENT, prompt])[None]
    outs = []
    for inputs in (context.inputs([prompt]), {"input_ids": text, "attention_mask": torch.ones_like(text)}):
        torch.manual_seed(0)
        outs.append(model.generate(**inputs, **{**GREEDY, **options}))
    if options.get("output_logits"):
        torch.testing.assert_close(outs[0].logits, outs[1].logits)
        outs = [out.sequences for out in outs]
    assert torch.equal(outs[0][:, len(prompt) :], outs[1][:, text.shape[1] :])


def test_beams_of_prompts_of_unequal_length(model, context):
    out = model.generate(**context.inputs(PROMPTS), **GREEDY, num_beams=3)
    for row, prompt in zip(out, PROMPTS, strict=True):
        text = torch.cat([DOCUMENT, prompt])[None]
        expected = model.generate(text, attention_mask=torch.ones_like(text), **GREEDY, num_beams=3)
        assert torch.equal(row[7:], expected[0, text.shape[1] :])


def test_rotary_embedding_in_every_layer():
    """Rows of unequal prompts are moved to the right, and their rotated keys and sums of keys with them."""
    model = make_model(rope_mixers=["full_attention", "sliding_attention", "ovq"])
    inputs = build_context(model, DOCUMENT).inputs(PROMPTS)
    with torch.no_grad():
        cache, last = inputs[CACHE_KEY], inputs["input_ids"][:, -1:]
        logits = model(last, inputs["attention_mask"], past_key_values=cache).logits
        for row, prompt in zip(logits, PROMPTS, strict=True):
            expected = model(torch.cat([DOCUMENT, prompt])[None], use_cache=False).logits
            torch.testing.assert_close(row, expected[0, -1:])


@pytest.mark.parametrize(
    "changes",
    [{"conv_size": 0}, {"mixer_types": ["ovq"] * 4}, {"chunk_size": 64}, {"init": "random"}, BASELINES],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 61])
def test_other_models_and_short_documents(tmp_path, changes, length):
    """With conv_size 0 there is one tensor less; with chunks of 64 there is no slot yet.

    The random choice of slots depends on the seed in force, which is the same throughout.
    """
    model = make_model(**changes)
    save_context(build_context(model, DOCUMENT[:length]), tmp_path / "c")
    context = load_context(tmp_path / "c", model)
    out = model.generate(**context.inputs(PROMPTS), **GREEDY)
    for row, prompt in zip(out, PROMPTS, strict=True):
        assert is_reread(model, prompt, row[7:], DOCUMENT[:length])


def test_pieces_and_progress_do_not_change_what_is_remembered(model, context):
    seen = []
    other = build_context(model, DOCUMENT[None], prefill_chunk_size=25, progress=seen.append)
    assert seen == [25, 50, 61]
    build_context(model, DOCUMENT, prefill_chunk_size=2**64, progress=seen.append)
    assert seen[3:] == [61]
    for a, b in zip(other.cache().layers, context.cache().layers, strict=True):
        for name, tensor in a.tensors().items():
            torch.testing.assert_close(tensor, b.tensors()[name])


def test_the_file_does_not_grow_with_the_document(tmp_path):
    model = make_model(mixer_types=["sliding_attention", "ovq"], num_hidden_layers=2).float()
    sizes, contexts = [], []
    for length in (1024, 16384):
        contexts.append(build_context(model, random_ids(1, length)[0]))
        save_context(contexts[-1], tmp_path / "c")
        sizes.append(os.path.getsize(tmp_path / "c"))
        assert contexts[-1].num_tokens == length
    assert contexts[0].nbytes == contexts[1].nbytes
    assert abs(sizes[0] - sizes[1]) < 16  # digits of the length


def test_a_context_of_the_backbone_serves_the_language_model(model, tmp_path):
    save_context(build_context(model.model, DOCUMENT), tmp_path / "c")
    out = model.generate(**load_context(tmp_path / "c", model).inputs([PROMPTS[0]]), **GREEDY)
    assert is_reread(model, PROMPTS[0], out[0, 7:])


def test_bfloat16_and_float32_keep_their_dtype(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model().to(dtype)
        save_context(build_context(model, DOCUMENT), tmp_path / "c")
        layer = load_context(tmp_path / "c", model).cache().layers[0]
        assert layer.keys.dtype == layer.conv_state.dtype == dtype
        model.generate(**load_context(tmp_path / "c", model).inputs(PROMPTS), **GREEDY)
    with pytest.raises(ValueError, match=r"model in torch.float32, found torch.bfloat16"):
        load_context(tmp_path / "c", make_model().float())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": 6}, "sliding_window=6, as the model has, found sliding_window=5"),
        ({"num_slots": 10}, "num_slots=10, as the model has, found num_slots=9"),
        ({"mixer_types": ["ovq"] * 4}, r"mixer_types\[\d\]="),
        ({"merge": "nearest"}, "merge='nearest', as the model has, found merge='existing'"),
        ({"ablation": {"bias": "count+norm"}}, "ablation={'bias': 'count\\+norm'}, as the model has"),
        ({"ablation": {"rate": 0.5}}, "ablation={'rate': 0.5}, as the model has, found ablation=None"),
        ({"rope_theta": 5000.0}, "rope_theta=5000.0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
    ],
)
def test_a_context_of_another_config_is_refused(saved, changes, expected):
    with pytest.raises(ValueError, match=rf"book\.ctx: expected a context made with .*{expected}"):
        load_context(saved, make_model(**changes))


def test_a_context_from_before_a_field_was_there_has_its_default(saved, model):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    fields = json.loads(metadata["config"])
    del fields["ablation"]
    save_file(load_file(saved), saved, metadata=metadata | {"config": json.dumps(fields)})
    assert load_context(saved, model).num_tokens == len(DOCUMENT)
    with pytest.raises(ValueError, match=r"ablation={'rate': 0\.5}, as the model has, found ablation=None"):
        load_context(saved, make_model(ablation={"rate": 0.5}))


@pytest.mark.parametrize("window", [0, 8])
def test_a_context_from_when_there_were_more_fields_is_loaded_if_they_are_off(saved, model, window):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    config = json.dumps(json.loads(metadata["config"]) | {"window": window})
    save_file(load_file(saved), saved, metadata=metadata | {"config": config})
    if not window:
        assert load_context(saved, model).num_tokens == len(DOCUMENT)
        return
    with pytest.raises(ValueError, match="window was removed; expected 0, found 8"):
        load_context(saved, model)


def test_a_context_of_other_weights_is_refused(saved, model):
    with pytest.raises(ValueError, match=r"of this very model .* found one of other weights"):
        load_context(saved, make_model(seed=1))
    other = make_model()
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight[3, 5] += 1e-9
    with pytest.raises(ValueError, match=r"found one of other weights"):
        load_context(saved, other)
    other = OVQForCausalLM(make_config(pad_token_id=0, use_cache=False)).double()
    other.load_state_dict(model.state_dict())
    load_context(saved, other)  # fields without effect may differ
    other.set_num_slots(20)
    with pytest.raises(ValueError, match="num_slots=20"):
        load_context(saved, other)


def test_truncated_files(saved, model):
    data = saved.read_bytes()
    for kept in (0, 7, 300, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:kept])
        with pytest.raises(
            ValueError, match=r"book\.ctx: expected a saved context, found a file that is dam"
        ):
            load_context(saved, model)


def test_a_flipped_bit_anywhere_in_the_tensors_is_noticed(saved, model):
    data = saved.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in torch.linspace(header, len(data) - 1, 25).long().tolist():
        saved.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="it is damaged"):
            load_context(saved, model)


def test_foreign_and_missing_files(tmp_path, model):
    with pytest.raises(ValueError, match="expected a saved context, found no such file"):
        load_context(tmp_path / "nowhere", model)
    (tmp_path / "text").write_text("not a context")
    with pytest.raises(ValueError, match="damaged or foreign"):
        load_context(tmp_path / "text", model)
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="expected format 'ovq-context', found None"):
        load_context(tmp_path / "weights", model)
    build_context(model, DOCUMENT).cache().layers[1].state.save(tmp_path / "state")
    with pytest.raises(ValueError, match="expected format 'ovq-context', found 'ovq-state'"):
        load_context(tmp_path / "state", model)


def with_a_hole(tensors):
    """The counts of a head with those of the first slot moved to the last."""
    counts = tensors["layers.1.count"][0, 0].clone()
    counts[-1] += counts[0]
    counts[0] = 0
    # In the other head too, so that both have as many slots in use.
    tensors["layers.1.count"][0, 1] = counts
    tensors["layers.1.key_sum"][0, :, 0] = tensors["layers.1.value_sum"][0, :, 0] = 0
    return counts


@pytest.mark.parametrize(
    ("change", "header", "expected"),
    [
        (lambda t: t.pop("layers.0.keys"), {}, r"layer 0: .* they differ in \['keys'\]"),
        (lambda t: t.update(extra=torch.zeros(1)), {}, "expected tensors of 4 layers, found 'extra'"),
        (
            lambda t: t.update({"layers.0.keys": t["layers.0.keys"][:, :, 1:].contiguous()}),
            {},
            "keys of shape",
        ),
        (
            lambda t: t.update({"layers.2.values": t["layers.2.values"].float()}),
            {},
            "layer 2: expected values",
        ),
        (lambda t: t["layers.0.conv_state"].view(-1)[0].fill_(torch.inf), {}, "finite values in conv_state"),
        (lambda t: t["layers.2.keys"].view(-1)[0].fill_(torch.nan), {}, "finite values in keys"),
        (lambda t: t["layers.1.count"].view(-1)[0].add_(1), {}, "layer 1: expected counts that add up"),
        (lambda t: t["layers.3.key_sum"].view(-1)[0].fill_(torch.nan), {}, "finite values in key_sum"),
        (
            lambda t: t.update({"layers.1.pending_keys": t["layers.1.pending_keys"].to(torch.float8_e4m3fn)}),
            {},
            "layer 1: expected pending_keys in one of .*, found torch.float8_e4m3fn",
        ),
        (
            lambda t: t.update({"layers.0.keys": t["layers.0.keys"].to(torch.float8_e4m3fn)}),
            {},
            "layer 0: expected keys .*, found .* in torch.float8_e4m3fn",
        ),
        (lambda t: t["layers.1.count"][0, 0].copy_(with_a_hole(t)), {}, "slots in use before spare ones"),
        (lambda t: t["layers.1.count"][0, 0, :2].fill_(2**63 - 1), {}, "add up within int64"),
        (lambda t: None, {"num_tokens": str(10**18)}, r"layer 1: expected num_seen \[10{18}\], found \[61\]"),
        (lambda t: None, {"num_tokens": "9" * 5000}, "num_tokens to be an integer from 1"),
        (lambda t: None, {"num_tokens": "60"}, r"layer 1: expected num_seen \[60\], found \[61\]"),
        (lambda t: None, {"num_tokens": "-3"}, r"num_tokens to be an integer from 1 to 2\^62, found '-3'"),
        (lambda t: None, {"version": "2"}, "expected version '1', found '2'"),
        (lambda t: None, {"config": "[1"}, "expected the config of a model"),
        (lambda t: None, {"content": "0"}, "it is damaged"),
    ],
)
def test_what_cannot_be_the_memory_of_the_model_is_refused(saved, model, change, header, expected):
    """Even where the digest is right: the file may come from anywhere."""
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, saved, metadata={**metadata, "content": digest(tensors), **header})
    with pytest.raises(ValueError, match=expected):
        load_context(saved, model)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("layers.1.count", [-5, -2], "layer 1: expected counts of at least 0, found -5"),
        ("layers.1.count", [2**63 - 1, 2**62], "layer 1: expected .*add up within int64"),
        ("layers.1.count", [62, 32], "layer 1: expected .*add up to the tokens merged"),
        ("layers.0.num_seen", [60], r"layer 0: expected num_seen \[61\], found \[60\]"),
    ],
)
def test_counts_of_other_mixers_are_checked_too(tmp_path, name, values, expected):
    model = make_model(**BASELINES)
    save_context(build_context(model, DOCUMENT), tmp_path / "c")
    tensors = load_file(tmp_path / "c")
    with safe_open(tmp_path / "c", framework="pt") as file:
        metadata = file.metadata()
    tensors[name].view(-1)[: len(values)] = torch.tensor(values)
    save_file(tensors, tmp_path / "c", metadata={**metadata, "content": digest(tensors)})
    with pytest.raises(ValueError, match=expected):
        load_context(tmp_path / "c", model)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_file(saved, context):
    before = saved.read_bytes()
    with full_disk(1000), pytest.raises(OSError, match=r"book\.ctx: cannot be written \(.*File too large"):
        save_context(context, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_is_atomic_and_refuses_what_could_not_be_loaded(saved, context, model, monkeypatch):
    before = saved.read_bytes()
    broken = make_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(ValueError, match="context: layer 0: expected finite values in conv_state, found NaN"):
        save_context(build_context(broken, torch.tensor([3, 5])), saved)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_context(context, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], r"expected one row of at least 1 token, found shape \[0\]"),
        (torch.zeros(2, 5, dtype=torch.long), r"found shape \[2, 5\]"),
        ([3, 48], r"token ids in 0..47, found torch.int64 in 3..48"),
        ([-1, 3], r"found torch.int64 in -1..3"),
        ([1.5], "expected integer token ids"),
    ],
)
def test_documents_and_prompts_that_are_none_are_refused(model, context, ids, expected):
    with pytest.raises(ValueError, match=f"input_ids: .*{expected}"):
        build_context(model, ids)
    with pytest.raises(ValueError, match=f"prompt 1: .*{expected}"):
        context.inputs([[1, 2], ids])
    with pytest.raises(ValueError, match="prompts: expected at least one, found none"):
        context.inputs([])
    with pytest.raises(ValueError, match="prefill_chunk_size: expected at least 1, found 0"):
        build_context(model, [1], prefill_chunk_size=0)


def test_the_cache_can_be_used_without_generate(model, context):
    inputs = context.inputs([PROMPTS[0]])
    with torch.no_grad():
        out = model(inputs["input_ids"], inputs["attention_mask"], past_key_values=inputs[CACHE_KEY])
        expected = model(torch.cat([DOCUMENT, PROMPTS[0]])[None]).logits[:, len(DOCUMENT) :]
    torch.testing.assert_close(out.logits, expected)


@pytest.mark.parametrize("changes", [{}, BASELINES], ids=["ovq", "others"])
def test_a_file_is_read_without_its_model(changes, tmp_path):
    model = make_model(**changes).to(torch.bfloat16)
    context = build_context(model, DOCUMENT)
    save_context(context, tmp_path / "book.ctx")
    info = context_info(tmp_path / "book.ctx")
    assert (info.num_tokens, info.nbytes, info.dtype) == (len(DOCUMENT), context.nbytes, "torch.bfloat16")
    assert info.config.mixer_types == model.config.mixer_types
    assert info.weights == context.fingerprint["weights"]
    for found, layer in zip(info.cache.layers, context.cache().layers, strict=True):
        expected = layer.tensors()
        for name, tensor in found.tensors().items():
            assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"dtype": "torch.int8"}, "expected a model in one of .*, found 'torch.int8'"),
        ({"config": "{}"}, "layer 0: expected conv_state of shape"),
        ({"config": "[1]"}, r"expected the config of a model, found '\[1\]'"),
        ({"config": '{"hidden_size": -4}'}, "expected the config of a model, found .*-4"),
        ({"config": '{"num_hidden_layers": 50000}'}, "expected tensors of 50000 layers, found 20 tensors"),
        ({"num_tokens": "0"}, "expected num_tokens to be an integer from 1"),
        ({"content": "0"}, "it is damaged"),
    ],
)
def test_a_file_that_cannot_be_the_memory_of_any_model(saved, header, expected):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(saved), saved, metadata=metadata | header)
    with pytest.raises(ValueError, match=expected):
        context_info(saved)


def test_what_is_printed_is_short(context):
    shown = f"{len(DOCUMENT)}, {context.nbytes:,} bytes"
    assert repr(context) == f"Context(num_tokens={shown}, of OVQForCausalLM)"
    cache = context.cache(2)
    assert repr(cache) == f"OVQCache(layers=4, rows=2, columns=61, {2 * context.nbytes:,} bytes)"
    assert all(len(repr(layer)) < 120 for layer in cache.layers)


def test_the_fingerprint_is_readable(saved):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"])["chunk_size"] == 4
    assert (metadata["dtype"], metadata["num_tokens"]) == ("torch.float64", "61")

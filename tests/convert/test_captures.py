"""A text is read once, whoever asks for it, and what was found is the same each time."""

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

from ovq.convert import Captures, Option, attach, fitted_bias, probe
from ovq.convert.captures import _gradient, capture
from tests.convert.common import KINDS, original, tokens

TENSORS = ("q", "k", "v", "o", "g")


def test_a_probe_and_its_biases_read_each_text_once_and_find_what_they_find_apart():
    model, texts = original(), [tokens(150), tokens(130, seed=1)]
    mask = torch.arange(150) > 120
    options = [Option(num_slots=n, window=w) for n, w in ((0, 8), (8, 8), (16, 8), (0, 40))]
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    given = {"options": options, "targets": [None, None, mask], "num_sinks": 2, "chunk_size": 8}
    found = {}
    for is_shared in (False, True):
        with Captures(model) if is_shared else contextlib.nullcontext() as captures:
            probed = probe(model, [*texts, texts[0]], **given, captures=captures)
            found[is_shared] = probed.losses, fitted_bias(model, texts, probed.config(18), captures=captures)
        # First what comes before predictions that count, then the rest. A mask is read for itself, since the
        # loss is another one.
        once = [125, 25, 108, 22, 120, 30]
        assert lengths == once + once[:4] * (not is_shared)
        lengths.clear()
    assert torch.equal(found[False][0], found[True][0])
    # With the budgets, exponents, uses and biases.
    assert found[False][1] == found[True][1]


def test_what_is_kept_is_what_was_found():
    model, text = original().to(torch.bfloat16), tokens(90)
    with Captures(model) as captures:
        folder = Path(captures._folder.name)
        for mask, seed in ((None, 0), (None, 1), (torch.arange(90) > 70, 0)):
            for _ in range(2):
                for kept, layer in zip(
                    captures.of(text, mask, seed), capture(model, text, mask, seed), strict=True
                ):
                    assert kept.num_targets == layer.num_targets
                    assert all(torch.equal(getattr(kept, name), getattr(layer, name)) for name in TENSORS)
        assert len(list(folder.iterdir())) == 3
    assert not folder.exists()


def test_nothing_holds_a_model_and_its_captures_once_they_are_deleted():
    model = original()
    with Captures(model) as captures:
        captures.read(tokens(60))
    held = [weakref.ref(x) for x in (model, captures)]
    del model, captures
    layers = capture(original(), tokens(60), None, 0)
    held.append(weakref.ref(layers[0].k))
    del layers
    gc.collect()
    assert [x() for x in held] == [None] * 3


def test_captures_of_another_model_are_refused():
    with Captures(original()) as captures:
        with pytest.raises(ValueError, match="captures: expected those of the same model"):
            probe(original(), [tokens(20)], options=[Option(num_slots=0, window=8)], captures=captures)
        # One that was lent stays.
        assert Path(captures._folder.name).exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((tokens(1),), r"texts: expected at least 2 tokens \[T\], found \(1,\)"),
        ((torch.tensor([1, 64]),), "texts: expected token ids from 0 to 63, found 64"),
        ((tokens(20), torch.ones(30) > 0), r"a mask of the 20 tokens of text 0, found \(30,\)"),
    ],
)
def test_texts_that_cannot_be_captured(given, expected):
    with Captures(original()) as captures, pytest.raises(ValueError, match=expected):
        captures.of(*given)
    with pytest.raises(ValueError, match="model: expected one that is not converted yet"):
        Captures(attach(original()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_pass_over_all_tokens(kind):
    model, text = original(kind).double(), tokens(90)
    whole = original(kind).double()
    outputs = []

    def keep(module, args, output):
        # What the output projection takes: the outputs of all heads.
        args[0].retain_grad()
        outputs.append(args[0])

    for layer in whole.model.layers:
        layer.self_attn.o_proj.register_forward_hook(keep)
    for mask in (torch.arange(90) > 70, torch.arange(90) == 1):
        outputs.clear()
        logits = whole(text[None]).logits[0]
        places = mask.nonzero()[:, 0]
        F.cross_entropy(logits[places - 1], text[places], reduction="sum").backward()
        start = int(places[0]) - 1
        for layer, o in zip(capture(model, text, mask, 0), outputs, strict=True):
            for found, x in ((layer.o, o), (layer.g, o.grad)):
                expected = x[0, start:].detach().unflatten(-1, (4, 8)).transpose(0, 1)
                torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-5)
            assert layer.k.shape[2] == 90


# Granite divides what its output layer gives, Mixtral's base model returns more than a state of each token,
# and OPT calls a module within its base model.
@pytest.mark.parametrize("kind", ["Granite", "Mixtral", "OPT"])
def test_gradients_are_those_of_the_logits_that_the_model_makes(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    own = {"Granite": {"logits_scaling": 8.0}, "Mixtral": {"num_key_value_heads": 4}}.get(kind, {})
    config = getattr(transformers, f"{kind}Config")(**sizes, **own, num_attention_heads=4)
    model, text = getattr(transformers, f"{kind}ForCausalLM")(config).eval(), tokens(40)
    outputs = model.base_model(text[None])
    outputs.last_hidden_state.retain_grad()
    logits = model.get_output_embeddings()(outputs.last_hidden_state)[0, :-1] / own.get("logits_scaling", 1)
    F.cross_entropy(logits, text[1:], reduction="sum").backward()
    found = _gradient(model, outputs, torch.arange(39), text[1:], 0)
    torch.testing.assert_close(found, outputs.last_hidden_state.grad)
    assert not any("forward" in vars(module) for module in model.modules())


def test_tokens_are_sampled_with_the_probabilities_of_the_model():
    model = original()
    torch.manual_seed(0)
    num = 20000
    hidden = torch.randn(1, 1, model.config.hidden_size).expand(1, num, -1)
    logits = model.get_output_embeddings()(hidden[0, 0]).detach()
    outputs = BaseModelOutputWithPast(last_hidden_state=hidden)
    gradient = _gradient(model, outputs, torch.arange(num), None, 0)[0].double()
    # The gradient of a place is the mean embedding minus that of its token: 0 on average.
    assert (gradient.mean(0).norm() * num**0.5 / gradient.norm(dim=1).mean()) < 2
    assert len(gradient.unique(dim=0)) > len(logits) / 2

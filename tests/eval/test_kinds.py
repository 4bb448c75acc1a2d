"""Converted models and pretrained ones are tested as those of this library are, each with its own cache."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from tests.convert.common import MEMORY, SIZES
from tests.test_cli import fail, run
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers import MistralForCausalLM as Mistral

from ovq.convert import attach
from ovq.hf.cache import CACHE_KEY
from ovq.runtime.progress import Reporter
from ovq_lab.eval.language import evaluate_language
from ovq_lab.eval.models import check_logits, chunk_size_of, new_cache, state_bytes
from ovq_lab.eval.needle import ask
from ovq_lab.eval.reading import start_token, token_bytes, token_losses
from ovq_lab.text import byte_tokenizer
from ovq_lab.text.haystack import Needle, NeedleBuilder

BYTES = byte_tokenizer()
TEXT = " ".join(f"This is sentence {i} of a text that is made up." for i in range(12))
BYTE_SIZES = SIZES | {"vocab_size": 257}


def pretrained():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**BYTE_SIZES, eos_token_id=256)).eval()


PRETRAINED = pretrained()
MODELS = {"pretrained": PRETRAINED, "converted": attach(copy.deepcopy(PRETRAINED), **MEMORY)}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        model.save_pretrained(folder / name)
        BYTES.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor(ids)[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_pieces_costs_what_it_costs_at_once(name):
    model, ids = MODELS[name], np.array(list(TEXT.encode()))[:200]
    logits = logits_of(model, ids.tolist())
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:]), reduction="none")
    for piece_size in (7, 64):
        np.testing.assert_allclose(token_losses(model, ids, piece_size=piece_size), expected, atol=1e-4)
    # The memory is used: with full attention the loss is another.
    other = token_losses(MODELS["converted" if name == "pretrained" else "pretrained"], ids)
    assert abs(other[100:].mean() - expected[100:].mean()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_bytes_are_those_of_a_real_cache(name):
    model, cache = MODELS[name], new_cache(MODELS[name])
    for piece in torch.tensor(list(TEXT.encode()))[:90].split(40):
        model(piece[None], **{CACHE_KEY: cache})
    tensors = [
        t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    real = cache.nbytes if name == "converted" else sum(t.nbytes for t in tensors)
    assert state_bytes(model, 90) == real
    window = Mistral(MistralConfig(**BYTE_SIZES, sliding_window=16))
    assert state_bytes(window, 90) == state_bytes(window, 16) == 16 * state_bytes(window, 1)


@pytest.mark.parametrize("name", MODELS)
def test_needles_are_scored_as_by_hand(name):
    model = MODELS[name]
    needle = NeedleBuilder(BYTES, num_distractors=2).build(330, depth=0.2, seed=0, index=0)
    score = ask(model, BYTES, needle, piece_size=50)

    def forced(answer):
        logits = logits_of(model, [*needle.prompt.tolist(), *answer.tolist()])[len(needle.prompt) - 1 : -1]
        likelihoods = logits.log_softmax(-1)
        targets = torch.from_numpy(answer)
        return likelihoods.gather(1, targets[:, None]).sum(), (logits.argmax(-1) == targets).float().mean()

    own, accuracy = forced(needle.answer)
    assert score.token_accuracy == pytest.approx(float(accuracy))
    assert score.is_chosen == all(own > forced(other)[0] for other in needle.distractors)
    assert not score.is_generated
    # What the model does say is found.
    ids = torch.from_numpy(needle.prompt)[None]
    said = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    value = BYTES.decode(said.tolist(), skip_special_tokens=True)
    changed = Needle(**{**dataclasses.asdict(needle), "value": value, "answer": said.numpy()})
    score = ask(model, BYTES, changed, piece_size=50)
    assert score.is_generated
    assert score.token_accuracy == 1


def test_one_table_holds_models_of_all_kinds(folder, capsys):
    models = [option for name in MODELS for option in ("--model", folder / name)]
    command = ["eval", "lm", *models, "--dataset", folder / "text.txt", "--split", "all", "--json"]
    command += ["--lengths", 300, "--windows", 1, "--num-slots", 7, "--block-size", 100]
    rows = json.loads(run(capsys, *command))["rows"]
    ids = np.array(list(TEXT.encode()))
    for row, (name, model) in zip(rows, MODELS.items(), strict=True):
        assert (row["mixer"], row["name"], row["num_slots"]) == (name, "", None)
        with Reporter() as reporter:
            [expected] = evaluate_language(
                model, [ids], lengths=[300], bytes_of_tokens=token_bytes(BYTES), reporter=reporter
            )
        # Without a token before the text, as the tokenizer puts none there.
        assert row["loss"] == pytest.approx(expected.loss, abs=1e-6)
        assert row["state_bytes"] == state_bytes(model, 300)
    assert [row["chunk_size"] for row in rows] == [chunk_size_of(MODELS["pretrained"]), 8]
    command = ["eval", "needle", *models, "--lengths", 330, "--depths", 50, "--examples", 1, "--json"]
    assert [row["mixer"] for row in json.loads(run(capsys, *command))["rows"]] == list(MODELS)


def test_other_dictionaries_are_refused_where_one_is_chosen(folder, capsys):
    for name in MODELS:
        command = ["eval", "harness", "--tasks", "none", "--num-slots", 3, "--model", folder / name]
        assert f"--num-slots: expected none with a {name} model, found 3" in fail(capsys, *command)


def test_logits_that_the_output_layer_does_not_give_are_refused():
    for model in MODELS.values():
        check_logits(model)
    torch.manual_seed(0)
    scaled = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()
    with pytest.raises(
        ValueError, match="GraniteForCausalLM: expected logits equal to those of its output layer"
    ):
        check_logits(scaled)
    scaled.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="expected final_logit_softcapping None in its config, found 30"):
        check_logits(scaled)


def test_what_a_tokenizer_puts_before_a_text():
    from tokenizers.processors import TemplateProcessing

    assert start_token(BYTES) is None
    # One that knows no such text.
    assert start_token(lambda text, **options: {"input_ids": []}) is None
    marking, ending = byte_tokenizer(), byte_tokenizer()
    special = [(BYTES.eos_token, 256)]
    for tokenizer, template in ((marking, f"{BYTES.eos_token} $A"), (ending, f"$A {BYTES.eos_token}")):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=special
        )
    assert (start_token(marking), start_token(ending)) == (256, None)

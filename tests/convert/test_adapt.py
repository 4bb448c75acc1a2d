"""A little training: it learns, goes on after an interruption, and is saved with the model."""

import contextlib
import dataclasses
import functools
import importlib.util
import re

import numpy as np
import pytest
import torch

from ovq.convert import PRESETS, AdaptSettings, adapt, load
from ovq.convert.adapt.reading import SlotReading
from ovq.convert.adapt.texts import Sequences
from ovq.text import TextSource, byte_tokenizer, load_corpus
from tests.convert.common import converted, original, tokens

HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="expected the package peft")
STAGE_1 = AdaptSettings(head_tokens=600, logit_tokens=0, length=120, piece_size=40, head_rate=0.1)
STAGE_2 = dataclasses.replace(STAGE_1, head_tokens=0, logit_tokens=600, lora_rank=4, lora_rate=0.01)


class Texts:
    """As much of a corpus as an adaptation asks for: documents of random tokens."""

    def __init__(self, *lengths):
        self._documents = [tokens(n, seed=n).numpy().astype(np.uint8) for n in lengths]
        self.num_tokens = np.array(lengths)
        self.end_of_text, self.digest = 0, str(lengths)

    def __len__(self):
        return len(self._documents)

    def __getitem__(self, index):
        return self._documents[index]


LENGTHS = (150, 190, 230, 270, 310, 350)


def learned(settings, *, lengths=LENGTHS, stop_after=None, path=None, **kwargs):
    """A model after an adaptation, and the losses; it is interrupted after so many batches."""
    model, losses = converted(**kwargs), []

    def progress(found):
        losses.append(found.loss)
        if len(losses) == stop_after:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        adapt(model, Texts(*lengths), settings=settings, checkpoint=path, progress=progress)
    return model, losses


def test_outputs_of_heads_come_nearer_and_nothing_else_changes(tmp_path):
    before = original().state_dict()
    # One document that fills a sequence with its end.
    model, losses = learned(dataclasses.replace(STAGE_1, head_tokens=1200), lengths=(119,))
    assert losses[-1] < 0.95 * losses[0]
    config = model.memory_config
    # The second head of layer 0 has no slots, so the query heads that read it have learned nothing.
    assert config.slot_bias[0][2:] == [0, 0]
    assert min(map(abs, config.slot_bias[0][:2] + config.slot_bias[1])) > 1e-3
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    model.save_pretrained(tmp_path / "adapted")
    loaded = load(tmp_path / "adapted")
    assert loaded.memory_config == config
    ids = tokens(1, 200, seed=9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.allclose(converted()(ids).logits, model(ids).logits)


def test_gradients_of_stage_1_are_those_of_differences():
    # Checked on the sum over pieces, where memories are carried from one to the next.
    from ovq.convert.adapt.heads import HeadErrors

    model, ids = converted(), tokens(2, 90, seed=3)
    model.requires_grad_(False)

    def total(change):
        reading = SlotReading(model.memory_config, 4)
        reading.bias.data[1, 1] += change
        errors = HeadErrors(model, reading)
        errors.start(0)
        found = sum(errors.add(piece) for piece in ids.split(30, dim=1))
        # The mean over 2 layers.
        return found * 2, float(reading.bias.grad[1, 1])

    value, gradient = total(0.0)
    assert (total(0.01)[0] - total(-0.01)[0]) / 0.02 == pytest.approx(gradient, rel=1e-2)
    assert value > 0


@needs_peft
def test_predictions_come_nearer_to_those_of_the_original(tmp_path):
    settings = dataclasses.replace(STAGE_2, logit_tokens=1200, short_windows=0.0)
    model, losses = learned(settings, lengths=(119,))
    assert losses[-1] < 0.8 * losses[0]
    before = original().state_dict()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == 8
    assert all("self_attn" in name for name in changed)
    model.save_pretrained(tmp_path / "adapted")
    ids = tokens(1, 200, seed=9)
    assert torch.equal(load(tmp_path / "adapted")(ids).logits, model(ids).logits)


BOTH_STAGES = dataclasses.replace(STAGE_2, head_tokens=240)
uninterrupted = functools.cache(learned)


@pytest.mark.parametrize(
    ("settings", "stop_after"),
    [
        (STAGE_1, 3),
        pytest.param(BOTH_STAGES, 1, marks=needs_peft),
        pytest.param(BOTH_STAGES, 3, marks=needs_peft),
    ],
)
def test_a_run_goes_on_where_it_was_interrupted(tmp_path, settings, stop_after):
    path = tmp_path / "checkpoint"
    whole, all_losses = uninterrupted(settings)
    _, first = learned(settings, path=path, stop_after=stop_after)
    assert len(first) == stop_after
    again, rest = learned(settings, path=path)
    assert first + rest == all_losses
    assert again.memory_config == whole.memory_config
    for name, p in whole.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    other = dataclasses.replace(settings, head_rate=0.2)
    with pytest.raises(ValueError, match="expected the checkpoint of a run with settings"):
        learned(other, path=path)
    with pytest.raises(ValueError, match="expected the checkpoint of a run with config"):
        learned(settings, path=path, window=8)


def test_the_preset_for_gpus_runs_on_a_tiny_model():
    settings = dataclasses.replace(
        PRESETS["gpu"], head_tokens=200, logit_tokens=200 * HAS_PEFT, length=100, batch_size=2, piece_size=50
    )
    assert len(learned(settings)[1]) == 1 + HAS_PEFT
    assert 0.3e9 <= PRESETS["gpu"].head_tokens + PRESETS["gpu"].logit_tokens <= 0.7e9


def test_every_epoch_shows_the_documents_in_another_order():
    corpus = Texts(150, 190, 230)
    sequences = Sequences(corpus, length=100, seed=1)
    assert sequences.num_per_epoch == 5
    pieces = sequences.batch(0, 5)
    assert torch.equal(pieces, Sequences(corpus, length=100, seed=1).batch(0, 5))
    assert not torch.equal(pieces, sequences.batch(1, 5))
    whole = b"".join(bytes(x.tolist()) + b"\0" for x in corpus)
    # Between the ends of texts, each is a part of a document.
    parts = bytes(pieces.flatten().tolist()).split(b"\0")
    assert len(parts) >= 3
    assert all(part in whole for part in parts)


def test_numbers_are_hidden_in_a_share_of_the_sequences():
    corpus = load_corpus(TextSource(dataset="stdlib", subset="json", held_out=0), "train")
    tokenizer = byte_tokenizer()

    def texts(share):
        sequences = Sequences(corpus, length=1200, seed=1, needle_share=share, tokenizer=tokenizer)
        found = [tokenizer.decode(ids) for ids in sequences.batch(0, 12)]
        assert [tokenizer.decode(ids) for ids in sequences.batch(1, 6)] == found[6:]
        return found

    plain, some, all_of_them = texts(0), texts(0.5), texts(1)
    assert all(text in (x, y) for text, x, y in zip(some, plain, all_of_them, strict=True))
    assert {*plain} & {*some}
    assert {*all_of_them} & {*some}
    for text, around in zip(all_of_them, plain, strict=True):
        numbers = re.findall(r"magic numbers for [a-z-]+ is: (\d{7})\.", text)
        # Hidden, and asked for in another order.
        assert len(numbers) == 2 * 6
        assert all(numbers.count(number) == 2 for number in numbers)
        assert len({*text.split()} & {*around.split()}) > 10
    with pytest.raises(ValueError, match="needle_share: expected 0 without a tokenizer"):
        Sequences(corpus, length=1200, seed=1, needle_share=0.5)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="model: expected a converted one"):
        adapt(original(), Texts(200), settings=STAGE_1)
    with pytest.raises(ValueError, match="found windows alone"):
        adapt(converted(num_slots=0), Texts(200), settings=STAGE_1)
    with pytest.raises(ValueError, match="length: expected at most 201"):
        adapt(converted(), Texts(200), settings=dataclasses.replace(STAGE_1, length=2000))
    bytes_of_json = load_corpus(TextSource(dataset="stdlib", subset="json", held_out=0), "train")
    with pytest.raises(ValueError, match="corpus: expected token ids below 64"):
        adapt(converted(), bytes_of_json, settings=STAGE_1)
    for fields, said in (
        ({"length": 1}, "length: expected an integer of at least 2"),
        ({"piece_size": 0}, "piece_size: expected an integer of at least 1"),
        ({"short_windows": 2}, "short_windows: expected a share"),
        ({"needle_share": -0.1}, "needle_share: expected a share"),
        ({"head_rate": 0}, "head_rate: expected a number above 0"),
        ({"head_tokens": 0, "logit_tokens": 0}, "nothing to learn from"),
    ):
        with pytest.raises(ValueError, match=said):
            AdaptSettings(**fields)


@pytest.mark.skipif(HAS_PEFT, reason="peft is installed")
def test_stage_2_needs_peft():
    with pytest.raises(ValueError, match="expected 0 without the package peft"):
        # Before stage 1 has been read.
        learned(dataclasses.replace(STAGE_2, head_tokens=10**9))

"""A text is read once, whoever asks for it, and what was found is the same each time."""

import contextlib
from pathlib import Path

import pytest
import torch

from ovq.convert import Captures, Option, fitted_bias, probe
from ovq.convert.captures import capture
from tests.convert.common import original, tokens

TENSORS = ("q", "k", "v", "o", "g")


def test_a_probe_and_its_biases_read_each_text_once_and_find_what_they_find_apart():
    model, texts = original(), [tokens(150), tokens(130, seed=1)]
    mask = torch.arange(150) > 120
    options = [Option(num_slots=n, window=w) for n, w in ((0, 8), (8, 8), (16, 8), (0, 40))]
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    given = {"options": options, "targets": [None, None, mask], "num_sinks": 2, "chunk_size": 8}
    found = {}
    for is_shared in (False, True):
        with Captures(model) if is_shared else contextlib.nullcontext() as captures:
            probed = probe(model, [*texts, texts[0]], **given, captures=captures)
            found[is_shared] = probed.losses, fitted_bias(model, texts, probed.config(18), captures=captures)
        # A mask is read for itself, since the loss is another one.
        assert lengths == [150, 130, 150] + [150, 130] * (not is_shared)
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


def test_captures_of_another_model_are_refused():
    with Captures(original()) as captures:
        with pytest.raises(ValueError, match="captures: expected those of the same model"):
            probe(original(), [tokens(20)], options=[Option(num_slots=0, window=8)], captures=captures)
        # One that was lent stays.
        assert Path(captures._folder.name).exists()

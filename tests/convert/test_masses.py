"""Biases of slots solve the equations, lower the estimated rise of the loss, and are kept with the model."""

import dataclasses

import pytest
import torch

from ovq.convert import MemoryConfig, attach, fitted_bias
from ovq.convert.captures import capture
from ovq.convert.masses import _changes
from tests.convert.common import MEMORY, converted, original, tokens

CONFIG = MemoryConfig(**MEMORY)


def test_biases_solve_the_equations_and_lower_the_estimate(monkeypatch):
    # Losses of this model are large, and biases are to stay small.
    monkeypatch.setattr("ovq.convert.masses._RIDGE", 3.0)
    texts = [tokens(150), tokens(130, seed=1)]
    bias = torch.tensor(fitted_bias(original(), texts, CONFIG).slot_bias, dtype=torch.float64)
    assert bias.shape == (2, 4)
    # A key/value head without slots reads none.
    assert (bias[0, 2:] == 0).all()
    assert ((bias[0, :2].abs() > 1e-3) & (bias[0, :2].abs() < 1)).all()
    slope = 3 * bias.flatten()
    before = after = 0.0
    for text in texts:
        layers = capture(original(), text, None, 0)
        found = [_changes(c, CONFIG.layer(i)) for i, c in enumerate(layers)]
        x, y = sum(change for change, _ in found), torch.cat([by_bias for _, by_bias in found])
        biased = dataclasses.replace(CONFIG, slot_bias=bias.tolist())
        truly = sum(_changes(c, biased.layer(i))[0] for i, c in enumerate(layers))
        slope = slope + y @ (x + bias.flatten() @ y) / 4 / layers[0].num_targets
        before, after = before + float(x.square().sum()), after + float(truly.square().sum())
    assert slope.abs().max() < 1e-3
    assert after < 0.995 * before


def test_biases_stay_where_the_equations_hold():
    bias = torch.tensor(fitted_bias(original(), [tokens(150)], CONFIG).slot_bias)
    assert bias.abs().max() == 1


def test_a_fit_goes_on_from_the_biases_there_are(monkeypatch):
    # As above.
    monkeypatch.setattr("ovq.convert.masses._RIDGE", 0.1)
    given = dataclasses.replace(CONFIG, slot_bias=[[0.0, 0.0, 0.5, 0.5], [0.0] * 4])
    config = fitted_bias(original(), [tokens(450)], given)
    again = torch.tensor(fitted_bias(original(), [tokens(450)], config).slot_bias)
    bias = torch.tensor(config.slot_bias)
    # A key/value head without slots reads none, and the others lack less than before.
    assert (bias[0, 2:] == again[0, 2:]).all()
    assert (bias[0, 2:] == 0.5).all()
    assert ((again - bias).abs() < 0.9 * bias.abs())[0, :2].all()


def test_query_heads_that_cannot_share_key_value_heads_are_refused():
    with pytest.raises(ValueError, match=r"slot_bias: expected numbers for the query heads .* \[3, 4\]"):
        MemoryConfig(**MEMORY, slot_bias=[[0.0] * 3, [0.0] * 4])


def test_it_is_saved_with_the_model_and_read():
    config = fitted_bias(original(), [tokens(150)], CONFIG)
    ids = tokens(1, 120)
    plain, biased = (attach(original(), config=c)(ids).logits for c in (CONFIG, config))
    assert not torch.allclose(plain, biased)
    assert MemoryConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("model", "texts", "num_layers", "message"),
    [
        (original, [], 2, "texts: expected at least one"),
        (
            original,
            [tokens(9), tokens(1)],
            2,
            r"texts: expected at least 2 tokens \[T\], found \(1,\) in text 1",
        ),
        (original, [[1, 2]], 2, "texts: expected int64 or int32 tensors of token ids, found list in text 0"),
        (original, [torch.ones(9)], 2, "token ids, found torch.float32 in text 0"),
        (original, [torch.arange(-1, 9)], 2, r"texts: expected token ids from 0 to \d+, found -1 in text 0"),
        (original, [tokens(9), torch.tensor([1, 10**6])], 2, "found 1000000 in text 1"),
        (original, [tokens(9)], 1, r"config: expected numbers for \[2, 2\] key/value heads .* found \[2\]"),
        (converted, [tokens(9)], 2, "model: expected one that is not converted yet"),
        (
            lambda: torch.nn.Linear(1, 1),
            [tokens(9)],
            2,
            "model: expected a model of transformers, found Linear",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model, texts, num_layers, message):
    config = MemoryConfig.uniform(num_layers=num_layers, num_kv_heads=2, num_slots=8, window=32)
    with pytest.raises(ValueError, match=message):
        fitted_bias(model(), texts, config)

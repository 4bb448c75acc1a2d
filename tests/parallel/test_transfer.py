"""States as messages and back."""

import torch

from ovq.hf import OVQCache
from ovq.layers.memory import num_bytes
from ovq.ops.parts import of_rows
from ovq.parallel.transfer import pack, unpack
from tests.hf.common import BASELINES, SIZES, make_model, random_ids


def test_every_cache_is_what_is_said_of_it_and_travels_whole():
    for changes in ({}, BASELINES, {"conv_size": 0, "sliding_window": 40}):
        model = make_model(**changes)
        for num_tokens in (1, 4, 30):
            cache = OVQCache(model.config)
            with torch.no_grad():
                model(random_ids(2, num_tokens), past_key_values=cache)
            for mixer, layer in zip(model.mixers(), cache.layers, strict=True):
                spec = of_rows(mixer.state_spec(num_tokens, torch.float64), 2)
                parts = layer.parts()
                assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == spec
                message = pack(parts, spec)
                assert len(message) == num_bytes(spec) == layer.nbytes
                for name, part in unpack(message, spec).items():
                    assert torch.equal(part, parts[name]), name


def test_a_restored_cache_goes_on_as_the_one_it_was_made_of():
    for changes in ({}, BASELINES):
        model, ids = make_model(**changes), random_ids(2, SIZES["chunk_size"] * 5 + 3)
        with torch.no_grad():
            cache, other = OVQCache(model.config), OVQCache(model.config)
            model(ids[:, :14], past_key_values=cache)
            for layer, restored in zip(cache.layers, other.layers, strict=True):
                restored.restore(layer.parts(), 14)
            expected = model(ids[:, 14:], past_key_values=cache).logits
            torch.testing.assert_close(model(ids[:, 14:], past_key_values=other).logits, expected)

"""Between which keys a head tells best: as defined, found by the probe, and used where tokens are merged."""

import dataclasses

import pytest
import torch

from ovq.convert import MemoryConfig, Option, attach, probe
from ovq.convert.cache import MemoryLayer
from ovq.convert.distances import Distances, far_attention
from tests.convert.common import MEMORY, converted, original, tokens


def test_they_are_mean_squares_of_what_changes_the_loss():
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(1, h, t, 6, generator=generator) for h, t in ((4, 20), (2, 30), (2, 30), (4, 20))
    )
    k.requires_grad_(True)
    v.requires_grad_(True)
    of_keys, of_values, outputs = torch.zeros(2, 6), torch.zeros(2), torch.zeros(1, 4, 20, 6)
    for h in range(4):
        for t in range(20):
            p = (k[0, h // 2, : 11 + t] @ q[0, h, t]).softmax(-1)
            o = p @ v[0, h // 2, : 11 + t]
            outputs[0, h, t] = o.detach()
            by_key, by_value = torch.autograd.grad(o @ g[0, h, t], (k, v))
            # Without 3 sinks and the last 8 tokens; squares of what a token's probability is the factor of.
            far = slice(3, 11 + t - 8)
            of_keys[h // 2] += (by_key[0, h // 2, far].square() / p[far, None]).sum(0).detach()
            of_values[h // 2] += (by_value[0, h // 2, far].square().mean(-1) / p[far]).sum().detach()
    found = Distances(2, 6)
    found.start(k, v, num_targets=5)
    for part in far_attention(q, k, v, o=outputs, g=g, num_sinks=3, num_recent=8):
        found.see(*part)
    torch.testing.assert_close(found._of_keys.float(), of_keys / 5)
    torch.testing.assert_close(found._of_values.float(), of_values / 5)
    exponents = torch.tensor(found.key_exponents())
    logs = of_keys.log2() / 2
    assert (exponents - (logs - logs.mean(-1, keepdim=True))).abs().max() <= 0.5
    # With the root of what matters as factors, and values in their own unit, both sides count alike.
    weights = torch.tensor(found.value_weights())
    keys, values = k.detach()[0], v.detach()[0]
    factors = torch.exp2(exponents)
    scale = (of_keys / factors.square() * keys.square().mean(1)).sum(-1) / keys.square().mean(1).sum(-1)
    wanted = of_values * values.square().sum(-1).mean(-1)
    wanted = (wanted / scale / (factors[:, None] * keys).square().sum(-1).mean(-1)).sqrt()
    assert (weights.log2() - wanted.log2()).abs().max() <= 0.51


def test_tokens_are_merged_where_keys_differ_in_what_does_not_matter():
    # Keys at the corners of a rectangle; the pairs that are near each other depend on the exponents.
    corners = torch.tensor([[0.0, 0.0], [0.0, 2.0], [3.0, 0.0], [3.0, 2.0]])
    keys = torch.cat([corners, corners])[None, None]
    means = {}
    for exponents in (None, [[[0, 3]]]):
        sizes = {"num_layers": 1, "num_kv_heads": 1, "num_slots": 2, "window": 4, "num_sinks": 0}
        config = MemoryConfig.uniform(chunk_size=4, key_exponents=exponents, **sizes)
        layer = MemoryLayer(config.layer(0))
        layer.learn(keys, torch.ones(1, 1, 8, 2))
        factor = torch.tensor([1.0, 1.0 if exponents is None else 8.0])
        means[exponents is None] = (layer.memories[0].state.keys[0, 0] / factor).tolist()
    assert sorted(means[True]) == [[0.0, 1.0], [3.0, 1.0]]
    assert sorted(means[False]) == [[1.5, 0.0], [1.5, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_else_depends_on_exponents(dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-4, 5, (2, 2, 8), generator=generator).tolist()
    ids = tokens(2, 70)
    # A slot for every token.
    plain = attach(original().to(dtype), **{**MEMORY, "num_slots": 64})
    changed = attach(
        original().to(dtype), config=dataclasses.replace(plain.memory_config, key_exponents=exponents)
    )
    assert torch.equal(plain(ids).logits, changed(ids).logits)


def test_the_unit_of_each_number_of_keys_does_not_matter():
    # Keys multiplied and queries divided by 4 in half of the pairs that rotary positions turn.
    model = original()
    factor = torch.tensor([4.0, 1, 1, 4, 4, 1, 1, 4])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= factor.repeat(2)[:, None]
            layer.self_attn.q_proj.weight /= factor.repeat(4)[:, None]
    texts, options = [tokens(200), tokens(200, seed=1)], [Option(num_slots=16, window=8)]
    found = {
        (is_changed, flag): probe(
            model if is_changed else original(),
            texts,
            options=options,
            chunk_size=8,
            has_distances=flag,
            has_use=False,
        )
        for is_changed in (False, True)
        for flag in (False, True)
    }
    torch.testing.assert_close(found[True, True].losses, found[False, True].losses, rtol=1e-3, atol=0)
    assert found[True, False].losses.sum() > 1.1 * found[True, True].losses.sum()
    before, after = (torch.tensor(found[flag, True].settings["key_exponents"]) for flag in (False, True))
    assert torch.equal(before - after, (factor.log2().int() - 1).expand_as(before))


def test_the_probe_passes_them_on():
    texts, options = [tokens(200)], [Option(num_slots=16, window=8)]
    found = probe(original(), texts, options=options, chunk_size=8)
    config = found.config(30)
    assert config.key_exponents == found.settings["key_exponents"]
    model = attach(original(), config=config)
    saved = MemoryConfig.from_dict(model.config.to_dict()["ovq_memory"])
    assert dataclasses.replace(saved, trained_length=None, rotary_frequencies=None) == config
    half = probe(original(), texts, options=options, chunk_size=8, value_weight=0.5)
    assert half.settings["value_weight"] == [[w / 2 for w in layer] for layer in config.value_weight]


def test_what_does_not_fit_is_refused():
    sizes = converted().memory_config
    for fields, said in (
        ({"value_weight": [[1.0]]}, r"value_weight: expected numbers for \[2, 2\] .* found \[1\]"),
        ({"value_weight": [[1.0, -1.0]] * 2}, "value_weight: expected"),
        ({"key_exponents": [[[0] * 8]] * 2}, r"key_exponents: expected numbers for \[2, 2\]"),
        ({"key_exponents": [[[0] * 7 + [9]] * 2] * 2}, "key_exponents: expected integers up to 8, found 9"),
        ({"key_exponents": [[[0.5] * 8] * 2] * 2}, "key_exponents: expected an integer of at least -8"),
        ({"key_exponents": [[[0] * 7] * 2] * 2}, r"key_exponents: expected 8 numbers per head, found \[7\]"),
    ):
        with pytest.raises(ValueError, match=said):
            attach(original(), config=dataclasses.replace(sizes, **fields))

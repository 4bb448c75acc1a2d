"""How much a token will be asked for: as defined, foreseen on other texts, and what is of use stays alone."""

import dataclasses

import pytest
import torch

from ovq.convert import MemoryConfig, Option, attach, build_context, load, load_context, probe, save_context
from ovq.convert.cache import MemoryLayer
from ovq.convert.captures import Captured
from ovq.convert.distances import far_attention
from ovq.convert.trials import trials
from ovq.convert.use import MOST_USE, ExpectedUse, token_weights
from tests.convert.common import MEMORY, original, tokens

SIZES = {"num_sinks": 2, "num_recent": 4}


def text_with_lookups(seed):
    """A head whose queries at the end look up those of 240 tokens whose values begin with 1."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, 1, 240, 8, generator=generator) for _ in range(2))
    wanted = torch.randperm(200, generator=generator)[:12] + 2
    v[0, 0, :, 0] = 0
    v[0, 0, wanted, 0] = 1
    q = torch.zeros(1, 2, 30, 8)
    places = wanted[torch.arange(30) % 12]
    q[0, 0] = 3 * k[0, 0, places]
    g = torch.randn(1, 2, 30, 8, generator=generator)
    is_past = torch.ones(30, 240).tril(210) > 0
    p = (q @ k.mT).masked_fill(~is_past, -torch.inf).softmax(-1)
    return Captured(q=q, k=k, v=v, o=p @ v, g=g, num_targets=30), p


def added(use, text, **fields):
    use.start(text.k, text.v, num_targets=text.num_targets, num_sinks=SIZES["num_sinks"], **fields)
    for part in far_attention(text.q, text.k, text.v, o=text.o, g=text.g, **SIZES):
        use.see(*part)
    return use


def test_use_is_the_rise_of_the_loss_without_a_token():
    text, p = text_with_lookups(0)
    expected = torch.zeros(240)
    for t in range(30):
        change = torch.zeros(240)
        for h in range(2):
            values = text.v[0, 0] - text.o[0, h, t]
            change += p[0, h, t] * (values @ text.g[0, h, t])
        # The last 4 tokens before the query are exact.
        change[210 + t - 3 :] = 0
        expected += change.square() / 30
    use = added(ExpectedUse(), text, weight=4.0)
    torch.testing.assert_close(use.uses(0).float(), 2 * expected.sqrt()[2:], rtol=1e-3, atol=1e-5)


def test_numbers_are_found_that_made_the_use():
    generator = torch.Generator().manual_seed(0)
    use = ExpectedUse()
    numbers = torch.tensor([[0.5, -1.0, 0.0, 0.7], [0.0, 0.0, 0.2, -0.3]])
    for length in (3000, 1000):
        x = torch.randn(2, length, 3, generator=generator)
        rate = torch.exp2((x * numbers[:, None, :3]).sum(-1) + numbers[:, 3:])
        use._tokens.append(x)
        use._squares.append(torch.poisson(5 * rate, generator=generator).double().square())
        use._factors.append(1.0)
    found = torch.tensor(use.numbers())
    assert (found[:, :3] - numbers[:, :3]).abs().max() < 0.05
    # Keys of two numbers, which the memory multiplies.
    changed = torch.tensor(use.numbers([[1, 0], [0, -2]]))
    factor = torch.tensor([[0.5, 1, 1, 1], [1, 4, 1, 1]])
    torch.testing.assert_close(changed, found * factor, atol=2e-3, rtol=0)


def test_tokens_of_no_use_at_all_have_equal_weights():
    use, generator = ExpectedUse(), torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 9, dim, generator=generator) for dim in (3, 2))
    use.start(k, v, num_targets=1, num_sinks=0)
    assert use.numbers() == [[0.0] * 6] * 2


def test_weights_are_within_bounds_whatever_the_token_is():
    keys = torch.tensor([[[torch.nan], [torch.inf], [100.0], [-100.0], [1.0]]])
    found = token_weights(keys, torch.zeros(1, 5, 1), torch.tensor([[1.0, 0.0, 0.0]]))
    assert found.tolist() == [[1, 1, 2**MOST_USE, 2**-MOST_USE, 2]]


def test_what_will_be_asked_for_is_kept_apart():
    use = ExpectedUse()
    for seed in range(1, 9):
        added(use, text_with_lookups(seed)[0])
    learned = use.numbers()
    settings = {"chunk_size": 8, "merge": "nearest", "value_weight": 1.0}
    # Another text, with half as many slots as tokens.
    text, _ = text_with_lookups(0)
    option = Option(num_slots=96, window=16)
    found = [trials([text], [option], 2, settings | {"token_use": n}) for n in (None, [learned])]
    assert found[1] < 0.4 * found[0]


def one_slot(use):
    sizes = {"num_slots": 1, "window": 2, "num_sinks": 0, "chunk_size": 2}
    config = MemoryConfig.uniform(num_layers=1, num_kv_heads=1, **sizes, token_use=use)
    return MemoryLayer(config.layer(0))


def test_means_are_weighted_and_slots_are_read_by_their_counts():
    layer = one_slot([[[2.0, 0.0, 0.0]]])
    # Weights of 1 and 4.
    layer.learn(torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[5.0], [10.0]]]]))
    [memory] = layer.memories
    assert memory.state.values.item() == 9
    assert memory.state.keys.item() == pytest.approx(0.8)
    assert memory.state.count.item() == 2
    # Two tokens with the mean's score, and one with a score of 0.
    q = torch.full((1, 1, 1, 1), 1.25)
    found = layer.attend(q, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), None)
    both = 2 * torch.tensor(1.0).exp()
    assert found.item() == pytest.approx(float(9 * both / (both + 1)))


def test_gradients_reach_tokens_in_proportion_to_their_weights():
    layer = one_slot([[[0.0, 1.0, 0.0]]])
    values = torch.tensor([[[[0.0], [2.0], [0.0]]]], requires_grad=True)
    zeros = torch.zeros(1, 1, 3, 1)
    layer.attend(zeros, zeros, values, None)[0, 0, 2].backward()
    # The last query reads a slot of two tokens, of weights 1 and 4, and its own token.
    expected = torch.tensor([2 / 3 / 5, 2 / 3 * 4 / 5, 1 / 3])
    torch.testing.assert_close(values.grad.flatten(), expected)


def test_the_probe_finds_it_and_it_is_saved(tmp_path):
    texts, options = [tokens(200)], [Option(num_slots=16, window=8)]
    found = probe(original(), texts, options=options, num_sinks=2, chunk_size=8)
    config = found.config(30)
    assert [[len(head) for head in layer] for layer in config.token_use] == [[17, 17], [17, 17]]
    for fields in ({"has_use": False}, {"merge": "existing"}):
        other = probe(original(), texts, options=options, chunk_size=8, **fields)
        assert other.config(30).token_use is None
    model, ids = attach(original(), config=config), tokens(1, 120)
    plain = attach(original(), config=dataclasses.replace(config, token_use=None))
    assert not torch.allclose(plain(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    save_context(build_context(model, ids[0, :100]), tmp_path / "a.ctx")
    cache = load_context(tmp_path / "a.ctx", again).cache(1)
    after = again(ids[:, 100:], past_key_values=cache).logits
    torch.testing.assert_close(after, model(ids).logits[:, 100:], atol=1e-4, rtol=1e-4)


def test_numbers_that_do_not_fit_are_refused():
    for use, said in (
        ([[[0.0] * 17]], r"token_use: expected numbers for \[2, 2\] key/value heads"),
        ([[[0.0] * 16] * 2] * 2, r"token_use: expected 17 numbers per head, found \[16\]"),
        ([[["much"] * 17] * 2] * 2, "token_use: expected finite numbers, found 'much'"),
    ):
        with pytest.raises(ValueError, match=said):
            attach(original(), config=MemoryConfig(**MEMORY, token_use=use))

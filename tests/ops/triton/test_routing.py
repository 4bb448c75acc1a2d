"""The kernels route as float64 does: near ties, exact ties, keys that are not finite."""

import pytest
import torch
from torch.nn.functional import normalize

from tests.ops.common import attend

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")

IMMEDIATE = {"num_slots": 24, "chunk_size": 24, "growth": "immediate"}


def slots_of(k, backend, **options):
    """Sums tell where every key went: values are the powers of 2 that stand for the tokens of the chunk."""
    v = 2.0 ** torch.arange(24.0).repeat(k.shape[1] // 24)[None, :, None, None]
    _, state = attend(k, k, v, backend=backend, **options)
    return state


def near_ties(dtype):
    """24 keys that open a slot each, and 24 half-way between two of them, up to a few roundings."""
    generator = torch.Generator().manual_seed(0)
    slots = normalize(torch.randn(24, 16, generator=generator), dim=-1).to(dtype).float()
    first, second = torch.randint(24, (2, 24), generator=generator)
    keys = slots[first] + slots[second]
    keys *= 1 + 1e-7 * torch.randn(24, 1, generator=generator)
    return torch.cat([slots, keys])[None, :, None].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_ties_are_decided_as_in_float64(dtype):
    k = near_ties(dtype)
    options = {**IMMEDIATE}
    states = [attend(k, k, k, backend=backend, **options)[1] for backend in ("triton", "naive")]
    assert torch.equal(states[0].count, states[1].count)
    assert torch.equal(states[0].key_sum, states[1].key_sum)
    if dtype == torch.float32:
        # The control: float32 alone gets some of these wrong.
        keys, slots = k[0, 24:, 0], k[0, :24, 0]
        exact = (keys.double()[:, None] * slots.double()[None]).sum(-1).argmax(-1)
        assert not torch.equal((keys @ slots.T).argmax(-1), exact)


def test_near_ties_of_novelty_are_decided_as_in_float64():
    """Keys on a cone around the first one: all equally novel, up to a few roundings."""
    generator = torch.Generator().manual_seed(2)
    around = torch.randn(24, 16, generator=generator)
    around[:, 0] = 0
    axis = torch.tensor([1.0, *[0.0] * 15])
    keys = normalize(0.8 * axis + 0.6 * normalize(around, dim=-1), dim=-1)
    keys[0] = axis
    k = (keys @ torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q)[None, :, None]
    options = {"num_slots": 24, "chunk_size": 24}
    states = [slots_of(k, backend, **options) for backend in ("triton", "naive")]
    assert torch.equal(states[0].value_sum, states[1].value_sum)
    assert states[0].count.shape[2] == 12
    # The control: float32 alone opens slots with other keys.
    cosines = (normalize(k[0, :, 0], dim=-1) @ normalize(k[0, 0, 0], dim=-1))[1:]
    exact = cosines.argsort(stable=True)[:11].sort().values + 1
    assert not torch.equal(2.0**exact, states[1].value_sum.flatten()[1:])


def test_few_distinct_keys():
    """Slots that hold the same key: every decision is a tie, and goes to the lowest slot or first token."""
    generator = torch.Generator().manual_seed(0)
    alphabet = normalize(torch.randn(3, 8, generator=generator), dim=-1)
    k = alphabet[torch.randint(3, (48,), generator=generator)][None, :, None]
    states = [slots_of(k, backend, num_slots=20, chunk_size=12) for backend in ("triton", "naive")]
    assert torch.equal(states[0].count, states[1].count)
    assert torch.equal(states[0].value_sum, states[1].value_sum)


# numpy, which the interpreter computes with, warns of what is not a number.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_values_stay_in_their_head():
    generator = torch.Generator().manual_seed(0)
    k = normalize(torch.randn(1, 18, 2, 5, generator=generator), dim=-1)
    clean = attend(k, k, k, num_slots=8, chunk_size=6, backend="triton")
    k[0, 9, 1, 2], k[0, 14, 1, 0] = float("nan"), float("inf")
    states = []
    for backend in ("triton", "naive"):
        o, state = attend(k, k, k, num_slots=8, chunk_size=6, backend=backend)
        torch.testing.assert_close(o[:, :, 0], clean[0][:, :, 0])
        assert torch.equal(state.key_sum[:, 0], clean[1].key_sum[:, 0])
        assert o[:, 12:, 1].isnan().any()
        states.append(state)
    assert torch.equal(states[0].count, states[1].count)


def test_zero_repeated_and_huge_keys():
    generator = torch.Generator().manual_seed(0)
    k = normalize(torch.randn(1, 24, 1, 5, generator=generator), dim=-1)
    k[0, 4:8], k[0, 10:13], k[0, 15] = k[0, 3], 0, k[0, 15] * 1e4
    results = [attend(k, k, k, num_slots=8, chunk_size=6, backend=backend) for backend in ("triton", "naive")]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0][1].count, results[1][1].count)

"""Routing is what float64 decides, whatever the float32 product says; the schedule; the random choice."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from ovq.ops import scheduled_slots, slots_by_chunk
from ovq.ops.backends.torch import route as routing
from ovq.ops.backends.torch.streams import CompleteChunk
from ovq.ops.options import Options
from ovq.ops.random_init import random_priority
from tests.ops.common import CPU, attend, inputs

ROOT = Path(__file__).parents[2]
OPTIONS = Options(num_slots=64, chunk_size=128, growth="plateau", init="novelty", merge="existing", seed=0)


def route(keys, means, num_slots, num_opening=0):
    streams = len(keys)
    padded = torch.nn.functional.pad(means, (0, 0, 0, routing.padded_to_blocks(num_slots) - num_slots))
    router = routing.Router(num_streams=streams, max_slots=num_slots, options=OPTIONS, like=keys)
    before, after = [num_slots] * streams, [num_slots + num_opening] * streams
    step = SimpleNamespace(num_complete=streams, before=before, after=after)
    return router(CompleteChunk(step, keys, keys), padded)


def near_ties(streams=3, num_slots=45, dim=16):
    """Keys half-way between two slots, up to a few float32 roundings."""
    generator = torch.Generator().manual_seed(0)
    means = normalize(torch.randn(streams, num_slots, dim, generator=generator), dim=-1)
    first, second = (
        torch.randint(num_slots, (streams, 128, 1), generator=generator).expand(-1, -1, dim) for _ in "ab"
    )
    keys = means.gather(1, first) + means.gather(1, second)
    keys *= 1 + 1e-7 * torch.randn(streams, 128, 1, generator=generator)
    return normalize(keys, dim=-1), means


def test_near_ties_are_decided_as_in_float64():
    keys, means = near_ties()
    exact = (keys.double()[:, :, None] * means.double()[:, None]).sum(-1)
    assert torch.equal(route(keys, means, 45), exact.argmax(-1))
    # The control: float32 alone gets some of these wrong, so the test above tests something.
    assert not torch.equal((keys @ means.transpose(1, 2)).argmax(-1), exact.argmax(-1))


def test_near_ties_are_decided_alike_on_another_processor(tmp_path):
    """As far as this one can imitate it: without wide vectors, and with products in another order of sums."""
    keys, means = near_ties()
    torch.save((keys, means), tmp_path / "ties.pt")
    program = """
import sys, torch
from tests.ops.test_routing import route
torch.save(route(*torch.load(sys.argv[1]), 45), sys.argv[2])
"""
    paths = [str(tmp_path / "ties.pt"), str(tmp_path / "slots.pt")]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    subprocess.run([sys.executable, "-c", program, *paths], cwd=ROOT, env=environment, check=True)
    assert torch.equal(torch.load(paths[1]), route(keys, means, 45))


def novelty_ties():
    """Keys on a cone around a slot mean: all equally novel, up to a few float32 roundings.

    With the slot means, and the tokens that are the 50 most novel.
    """
    generator = torch.Generator().manual_seed(2)
    means = torch.eye(16)[None, :2] * 0.9
    around = torch.randn(1, 128, 16, generator=generator)
    around[..., :2] = 0
    keys = normalize(torch.tensor([0.8, *[0.0] * 15]) + 0.6 * normalize(around, dim=-1), dim=-1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    keys, means = keys @ rotation, means @ rotation
    dots = (keys.double()[:, :, None] * means.double()[:, None]).sum(-1)
    norms = keys.double().norm(dim=-1)[..., None] * means.double().norm(dim=-1)[:, None]
    expected = (dots / norms).amax(-1)[0].argsort(stable=True)[:50].sort().values
    # The control: float32 alone opens slots with other keys.
    cosines = normalize(keys, dim=-1) @ normalize(means, dim=-1).transpose(1, 2)
    assert not torch.equal(cosines.amax(-1)[0].argsort(stable=True)[:50].sort().values, expected)
    return keys, means, expected


def test_near_ties_of_novelty_are_decided_as_in_float64():
    keys, means, expected = novelty_ties()
    opened = (route(keys, means, 2, num_opening=50)[0] >= 2).nonzero().flatten()
    assert torch.equal(opened, expected)


def test_exact_ties_go_to_the_lowest_index():
    generator = torch.Generator().manual_seed(1)
    means = normalize(torch.randn(1, 40, 8, generator=generator), dim=-1)
    means[0, 20:] = means[0, :20]
    keys = normalize(torch.randn(1, 128, 8, generator=generator), dim=-1)
    slots = route(keys, means, 40)
    assert int(slots.max()) < 20


def test_ties_of_novelty_go_to_the_earliest_token():
    """All keys equal: every key is as novel as every other, so the first ones of the chunk open slots."""
    q, _, v = inputs(1, 16, 1, 1)
    k = torch.ones(1, 16, 1, 6, dtype=torch.float64) / 6**0.5
    for backend in ("naive", "torch"):
        _, state = attend(q, k, v, num_slots=8, chunk_size=8, backend=backend)
        # Chunk 1 opens slots 0..3 with tokens 0..3 and merges 4..7 into slot 0; chunk 2 opens slot 4 with
        # token 8 and merges 9..15 into slot 0.
        assert state.count.flatten().tolist() == [12, 1, 1, 1, 1]
        torch.testing.assert_close(state.values[0, 0, 1:5], v[0, [1, 2, 3, 8], 0])


@pytest.mark.parametrize("pairs", [0, 10**9])
def test_many_ties_and_few_are_decided_alike(pairs, monkeypatch):
    """One by one or in one float64 product: near ties, exact ties, and the choice of openers."""
    monkeypatch.setattr(routing, "_PAIRS", pairs)
    test_near_ties_are_decided_as_in_float64()
    test_near_ties_of_novelty_are_decided_as_in_float64()
    test_exact_ties_go_to_the_lowest_index()
    test_ties_of_novelty_go_to_the_earliest_token()
    assert route(torch.ones(2, 128, 4) / 2, torch.ones(2, 40, 4) / 2, 40).abs().max() == 0


@pytest.mark.parametrize("backend", ["torch", *CPU])
def test_few_distinct_keys(backend):
    """A small alphabet: nearly all slots hold the same few keys, and every decision is a tie."""
    q, k, v = inputs(2, 400, 1, 1, 8, 4, dtype=torch.float32)
    k = k[:, torch.randint(5, (400,), generator=torch.Generator().manual_seed(0))]
    for merge in ("existing", "updated") if backend == "torch" else ("existing",):
        options = {"num_slots": 40, "chunk_size": 16, "merge": merge}
        states = [attend(q, k, v, backend=b, **options)[1] for b in ("naive", backend)]
        assert torch.equal(states[0].count, states[1].count)
        assert torch.equal(states[0].value_sum, states[1].value_sum)


@pytest.mark.parametrize("backend", ["torch", *CPU])
def test_keys_that_are_not_finite_open_slots_last_and_in_order(backend):
    """Even where there are more slots to open than finite keys."""
    q, k, v = inputs(1, 24, 1, 1, 8, 4, dtype=torch.float32)
    k[:, 9:15] = torch.nan
    options = {"num_slots": 14, "chunk_size": 8, "growth": "immediate"}
    states = [attend(q, k, v, backend=b, **options)[1] for b in ("naive", backend)]
    assert torch.equal(states[0].count, states[1].count)
    assert torch.equal(states[0].value_sum, states[1].value_sum)


@pytest.mark.parametrize("backend", ["torch", *CPU])
@pytest.mark.parametrize("threads", [1, 2])
def test_assignments_do_not_depend_on_batch_or_threads(threads, backend):
    q, k, v = inputs(3, 150, 2, 2, 16, 4, dtype=torch.float32)
    options = {"num_slots": 64, "chunk_size": 32, "backend": backend}
    _, whole = attend(q, k, v, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for row in range(3):
            _, alone = attend(q[row : row + 1], k[row : row + 1], v[row : row + 1], **options)
            assert torch.equal(alone.count[0], whole.count[row])
            assert torch.equal(alone.key_sum[0], whole.key_sum[row])
    finally:
        torch.set_num_threads(before)


def test_schedules():
    lengths = range(1, 2000)
    for growth in ("plateau", "linear", "immediate"):
        sizes = [scheduled_slots(t, num_slots=100, growth=growth) for t in lengths]
        assert sizes == sorted(sizes)
        assert sizes[0] >= 1
        assert sizes[-1] <= 100
    assert [scheduled_slots(t, num_slots=100) for t in (100, 300, 10**9)] == [50, 75, 99]
    assert scheduled_slots(100, num_slots=100, growth="linear") == 50
    with pytest.raises(ValueError, match=r"growth: expected one of .* found 'x'"):
        scheduled_slots(1, num_slots=1, growth="x")


def test_a_chunk_opens_no_more_slots_than_it_has_keys():
    sizes = slots_by_chunk(10, 1000, 3, num_slots=500, chunk_size=16, growth="immediate")
    assert sizes == [10, 26, 42, 58]


def test_random_choice_depends_on_seed_head_and_position_alone():
    a = random_priority(1, 0, 64, 32)
    assert sorted(a.tolist()) == list(range(32))
    assert torch.equal(a, random_priority(1, 0, 64, 32))
    for other in ((2, 0, 64), (1, 1, 64), (1, 0, 96)):
        assert not torch.equal(a, random_priority(*other, 32))

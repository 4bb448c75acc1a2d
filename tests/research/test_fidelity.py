"""Fidelity: memories against oracles, equal bytes, streams, rows and their figure."""

import dataclasses
import itertools
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from ovq.ops import ovq_attention
from ovq_lab.figures.fidelity.measure import fidelity_rows
from ovq_lab.figures.fidelity.memories import (
    CHUNK_SIZE,
    MEMORIES,
    DeltaRule,
    LinearAttention,
    NearestMemory,
    OfflineKMeans,
    OVQMemory,
    RandomMerging,
    StaticVQ,
    WindowAndSinks,
    softmax_read,
)
from ovq_lab.figures.fidelity.streams import STREAMS, Stream
from ovq_lab.figures.figures import fidelity
from ovq_lab.figures.presets import CPU
from ovq_lab.plots.draw import _MIXERS_OF_MEMORIES, save_figure
from ovq_lab.plots.style import MIXER_STYLES, PALETTE

SCALE = 3.0
BUDGET = 40 * 4 * (8 + 8 + 2)


@pytest.fixture(scope="module")
def streams():
    return STREAMS["clustered"](0, 512, 640, 8)


def new(kind, sample, *, num_bytes=BUDGET):
    return kind(num_bytes, scale=SCALE, sample=sample, seed=0)


def filled(kind, streams, *, num_tokens=512, **arguments):
    sample, stream = streams
    memory = new(kind, sample, **arguments)
    memory.append(stream.keys[:num_tokens], stream.values[:num_tokens])
    return memory, stream.queries[num_tokens:][:32]


@pytest.mark.parametrize("kind", MEMORIES)
def test_no_memory_exceeds_its_bytes_and_none_leaves_many_unused(kind, streams):
    memory, _ = filled(kind, streams)
    assert 0.9 * BUDGET < memory.nbytes <= BUDGET


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_stream_may_come_in_parts(kind, streams):
    _, stream = streams
    whole, queries = filled(kind, streams)
    parts, _ = filled(kind, streams, num_tokens=192)
    parts.append(stream.keys[192:512], stream.values[192:512])
    torch.testing.assert_close(parts.read(queries), whole.read(queries), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [OfflineKMeans, WindowAndSinks])
def test_with_room_for_all_tokens_the_read_is_exact(kind, streams):
    _, stream = streams
    memory, queries = filled(kind, streams, num_bytes=512 * 4 * 18)
    exact = softmax_read(queries, stream.keys[:512], stream.values[:512], SCALE)
    torch.testing.assert_close(memory.read(queries), exact)


def test_the_window_keeps_the_first_four_tokens_and_the_newest(streams):
    _, stream = streams
    memory, _ = filled(WindowAndSinks, streams)
    kept = BUDGET // (4 * 16)
    expected = [*range(4), *range(512 - kept + 4, 512)]
    assert torch.equal(memory.keys, stream.keys[expected])
    assert torch.equal(memory.values, stream.values[expected])


def test_ovq_reads_what_the_op_reads(streams):
    _, stream = streams
    memory, _ = filled(OVQMemory, streams)
    query = stream.queries[512:513]
    # The first query of the next chunk sees the slots and its own token, whose key is set far away from it.
    q = torch.cat([stream.queries[:512], query])
    k = torch.cat([stream.keys[:512], -100 * query])
    q, k, v = (tensor[None, :, None] for tensor in (q, k, stream.values[:513]))
    output, _ = ovq_attention(
        q, k, v, num_slots=memory.num_slots, chunk_size=CHUNK_SIZE, scale=SCALE, backend="naive"
    )
    torch.testing.assert_close(memory.read(query), output[0, 512])


@pytest.mark.parametrize("kind", [OVQMemory, NearestMemory, RandomMerging, OfflineKMeans, StaticVQ])
def test_counts_weigh_so_that_a_query_that_knows_nothing_reads_the_mean_of_all_values(kind, streams):
    _, stream = streams
    memory, _ = filled(kind, streams)
    torch.testing.assert_close(memory.read(torch.zeros(1, 8))[0], stream.values[:512].mean(0))


def test_the_delta_rule_is_the_recurrence(streams):
    _, stream = streams
    memory, queries = filled(DeltaRule, streams, num_tokens=128)
    state = torch.zeros_like(memory.state)
    for feature, value in zip(memory._features(stream.keys[:128]), stream.values[:128], strict=True):
        state += memory.rate * torch.outer(feature, value - feature @ state)
    torch.testing.assert_close(memory.read(queries), memory._features(queries) @ state, rtol=1e-3, atol=1e-4)


def test_random_features_come_near_softmax_when_there_are_many(streams):
    _, stream = streams
    memory, queries = filled(LinearAttention, streams, num_bytes=4_000_000)
    exact = softmax_read(queries, stream.keys[:512], stream.values[:512], SCALE)
    assert (memory.read(queries) - exact).norm() < 0.05 * exact.norm()


def test_static_vq_averages_the_values_of_the_keys_nearest_to_a_code(streams):
    _, stream = streams
    memory, queries = filled(StaticVQ, streams)
    codes = torch.cdist(stream.keys[:512], memory.codes).argmin(-1)
    used = codes.unique()
    means = torch.stack([stream.values[:512][codes == code].mean(0) for code in used])
    count = torch.stack([(codes == code).sum() for code in used])
    expected = softmax_read(queries, memory.codes[used], means, SCALE, count)
    torch.testing.assert_close(memory.read(queries), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STREAMS)
def test_streams_have_unit_keys_and_depend_on_the_seed_alone(name):
    sample, stream = STREAMS[name](3, 200, 300, 16)
    for tensors, length in ((sample, 200), (stream, 300)):
        assert [tuple(tensor.shape) for tensor in tensors] == [(length, 16)] * 3
        for tensor in (tensors.keys, tensors.queries):
            torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(length))
    again = Stream(*itertools.chain(STREAMS[name](3, 200, 300, 16)[1]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(stream, again, strict=True))
    assert not torch.equal(stream.keys, STREAMS[name](4, 200, 300, 16)[1].keys)


def test_clusters_are_those_of_the_sample_unless_they_are_new():
    nearest = {}
    for name in ("clustered", "new clusters"):
        sample, stream = STREAMS[name](0, 2000, 200, 32)
        nearest[name] = float((stream.keys @ sample.keys.T).max(-1).values.mean())
    assert nearest["clustered"] > nearest["new clusters"] + 0.1


def test_ovq_is_better_than_chance_on_text_and_k_means_better_still():
    rows = fidelity_rows(0, lengths=[4096], streams=["text"], num_slots=64)
    error = {row["memory"]: row["error"] for row in rows}
    assert error["offline k-means"] < error["OVQ"] < 0.8 * error["random merging"]


def test_rows_have_all_combinations_and_errors_are_relative():
    options = {"lengths": [64, 192], "streams": ["random", "clustered"], "num_slots": 16, "head_dim": 8}
    rows = fidelity_rows(5, **options)
    names = [kind.name for kind in MEMORIES]
    assert [(row["stream"], row["memory"], row["length"]) for row in rows] == [
        *itertools.product(["random", "clustered"], names, [64, 192])
    ]
    for row in rows:
        assert (row["line"], row["group"], row["seed"]) == (row["memory"], row["stream"], 5)
    assert rows == fidelity_rows(5, **options)
    sample, stream = STREAMS["random"](5, 16384, 192 + 256, 8)
    memory = OVQMemory(16 * 4 * 18, scale=8**0.5, sample=sample, seed=5)
    memory.append(stream.keys[:192], stream.values[:192])
    queries = stream.queries[192:]
    exact = softmax_read(queries, stream.keys[:192], stream.values[:192], 8**0.5)
    error = (memory.read(queries) - exact).norm() / exact.norm()
    assert rows[1]["error"] == pytest.approx(float(error), rel=1e-4)
    assert statistics.pstdev(row["bytes"] for row in rows) < 0.1 * rows[0]["bytes"]


@pytest.mark.parametrize("num_streams", [1, 3])
def test_the_figure_has_lines_of_every_colour(num_streams, tmp_path, full_pictures):
    rows = [
        {
            "group": stream,
            "seed": seed,
            "line": kind.name,
            "length": length,
            "error": 0.1 * place + 0.1 + 0.01 * seed,
        }
        for stream in list(STREAMS)[:num_streams]
        for seed in (0, 1)
        for place, kind in enumerate(MEMORIES)
        for length in (64, 4096)
    ]
    figure = fidelity(CPU)
    panels = [dataclasses.asdict(panel) for panel in figure.panels[:num_streams]]
    save_figure({"title": figure.title, "panels": panels, "rows": rows}, tmp_path / "fidelity.png")
    with Image.open(tmp_path / "fidelity.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
        assert np.prod(picture.size) > 400_000
        assert picture.size[0] == 960
    # Two references are no mixers.
    assert {kind.name for kind in MEMORIES} - set(_MIXERS_OF_MEMORIES) == {
        "random merging",
        "offline k-means",
    }
    for style in [MIXER_STYLES[mixer] for mixer in _MIXERS_OF_MEMORIES.values()] + [*PALETTE[:2]]:
        assert tuple(bytes.fromhex(style.color[1:])) in colors

"""The figures of a memory show its numbers."""

import re

import numpy as np
import pytest

from ovq.inspect import levels
from ovq_lab.plots.memory import LEVEL_COLORS, save_memory_figures
from tests.inspect.common import looked_into


@pytest.fixture(scope="module")
def found():
    return looked_into(["word"] * 203, num_heads=4, num_kv_heads=2, merge="nearest", num_slots=9)


def heights(axes):
    """The shares of steps that stand on each other, `[kinds, parts]`."""
    found = [step.get_data() for step in axes.patches]
    return np.array([step.values - step.baseline for step in found])


def test_places_levels_counts_and_reads_are_drawn(found, tmp_path, drawn):
    paths = save_memory_figures(found, tmp_path, head=3)
    assert [path.name for path in paths] == ["slots.png", "heads.png", "counts.png", "reads.png"]
    slots, heads, counts, reads = drawn
    memory = found.layer(1)
    places, shares = slots.axes
    scattered = [each.get_offsets().data for each in places.collections if hasattr(each, "get_sizes")]
    dots = np.concatenate(scattered)
    expected = [(i, slot) for i, slot in enumerate(memory.slots[1]) if slot >= 0]
    assert sorted(map(tuple, dots.astype(int).tolist())) == expected
    opened = scattered[-1][:, 0].astype(int).tolist()
    # Slots are opened while there is room, and again where one was merged away.
    assert opened[:8] == list(range(8))
    assert len(opened) == 9 + _num_opened_again(memory)
    assert [step.get_facecolor() for step in shares.patches] == [
        (*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0) for color in LEVEL_COLORS[:6]
    ]
    level = levels(memory.counts()[1, int(np.linspace(0, 203, 33)[-2]) :])
    assert heights(shares)[:, -1] == pytest.approx([(level == i).mean() for i in range(6)])
    [axes] = heads.axes
    for kv in range(2):
        widths = [bar.get_width() for bar in axes.patches[kv::2]]
        of_head = levels(memory.counts()[kv])
        assert widths == pytest.approx([(of_head == i).mean() for i in range(6)])
    assert f"{memory.kept[1].mean():.0%}" in {text.get_text() for text in axes.texts}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "layer 1, heads 0-1",
        "layer 1, heads 2-3",
    ]
    for line, slots_of_head in zip(counts.axes[0].lines, memory.final_slots, strict=True):
        number = np.bincount(slots_of_head[slots_of_head >= 0])
        octaves = np.ceil(np.log2(number[number > 0])).astype(int)
        assert line.get_ydata().tolist() == [(octaves == i).sum() for i in range(9)]
    assert sum(counts.axes[1].lines[0].get_ydata()) == 9
    assert heights(reads.axes[0]).sum(0) == pytest.approx(1)
    assert heights(reads.axes[0])[:, 0] == pytest.approx(memory.shares[3, : int(203 / 32)].mean(0))


def test_few_tokens_and_slots_are_counted_in_whole_numbers(tmp_path, drawn):
    save_memory_figures(looked_into(["word"] * 5, num_heads=2, num_kv_heads=2, num_slots=4), tmp_path)
    slots, _, counts, reads = drawn
    axes = [each.xaxis for each in (*slots.axes, counts.axes[1], reads.axes[0])]
    axes += [each.yaxis for each in (slots.axes[0], *counts.axes)]
    assert all(place == round(place) for each in axes for place in each.get_ticklocs())


def test_one_token_is_one_token_in_no_slot(tmp_path, drawn):
    save_memory_figures(looked_into(["word"]), tmp_path)
    titles = [figure.legends[0].get_title().get_text().replace("\n", " ") for figure in drawn]
    assert all(re.search(r"(of|after) 1 token\b", title) for title in titles)
    assert drawn[0].axes[0].get_ylim() == (-0.5, 0.5)


def _num_opened_again(memory):
    """How often a slot that was merged away was used again."""
    taken = memory.moves[memory.moves[:, 1] == 1]
    again = 0
    for chunk, _, slot, _ in taken:
        later = taken[(taken[:, 0] > chunk) & (taken[:, 2] == slot)][:1, 0].tolist()
        end = (later[0] + 1) * 4 if later else 200
        again += slot in memory.slots[1, chunk * 4 : end]
    return again


def test_views_that_are_not_there_are_refused(found, tmp_path):
    with pytest.raises(ValueError, match="head: expected 0 to 3, found 4"):
        save_memory_figures(found, tmp_path, head=4)
    with pytest.raises(ValueError, match="expected an OVQ layer, one of 1, found 0"):
        save_memory_figures(found, tmp_path, layer=0)
    assert not list(tmp_path.iterdir())

"""The figure of `ovq_lab.eval.kept`: pairs with a slot of their own, accuracy on them, contents of slots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ovq_lab.plots.canvas import Axes, FuncFormatter
from ovq_lab.plots.panels import error_bars, new_panels, save
from ovq_lab.plots.style import MIXER_STYLES, Style, style_name

Row = Mapping[str, Any]

# Horizontal distance between the lines of two rules, in units of one x position.
_SHIFT = 0.08
_NAMES = {"existing": "OVQ, paper's rule", "nearest": "OVQ, nearest", "ward": "OVQ, Ward"}


def kept_figure(results: Mapping[str, Any], path: Path) -> None:
    """Draw a line for each merge rule, with error bars from the lowest to the highest seed."""
    rows = results["rows"]
    # From the dictionary with the most room to that with the least.
    sizes = sorted({(row["num_slots"], row["length"]) for row in rows}, key=lambda s: (s[1] / s[0], s[1]))
    slots, length = max(row["num_slots"] for row in rows), max(row["length"] for row in rows)
    figure, panels = new_panels(4, height=2.7)
    merges = list(dict.fromkeys(row["merge"] for row in rows))
    for place, merge in enumerate(merges):
        # Shifted, so that error bars at one x position do not overlap.
        shift = _SHIFT * (place - (len(merges) - 1) / 2)
        of_sizes = [
            [row for row in rows if (row["merge"], row["num_slots"], row["length"]) == (merge, *size)]
            for size in sizes
        ]
        of_largest = of_sizes[sizes.index((slots, length))]
        solid = MIXER_STYLES[style_name("ovq", merge)]
        solid = dataclasses.replace(solid, is_filled=True)
        dashed = dataclasses.replace(solid, is_filled=False, line="--")
        label = _NAMES.get(merge, merge)
        _draw(panels[0], [_values(rows, "own_share") for rows in of_sizes], solid, label, shift=shift)
        _draw(panels[1], [_values(rows, "own_accuracy") for rows in of_sizes], solid, label, shift=shift)
        _draw(panels[1], [_values(rows, "shared_accuracy") for rows in of_sizes], dashed, shift=shift)
        _draw(panels[2], _by_part(of_largest, "slot_counts"), solid, label, shift=shift)
        _draw(panels[3], _by_part(of_largest, "oldest"), solid, label, shift=shift)
        _draw(panels[3], _by_part(of_largest, "mean_position"), dashed, shift=shift)
    names = [f"{slots} slots\n{length:,} tokens" for slots, length in sizes]
    for axes, what in zip(panels[:2], ("share of the questions", "right answers (share)"), strict=True):
        axes.set_xticks(range(len(sizes)), names, fontsize=9)
        axes.margins(x=0.1)
        axes.set_ylim(-0.03, 1.05)
        axes.set_ylabel(what)
    for axes in panels[2:]:
        axes.set_ylim(bottom=0)
        axes.set_ylabel("share of the slots")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    largest = f"{slots} slots, {length:,} tokens"
    panels[0].set_title("questions whose pair has a slot of its own", fontsize=11)
    panels[1].set_title("answers about pairs with a slot of their own (solid), without (dashed)", fontsize=11)
    panels[2].set_title(f"{largest}: how many tokens a slot holds", fontsize=11)
    panels[3].set_title(f"{largest}: oldest token of a slot (solid), mean (dashed)", fontsize=11)
    counts = list(of_largest[0]["slot_counts"])
    panels[2].set_xticks(range(len(counts)), counts, fontsize=9, rotation=35, ha="right")
    panels[2].set_xlabel("tokens in the slot when the questions begin")
    context = of_largest[0]["context_length"]
    part = context / len(of_largest[0]["oldest"])
    # Round numbers, about four of them; the first part is drawn at 0, so it begins at -0.5.
    positions = range(0, context + 1, 2 ** round(math.log2(max(4, context) / 4)))
    panels[3].set_xticks([p / part - 0.5 for p in positions], [f"{p:,}" for p in positions])
    panels[3].set_xlabel("position of that token in the context")
    save(figure, path, title=results["title"])


def _values(rows: Sequence[Row], field: str) -> list[float]:
    """The values of a field by seed, without `None`."""
    return [row[field] for row in rows if row[field] is not None]


def _by_part(rows: Sequence[Row], field: str) -> list[list[float]]:
    """The values of each part of a field, by seed."""
    return [[row[field][name] for row in rows] for name in rows[0][field]]


def _draw(
    axes: Axes, seeds: Sequence[Sequence[float]], style: Style, label: str = "", *, shift: float
) -> None:
    """Draw a line through the means over seeds, with error bars; positions without values are left out."""
    found = {place + shift: values for place, values in enumerate(seeds) if values}
    points = [(fmean(values), min(values), max(values)) for values in found.values()]
    error_bars(axes, list(found), points, label=label or "_nolegend_", **style.options())

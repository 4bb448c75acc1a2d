"""The figure of `ovq_lab.figures.fidelity`: error of each memory against the length of the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ovq.runtime.units import format_bytes
from ovq_lab.eval.rows import short_number
from ovq_lab.plots.canvas import Axes, FuncFormatter, LogLocator, NullFormatter
from ovq_lab.plots.panels import length_axis, new_panels, save
from ovq_lab.plots.style import CONTROLS, MIXER_STYLES, PAIRS

# A memory has the style of the mixer that uses it.
MEMORY_STYLES = {
    "OVQ": MIXER_STYLES["ovq"],
    "OVQ, nearest": MIXER_STYLES[PAIRS],
    # Occurs in files of earlier versions.
    "OVQ, Ward-sqrt": MIXER_STYLES[PAIRS],
    "static VQ": MIXER_STYLES["vq"],
    "linear attention": MIXER_STYLES["linear_attention"],
    "delta rule": MIXER_STYLES["gated_deltanet"],
    "window + sinks": MIXER_STYLES["sink_attention"],
    **CONTROLS,
}
"""Styles of the memories of `ovq_lab.figures.fidelity`."""

_TITLES = {
    "random": "random keys",
    "clustered": "clusters, known beforehand",
    "new clusters": "clusters, new in the stream",
    "text": "text (words of a library's source)",
}
# Lines are shifted by this much, in octaves, so that error bars at one length do not overlap.
_OFFSET = 0.04


def fidelity_figure(results: Mapping[str, Any], path: Path) -> None:
    """Draw one panel for each stream, with a line for each memory and its standard deviation over seeds."""
    rows = results["rows"]
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    # Each panel has its own axis: on random keys exact attention is nearly 0, and errors are far larger.
    figure, panels = new_panels(len(streams), height=2.9)
    for axes, stream in zip(panels, streams, strict=True):
        _draw(axes, [row for row in rows if row["stream"] == stream])
        axes.set_title(_TITLES[stream], fontsize=11)
    figure.supylabel("error relative to exact attention", fontsize=11)
    panels[-1].set_xlabel("length of the stream (tokens)", fontsize=11)
    num_seeds = len({row["seed"] for row in rows})
    budget = format_bytes(max(row["bytes"] for row in rows))
    title = f"Memories of {budget} against exact attention (mean and standard deviation, {num_seeds} seeds)"
    save(figure, path, title=title)


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one stream."""
    lengths = sorted({row["length"] for row in rows})
    memories = list(dict.fromkeys(row["memory"] for row in rows))
    for place, memory in enumerate(memories):
        offset = 2 ** (_OFFSET * (place - (len(memories) - 1) / 2))
        errors = [
            [row["error"] for row in rows if row["memory"] == memory and row["length"] == length]
            for length in lengths
        ]
        axes.errorbar(
            [length * offset for length in lengths],
            [mean(at_length) for at_length in errors],
            yerr=[stdev(at_length) if len(at_length) > 1 else 0.0 for at_length in errors],
            label=memory,
            capsize=2.5,
            elinewidth=1,
            **MEMORY_STYLES[memory].options(),
        )
    axes.axhline(1, color="#BBBBBB", linestyle=":", zorder=0)
    length_axis(axes, lengths, [short_number(length) for length in lengths])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

"""The figure of `ovq.research.fidelity`: error of each memory against the length of the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ovq.eval.rows import format_bytes
from ovq.plots.canvas import Axes, Figure, FuncFormatter, LogLocator, NullFormatter, NullLocator
from ovq.runtime.files import atomic_path

# Okabe and Ito's colours, which differ for colour-blind readers too.
_STYLES = {
    "OVQ": ("#08456E", "o", "-"),
    "static VQ": ("#CC79A7", "D", "-"),
    "linear attention": ("#009E73", "v", "-"),
    "delta rule": ("#D55E00", "P", "-"),
    "window + sinks": ("#7F7F7F", "^", "-"),
    "random merging": ("#E69F00", "s", "-"),
    "offline k-means": ("#000000", "", "--"),
}
_TITLES = {
    "random": "random keys",
    "clustered": "clusters, known beforehand",
    "new clusters": "clusters, new in the stream",
    "text": "text (words of a library's source)",
}
_MOST_COLUMNS = 2
# Lines are set apart by so much, in octaves, that error bars at one length do not lie on each other.
_OFFSET = 0.04


def fidelity_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a panel for each stream, with a line for each memory and the standard deviation over seeds.

    Args:
        rows: What `ovq.research.fidelity.fidelity_rows` returns.
        path: Where to write the picture, as PNG.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("expected rows to draw, found none")
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    columns = min(_MOST_COLUMNS, len(streams))
    lines = -(-len(streams) // columns)
    figure = Figure(figsize=(2.2 + 4.2 * columns, 0.6 + 3.2 * lines), layout="constrained")
    # An axis of its own for each: on random keys exact attention is nearly 0, and errors are far larger.
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, stream in zip(panels, streams, strict=False):
        _draw(axes, [row for row in rows if row["stream"] == stream])
        axes.set_title(_TITLES[stream], fontsize=11)
    for axes in panels[len(streams) :]:
        axes.remove()
    figure.supylabel("error relative to exact attention", fontsize=11)
    figure.supxlabel("length of the stream (tokens)", fontsize=11)
    num_seeds = len({row["seed"] for row in rows})
    budget = format_bytes(max(row["bytes"] for row in rows))
    figure.suptitle(
        f"Memories of {budget} against exact attention (mean and standard deviation, {num_seeds} seeds)"
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """One stream."""
    lengths = sorted({row["length"] for row in rows})
    memories = list(dict.fromkeys(row["memory"] for row in rows))
    for place, memory in enumerate(memories):
        offset = 2 ** (_OFFSET * (place - (len(memories) - 1) / 2))
        errors = [
            [row["error"] for row in rows if row["memory"] == memory and row["length"] == length]
            for length in lengths
        ]
        color, marker, line = _STYLES[memory]
        axes.errorbar(
            [length * offset for length in lengths],
            [mean(at_length) for at_length in errors],
            yerr=[stdev(at_length) if len(at_length) > 1 else 0.0 for at_length in errors],
            label=memory,
            color=color,
            marker=marker,
            linestyle=line,
            markersize=5,
            markerfacecolor="white",
            capsize=2.5,
            elinewidth=1,
            linewidth=1.8,
        )
    axes.axhline(1, color="#BBBBBB", linestyle=":", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _short(length: int) -> str:
    """A number of tokens, in thousands where it is a multiple of 1024.

    Example:
        >>> _short(64), _short(4096)
        ('64', '4k')
    """
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)

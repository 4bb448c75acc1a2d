"""Figures of `ovq.inspect`: slots of tokens, exact and shared storage, counts and ages of slots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ovq.inspect import InspectedText, LayerMemory, levels
from ovq_lab.plots.canvas import Axes, FuncFormatter
from ovq_lab.plots.panels import new_panels, save
from ovq_lab.plots.style import MIXER_STYLES, PALETTE

_NUM_PARTS = 32
# From exact to blurred, as on the page: blue for exact tokens, yellow to red for tokens in shared slots.
LEVEL_COLORS = ("#D9E8F5", "#0072B2", "#FFE9A0", "#FDBB5C", "#E5763F", "#B2432F", "#AEB4BB")
_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
_COUNT_NAMES = ("1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128", "over 128")


def save_memory_figures(
    found: InspectedText, folder: Path, *, layer: int | None = None, head: int | None = None
) -> list[Path]:
    """Draw the memory of a text.

    Args:
        found: The text and the memory.
        folder: Where to write `slots.png` (slots and storage of tokens by position, of one head), `heads.png`
            (storage of tokens in all heads), `counts.png` (counts and ages of slots in the heads of one
            layer), and `reads.png` (attention weights of the queries of one head).
        layer: The layer, by its number in the model; None for the highest one.
        head: The query head; None for the one with the most attention on slots.

    Returns:
        The paths of the pictures.

    Raises:
        ValueError: If there is no such layer or head.
    """
    memory = found.layer(layer)
    head = found.reading_head(layer) if head is None else head
    if not 0 <= head < memory.num_heads:
        raise ValueError(f"head: expected 0 to {memory.num_heads - 1}, found {head}")
    kv_head = memory.kv_head(head)
    name = f"{found.num_tokens:,} token{'s' * (found.num_tokens != 1)}"
    where = f"layer {memory.layer}, head {head}"
    paths = [folder / file for file in ("slots.png", "heads.png", "counts.png", "reads.png")]
    title = f"What {where} keeps of {name}, at most {memory.num_slots[kv_head]:,} slots"
    _slots_figure(memory, kv_head, found.level_names, paths[0], title=title)
    _heads_figure(found, paths[1], title=f"What is kept of {name}, at the end of the text")
    _counts_figure(memory, paths[2], title=f"The slots of layer {memory.layer} after {name}")
    _reads_figure(memory, head, paths[3], title=f"What {where} reads of {name}")
    return paths


def _slots_figure(memory: LayerMemory, kv_head: int, names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw the slot of each token, and shares of storage levels by position."""
    figure, (places, shares) = new_panels(2, height=3.4)
    _draw_places(places, memory, kv_head)
    counts, kept = memory.counts()[kv_head], memory.kept[kv_head]
    edges = _edges(memory.num_tokens)
    level = levels(counts)
    of_part = [np.bincount(level[a:b], minlength=len(names)) / (b - a) for a, b in pairwise(edges.tolist())]
    _stack(shares, edges, np.array(of_part), LEVEL_COLORS[: len(names)], names)
    middle = (edges[:-1] + edges[1:]) / 2
    means = [float(kept[a:b].mean()) for a, b in pairwise(edges.tolist())]
    shares.plot(middle, means, color="black", linewidth=1.6, label="share of the values kept")
    shares.set_ylabel("share of the tokens")
    shares.set_title("what became of tokens, by position, at the end of the text", fontsize=11)
    save(figure, path, title=title)


def _reads_figure(memory: LayerMemory, head: int, path: Path, *, title: str) -> None:
    """Draw the attention on exact tokens, on slots of one token and on shared slots, by query position."""
    figure, [axes] = new_panels(1)
    edges = _edges(memory.num_tokens)
    of_part = [memory.shares[head, a:b].mean(0) for a, b in pairwise(edges.tolist())]
    names = ("exact tokens", "slots of one token", "slots of several tokens")
    _stack(axes, edges, np.array(of_part), (LEVEL_COLORS[0], LEVEL_COLORS[1], LEVEL_COLORS[4]), names)
    axes.set_ylabel("share of the weight")
    axes.set_xlabel("position of the query")
    save(figure, path, title=title)


def _edges(num_tokens: int) -> np.ndarray:
    """Edges that divide the positions of a text into parts of about equal length."""
    return np.linspace(0, num_tokens, min(_NUM_PARTS, num_tokens) + 1).astype(int)


def _stack(
    axes: Axes, edges: np.ndarray, shares: np.ndarray, colors: Sequence[str], names: Sequence[str]
) -> None:
    """Draw shares `[parts, kinds]` as stacked steps over the parts of a text."""
    below = np.zeros(len(shares))
    for share, color, name in zip(shares.T, colors, names, strict=True):
        # One artist for all parts: hundreds of bars would take seconds to lay out.
        axes.stairs(below + share, edges, baseline=below, fill=True, color=color, label=name)
        below = below + share
    axes.set_ylim(0, 1)
    axes.set_xlim(edges[0], edges[-1])
    _mark_whole_numbers(axes)


def _mark_whole_numbers(axes: Axes) -> None:
    """Put ticks at whole positions; in short texts they would otherwise be at fractions."""
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter(_THOUSANDS)


def _draw_places(axes: Axes, memory: LayerMemory, kv_head: int) -> None:
    """Draw a dot for each token at its slot, and a line for each slot that is merged into another."""
    slots = memory.slots[kv_head]
    is_merged = slots >= 0
    opens = np.array(_openers(memory, kv_head), dtype=np.int64)
    joins = np.setdiff1d(np.nonzero(is_merged)[0], opens)
    of_head = memory.moves[memory.moves[:, 1] == kv_head]
    if len(of_head):
        color = PALETTE[7].color
        axes.vlines(
            memory.merged_after(of_head[:, 0], kv_head),
            of_head[:, 2],
            of_head[:, 3],
            color=color,
            alpha=0.25,
            linewidth=0.6,
            zorder=1,
        )
        # The line itself is too faint for a legend.
        axes.plot([], [], color=color, linewidth=1.8, label="a slot is merged into another")
    dot = 14 if len(slots) <= 512 else 4
    kinds = (
        (joins, "o", MIXER_STYLES["ovq"].color, "joins a slot"),
        (opens, "s", MIXER_STYLES["linear_attention"].color, "opens a slot"),
    )
    for tokens, marker, color, label in kinds:
        # Not clipped, as the first token's dot lies on the edge.
        axes.scatter(tokens, slots[tokens], s=dot, color=color, linewidths=0, marker=marker, clip_on=False)
        # The dots themselves are too small for a legend.
        axes.plot([], [], color=color, linestyle="", marker=marker, markersize=5, label=label)
    axes.set_xlim(0, memory.num_tokens)
    # With room for the first slot, where none is in use.
    axes.set_ylim(-0.5, max(0.5, axes.get_ylim()[1]))
    axes.set_ylabel("slot")
    axes.set_xlabel("position of the token")
    axes.set_title("the slot that each token goes into", fontsize=11)
    axes.locator_params(axis="y", integer=True)
    _mark_whole_numbers(axes)


def _openers(memory: LayerMemory, kv_head: int) -> list[int]:
    """The tokens that opened a slot, including slots that were freed by a merge before."""
    used: set[int] = set()
    found = []
    for chunk in range(memory.num_chunks(kv_head)):
        moves = memory.moves[(memory.moves[:, 1] == kv_head) & (memory.moves[:, 0] == chunk)]
        used -= set(moves[:, 2].tolist())
        tokens = memory.tokens(chunk)
        for token in range(tokens.start, tokens.stop):
            slot = int(memory.slots[kv_head, token])
            if slot >= 0 and slot not in used:
                used.add(slot)
                found.append(token)
    return found


def _heads_figure(found: InspectedText, path: Path, *, title: str) -> None:
    """Draw a bar for each key/value head of each layer: storage of tokens, and of their values."""
    heads = [(memory, kv) for memory in found.layers for kv in range(memory.num_kv_heads)]
    figure, [axes] = new_panels(1, height=0.9 + 0.28 * len(heads))
    level = [levels(memory.counts()[kv]) for memory, kv in heads]
    names = found.level_names
    shares = np.array([np.bincount(x, minlength=len(names)) / len(x) for x in level])
    left, rows = np.zeros(len(heads)), np.arange(len(heads))
    for i, share in enumerate(shares.T):
        axes.barh(rows, share, 0.8, left=left, color=LEVEL_COLORS[i], edgecolor="white", label=names[i])
        left += share
    for row, (memory, kv) in enumerate(heads):
        axes.text(1.01, row, f"{memory.kept[kv].mean():.0%}", va="center", fontsize=9)
    axes.text(1.01, -1, "kept", va="center", fontsize=9)
    axes.set_yticks(
        rows, [f"layer {memory.layer}, {_head_name(memory, kv)}" for memory, kv in heads], fontsize=9
    )
    axes.set_ylim(len(heads) - 0.5, -1.4)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("share of the tokens; at the right, the mean share that is kept of their values")
    save(figure, path, title=title)


def _head_name(memory: LayerMemory, kv_head: int) -> str:
    """Name of a key/value head by its query heads."""
    group = memory.num_heads // memory.num_kv_heads
    first = kv_head * group
    return f"head {first}" if group == 1 else f"heads {first}-{first + group - 1}"


def _counts_figure(memory: LayerMemory, path: Path, *, title: str) -> None:
    """Draw the counts and ages of slots for the heads of a layer."""
    figure, (counts, ages) = new_panels(2, height=2.8)
    merged = memory.tokens(max(map(memory.num_chunks, range(memory.num_kv_heads)))).start
    num_parts = 16
    for kv in range(memory.num_kv_heads):
        style, slots = PALETTE[kv % len(PALETTE)], memory.final_slots[kv]
        members = [np.nonzero(slots == slot)[0] for slot in np.unique(slots[slots >= 0])]
        octave = [min(len(_COUNT_NAMES) - 1, int(np.ceil(np.log2(len(tokens))))) for tokens in members]
        label = _head_name(memory, kv)
        options = style.options() | {"markersize": 4}
        number = np.bincount(octave, minlength=len(_COUNT_NAMES)) if octave else np.zeros(len(_COUNT_NAMES))
        counts.plot(range(len(_COUNT_NAMES)), number, label=label, **options)
        mean = [tokens.mean() for tokens in members]
        number, edges = np.histogram(mean, bins=num_parts, range=(0, max(1, merged)))
        ages.plot((edges[:-1] + edges[1:]) / 2, number, label=label, **options)
    counts.set_xticks(range(len(_COUNT_NAMES)), _COUNT_NAMES, fontsize=9, rotation=35, ha="right")
    counts.set_xlabel("tokens in the slot")
    counts.set_title("how many tokens a slot holds", fontsize=11)
    ages.set_xlabel("mean position of the tokens in the slot")
    ages.set_title("how old slots are", fontsize=11)
    _mark_whole_numbers(ages)
    for axes in (counts, ages):
        axes.locator_params(axis="y", integer=True)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("slots")
    save(figure, path, title=title)

"""Line styles: one colour and one marker per mixer, the same in every figure of the project.

Hues and markers are those of `ovq_lab.mixers.names`. Lines of one mixer keep its hue and differ in shade,
marker and dashes. OVQ has a second blue, with filled markers, for rules that merge pairs. If all lines have
the same mixer, as in an ablation, they have colours that belong to no mixer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ovq.ops.options import PAIR_MERGES
from ovq_lab.eval.rows import ModelRow
from ovq_lab.mixers.names import KNOWN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """Style of a line.

    Attributes:
        is_filled: Whether markers are filled. Hollow markers stay visible as rings where lines overlap.
    """

    color: str
    marker: str
    line: str = "-"
    is_filled: bool = False

    def options(self) -> dict[str, Any]:
        """Arguments of `Axes.plot` and `Axes.errorbar`.

        Example:
            >>> MIXER_STYLES["ovq"].options()["color"]
            '#0072B2'
        """
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.line,
            "linewidth": 1.8,
            # Dashed lines and hollow markers are drawn above solid lines and filled markers, so both show.
            "zorder": (2 if self.line == "-" else 2.2) - (0.5 if self.is_filled else 0),
            "markersize": 6,
            "markerfacecolor": self.color if self.is_filled else "white",
            "markeredgewidth": 1.5,
        }


PAIRS = "ovq, pairs"
"""Stands in place of a mixer's name for OVQ with a rule that merges pairs."""

_LOOKS = {mixer: (known.marker, known.shades) for mixer, known in KNOWN.items()}
_LOOKS[PAIRS] = ("*", ("#9FA0FF", "#4B3CF0", "#35108F"))
_DASHES = ("--", "-", "-.")
_OTHER_MARKERS = ("D", "h", "p", "d", "*", "8", "H")

MIXER_STYLES = {
    mixer: Style(color=shades[1], marker=marker, is_filled=mixer == PAIRS)
    for mixer, (marker, shades) in _LOOKS.items()
}
"""Styles of the mixers in `ovq_lab.mixers.MIXERS`, and of `PAIRS`, in figures with one line per mixer."""

PALETTE = tuple(
    Style(color=color, marker=marker)
    for color, marker in zip(
        # Tol's muted colours, except those that are too light for a line.
        ("#332288", "#CC6677", "#44AA99", "#999933", "#882255", "#88CCEE", "#117733", "#AA4499"),
        ("o", "D", "v", "s", "^", "P", "X", "h"),
        strict=True,
    )
)
"""Styles that belong to no mixer, for figures of one mixer and for lines of no mixer."""


def style_name(mixer: str, merge: str | None) -> str:
    """Name of a mixer in `line_styles` and `MIXER_STYLES`.

    Example:
        >>> style_name("ovq", "existing"), style_name("ovq", "nearest"), style_name("mamba2", None)
        ('ovq', 'ovq, pairs', 'mamba2')
    """
    return PAIRS if mixer == "ovq" and merge in PAIR_MERGES else mixer


def row_styles(rows: Iterable[ModelRow]) -> dict[str, Style]:
    """The style of each label of rows, by `line_styles`."""
    return line_styles({row.label: (style_name(row.mixer, row.merge), row.num_slots) for row in rows})


def line_styles(models: Mapping[str, tuple[str, int | None]]) -> dict[str, Style]:
    """The style of each line of a figure.

    Args:
        models: For the label of each line, its mixer by `style_name`, and the slots of its dictionary, or
            `None` if it has none. More slots are darker.

    Example:
        >>> styles = line_styles({"few": ("ovq", 64), "many": ("ovq", 4096), "all": ("full_attention", None)})
        >>> [(style.color, style.line) for style in styles.values()]
        [('#6DB6E3', '--'), ('#0072B2', '-'), ('#E69F00', '-')]
        >>> [style.color for style in line_styles({"a": ("ovq", 64), "b": ("ovq", 64)}).values()]
        ['#332288', '#CC6677']
    """
    mixers = {"ovq" if mixer == PAIRS else mixer for mixer, _ in models.values()}
    if len(mixers) == 1 and len(set(models.values())) < len(models):
        return _in_turn(list(models))
    styles = _in_turn([label for label, (mixer, _) in models.items() if mixer not in _LOOKS])
    for mixer in _LOOKS:
        labels = [label for label, model in models.items() if model[0] == mixer]
        labels.sort(key=lambda label: models[label][1] or 0)
        styles |= zip(labels, _variants(mixer, len(labels)), strict=True)
    return {label: styles[label] for label in models}


def _in_turn(labels: list[str]) -> dict[str, Style]:
    """The styles of the palette in order; once used up, they are repeated with other dashes."""
    return {
        label: dataclasses.replace(
            PALETTE[place % len(PALETTE)], line=("-", "--", "-.", ":")[place // len(PALETTE) % 4]
        )
        for place, label in enumerate(labels)
    }


def _variants(mixer: str, count: int) -> list[Style]:
    """Styles of one hue, from light to dark."""
    marker, shades = _LOOKS[mixer]
    # One line gets the normal shade, two get the light and the normal one.
    last = {1: 1, 2: 1}.get(count, 2)
    first = 1 if count == 1 else 0
    places = [first + round(i * (last - first) / max(1, count - 1)) for i in range(count)]
    return [
        Style(
            color=shades[shade],
            # The first line in the normal shade has the mixer's own marker.
            marker=marker
            if shade == 1 and shade not in places[:i]
            else _OTHER_MARKERS[i % len(_OTHER_MARKERS)],
            # Dots distinguish two lines of one shade even where their markers overlap.
            line=":" if shade in places[:i] else _DASHES[shade],
            is_filled=MIXER_STYLES[mixer].is_filled,
        )
        for i, shade in enumerate(places)
    ]

"""Names, markers and colours of the mixers in tables and figures, one entry per mixer.

The hues are the colour-blind-safe palette of Okabe and Ito, with a grey and a brown for the two windows, a
magenta for KVM, an olive for Raven, a plum for KDA, a moss green for MesaNet and a crimson for FoX.
"""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """Name and style of a mixer that experiments compare.

    Attributes:
        short: Name in the names of recipes.
        shades: Light, normal and dark shade of its hue, as `#RRGGBB`; black has no darker one.
    """

    name: str
    short: str
    marker: str
    shades: tuple[str, str, str]


KNOWN = {
    "ovq": Known("OVQ", "ovq", "o", ("#6DB6E3", "#0072B2", "#08306B")),
    "full_attention": Known("full attention", "full", "s", ("#F3C35C", "#E69F00", "#8F6300")),
    "fox": Known("FoX", "fox", "h", ("#EE7A90", "#D00030", "#6E0019")),
    "sliding_attention": Known("window alone", "sliding", "^", ("#A8A8A8", "#5F5F5F", "#3A3A3A")),
    "sink_attention": Known("window and sinks", "sinks", "<", ("#B57A52", "#6E2C00", "#3B1800")),
    "vq": Known("VQ", "vq", "v", ("#6CCBAF", "#009E73", "#005C43")),
    "kvm": Known("KVM", "kvm", "p", ("#FFAEFF", "#FF60FF", "#A312A3")),
    "raven": Known("Raven", "raven", "H", ("#CFCF95", "#B0B060", "#70702C")),
    "linear_attention": Known("linear attention", "linear", ">", ("#F0996B", "#D55E00", "#853B00")),
    "gated_deltanet": Known("Gated DeltaNet", "gdn", "P", ("#E3B5D0", "#CC79A7", "#8C4A70")),
    "kda": Known("KDA", "kda", "D", ("#A86AA8", "#691E69", "#3A0C3A")),
    "mesanet": Known("MesaNet", "mesanet", "8", ("#8DB37F", "#4B783C", "#2A4720")),
    "mamba2": Known("Mamba2", "mamba2", "X", ("#8C8C8C", "#000000", "#444444")),
}
"""Entries by the mixer's name in `mixer_types`."""

MIXER_NAMES = {mixer: known.name for mixer, known in KNOWN.items()}
"""Display names; other mixers are shown by their name in `mixer_types`."""

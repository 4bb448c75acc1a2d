"""Each mixer has one colour and marker, told apart by every reader, in every figure."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from ovq_lab.bench.rivals import RIVALS
from ovq_lab.bench.show import save_figures as save_bench
from ovq_lab.eval.language import LanguageRow
from ovq_lab.eval.needle import NeedleRow
from ovq_lab.eval.rows import ResultRow
from ovq_lab.mixers import MIXERS
from ovq_lab.plots.draw import save_demo_figures, save_figure, save_heat_maps
from ovq_lab.plots.language import save_language_figures
from ovq_lab.plots.needle import save_needle_figures
from ovq_lab.plots.panels import WIDTH
from ovq_lab.plots.style import MIXER_STYLES, PAIRS, PALETTE, line_styles

# What readers without one kind of cone see, in linear RGB (Machado, Oliveira and Fernandes, 2009).
SIGHTS = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


# What has a style of its own: the mixers, and OVQ where pairs are merged.
STYLED = (*MIXERS, PAIRS)


def lab(color, sight):
    """CIE L*a*b* of a colour as it is seen; a distance of 2 can just be noticed."""
    rgb = np.array(list(bytes.fromhex(color[1:]))) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(SIGHTS[sight] @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest(colors, sight):
    return min(
        np.linalg.norm(lab(one, sight) - lab(other, sight))
        for one, other in itertools.combinations(colors, 2)
    )


def test_every_mixer_has_a_colour_and_a_marker_of_its_own():
    assert set(MIXER_STYLES) == set(STYLED)
    assert len({style.color for style in MIXER_STYLES.values()}) == len(STYLED)
    assert len({style.marker for style in MIXER_STYLES.values()}) == len(STYLED)


@pytest.mark.parametrize("sight", SIGHTS)
def test_readers_of_all_kinds_tell_the_mixers_apart(sight):
    assert nearest([style.color for style in MIXER_STYLES.values()], sight) > 15
    assert nearest([style.color for style in PALETTE[:6]], sight) > 15
    models = [(mixer, n) for mixer in ("ovq", PAIRS) for n in (1, 2, 3)]
    shades = [style.color for style in line_styles({str(model): model for model in models}).values()]
    assert min(nearest(shades[:3], sight), nearest(shades[3:], sight)) > 20
    assert nearest(shades, sight) > 15


def test_what_is_no_mixer_has_no_mixers_colour():
    colors = {style.color for style in MIXER_STYLES.values()}
    assert not colors & {style.color for style in PALETTE}


@pytest.mark.parametrize("mixer", STYLED)
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_lines_of_one_mixer_share_its_hue_and_differ(mixer, count):
    # Another mixer beside them, as all of one would be an ablation.
    other = next(name for name in MIXERS if name not in (mixer, "ovq"))
    models = {f"{n}": (mixer, n) for n in range(count, 0, -1)} | {"other": (other, None)}
    styles = line_styles(models)
    assert list(styles) == list(models)
    # Not by their markers alone.
    assert len({(style.color, style.line) for style in styles.values()}) == count + 1
    assert MIXER_STYLES[mixer].color in {style.color for style in styles.values()}
    assert styles["other"] == MIXER_STYLES[other]
    known = {style.color for name, style in MIXER_STYLES.items() if name != mixer}
    assert not known & {style.color for label, style in styles.items() if label != "other"}
    lightness = [lab(styles[f"{n}"].color, "all cones")[0] for n in range(1, count + 1)]
    if mixer != "mamba2":
        # More slots are darker.
        assert lightness == sorted(lightness, reverse=True)


def test_an_ablation_has_the_palette_and_sizes_of_a_dictionary_have_shades():
    ablation = line_styles({f"{n}": ("ovq", 64) for n in range(20)})
    assert list(ablation.values())[: len(PALETTE)] == list(PALETTE)
    rules = line_styles({"paper's": ("ovq", 64), "updated": ("ovq", 64), "nearest": (PAIRS, 64)})
    assert list(rules.values()) == list(PALETTE[:3])
    assert len(set(ablation.values())) == 20
    sizes = line_styles({f"{n}": ("ovq", n) for n in (64, 256)})
    assert MIXER_STYLES["ovq"] in sizes.values()


def test_a_mixer_nobody_knows_is_drawn_as_well():
    styles = line_styles({"a": ("mine", None), "b": ("yours", None), "c": ("ovq", 64)})
    assert len(set(styles.values())) == 3
    assert styles["c"] == MIXER_STYLES["ovq"]


def colors_in(figure: Figure) -> dict[str, str]:
    """The colour of each label: of lines in the legend, of maps by their frame."""
    colors = {
        text.get_text(): line.get_color()
        for legend in figure.legends
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    for axes in figure.axes:
        if axes.get_images() and axes.get_title():
            colors[axes.get_title()] = axes.spines["left"].get_edgecolor()
    return colors


# One line of each mixer: its labels in the figures of reproduce, demo and eval; of fidelity; of bench.
NAMES = {
    "ovq": {"OVQ", "OVQ, 64 slots"},
    PAIRS: {"OVQ, nearest, 64 slots"},
    "full_attention": {"full attention", "exact (SDPA)"},
    "sliding_attention": {"window alone", "window of 256"},
    "sink_attention": {"window and sinks", "window + sinks"},
    "vq": {"VQ", "static VQ"},
    "kvm": {"KVM"},
    "raven": {"Raven"},
    "linear_attention": {"linear attention"},
    "gated_deltanet": {"Gated DeltaNet", "delta rule", "Gated DeltaNet, fla"},
    "fox": {"FoX"},
    "kda": {"KDA"},
    "mesanet": {"MesaNet"},
    "mamba2": {"Mamba2", "Mamba2, fla"},
}
MODELS = [(mixer, 64 if mixer == "ovq" else None) for mixer in MIXERS]


def draw_all(folder):
    """Every figure of the project, of one line for each mixer."""
    fields = {"length": 256, "accuracy": 0.5, "state_bytes": 1024, "num_questions": 1, "slices": {}}
    demo = [ResultRow(mixer=mixer, num_slots=slots, **fields) for mixer, slots in MODELS]
    demo.append(ResultRow(mixer="ovq", num_slots=64, merge="nearest", **fields))
    save_demo_figures(demo, folder, train_length=256)
    rows = [
        {"line": row.label, "group": "", "seed": 0, "train_length": 256}
        | {"mixer": row.mixer, "num_slots": row.num_slots, "length": 256, "accuracy": 0.5, "merge": row.merge}
        for row in demo
    ]
    panel = {"title": "p", "x": "length", "y": "accuracy", "group": "", "at_length": None}
    results = {"title": "t", "panels": [panel], "rows": rows}
    save_figure(results, folder / "a.png")
    save_heat_maps(results, folder / "b.png")
    losses = {"loss": 1.0, "bits_per_byte": None, "tokens_per_second": 1.0, "state_bytes": 1}
    losses |= {"block_size": 128, "window_losses": ((1.0, 1.0),), "chunk_size": 2, "phase_losses": (1.0, 1.0)}
    losses |= {"sawtooth": None, "sawtooth_error": None, "length": 256, "num_windows": 1}
    save_language_figures(
        [LanguageRow(mixer=mixer, num_slots=slots, **losses) for mixer, slots in MODELS], folder
    )
    found = {"haystack": "essay", "value": "number", "length": 256, "depth": 0.5, "num_examples": 1}
    found |= {"num_distractors": 0, "generated": 0.5, "token_accuracy": 0.5, "choice": 0.5}
    found |= {"state_bytes": 1}
    save_needle_figures([NeedleRow(mixer=mixer, num_slots=slots, **found) for mixer, slots in MODELS], folder)
    memories = ["OVQ", "static VQ", "linear attention", "delta rule", "window + sinks"]
    row = {"group": "", "seed": 0, "length": 64, "error": 0.5}
    results = {
        "title": "t",
        "panels": [panel | {"y": "error"}],
        "rows": [row | {"line": n} for n in memories],
    }
    save_figure(results, folder / "c.png")
    labels = {"ovq": "OVQ, 64 slots", "sdpa": "exact (SDPA)", "window": "window of 256"}
    labels |= {"gated_deltanet": "Gated DeltaNet, fla", "mamba2": "Mamba2, fla"}
    rows = [
        {"what": "forward", "dtype": "float32", "mixer": mixer, "label": label, "length": 256, "seconds": 1.0}
        | {"num_slots": 64 if mixer == "ovq" else None}
        for mixer, label in labels.items()
    ]
    save_bench({"suite": {"dtypes": ["float32"]}, "rows": rows}, folder)


def test_a_mixer_looks_the_same_in_every_figure(tmp_path, drawn):
    from matplotlib.colors import to_hex

    draw_all(tmp_path)
    # Two of the demonstration and of language, three of needles, and one of each other.
    assert len(drawn) == 2 + 2 + 3 + 2 + 1 + 1
    for mixer, names in NAMES.items():
        found = [color for figure in drawn for label, color in colors_in(figure).items() if label in names]
        # Not every figure shows that rule.
        assert len(found) >= (4 if mixer == PAIRS else 9)
        assert {to_hex(color).upper() for color in found} == {MIXER_STYLES[mixer].color}
    assert {figure.get_figwidth() for figure in drawn} == {WIDTH}


def test_what_bench_measures_looks_like_a_mixer(tmp_path, drawn):
    mixers = ("ovq", *RIVALS)
    rows = [
        {"what": "forward", "dtype": "float32", "mixer": mixer, "label": mixer, "length": 256, "seconds": 1.0}
        | {"num_slots": None}
        for mixer in mixers
    ]
    save_bench({"suite": {"dtypes": ["float32"]}, "rows": rows}, tmp_path)
    colors = colors_in(drawn[0])
    assert len(colors) == len(mixers)
    assert not set(colors.values()) & {style.color for style in PALETTE}

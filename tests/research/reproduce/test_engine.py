"""Figures come about, share what is trained, and go on where they were stopped."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ovq_lab.eval import accuracy
from ovq_lab.figures import engine, figures
from ovq_lab.figures.engine import choose_trial, reproduce
from ovq_lab.figures.fidelity.measure import fidelity_rows
from ovq_lab.figures.fidelity.streams import STREAMS
from ovq_lab.figures.figures import get_figure
from ovq_lab.figures.jobs import RunJob
from ovq_lab.figures.page import write_report
from ovq_lab.figures.plan import Figure, Panel, Trial, run_name, with_trial
from ovq_lab.figures.results import load_results, save_results
from ovq_lab.plots.draw import points
from ovq_lab.train.checkpoints import fault, newest_checkpoint
from ovq_lab.train.config import RunConfig
from tests.research.reproduce.common import CONFIG, TINY, rows_of, run_here, undrawn, workshop


def two_mixers(preset):
    """The figure of recall with two of the mixers, which are enough here."""
    figure = get_figure("recall", preset)
    lines = tuple(line for line in figure.lines if line.config.mixer in ("full_attention", "ovq"))
    return dataclasses.replace(figure, lines=lines)


FIGURE = undrawn(two_mixers(TINY))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the figure that everything else is compared with, and the jobs it took."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        begun = run_here(patch)
        reproduce(two_mixers(TINY), workshop(out))
    return out, begun


def test_rows_are_there_for_every_line_seed_and_evaluation(made):
    out, _ = made
    rows = load_results(out / "rows" / "recall.json")["rows"]
    found = [(row["line"], row["seed"], row["length"]) for row in rows]
    assert found == [
        (line.label, seed, each.task.length)
        for line in FIGURE.lines
        for seed in (0, 1)
        for each in line.evaluations
    ]
    for row in rows:
        assert (out / "runs" / row["run"] / "model.safetensors").is_file()
        assert 0 <= row["accuracy"] <= 1
        assert row["state_bytes"] > 0
        assert row["seconds"] > 0
        assert row["num_parameters"] > 1000
        assert row["train_length"] == 24
        assert row["task"]["name"] == "recall"
    of_ovq = [row for row in rows if row["mixer"] == "ovq"]
    rules = {(row["line"].startswith("OVQ, nearest"), row["merge"]) for row in of_ovq}
    assert rules == {(False, "existing"), (True, "nearest")}
    slots = {row["length"]: row["num_slots"] for row in rows if row["line"] == "OVQ, a slot for 3.2 tokens"}
    assert slots == {24: 7, 48: 15, 64: 20}
    with Image.open(out / "figures" / "recall.png") as picture:
        picture.verify()


def test_each_mixer_goes_on_with_its_best_trial(made):
    out, begun = made
    results = load_results(out / "rows" / "recall.json")
    mixers = list(dict.fromkeys(row["mixer"] for row in results["rows"]))
    assert [entry["mixer"] for entry in results["sweep"]] == mixers
    for entry in results["sweep"]:
        assert set(entry["accuracies"]) == {"0.001", "0.01, decay 0.5"}
        rows = [row for row in results["rows"] if row["mixer"] == entry["mixer"]]
        trials = {Trial(learning_rate=row["learning_rate"], weight_decay=row["weight_decay"]) for row in rows}
        assert {trial.label for trial in trials} == {entry["chosen"]}
    # Two trials on the first seed, of which the best is not trained again, but evaluated; then the
    # second seed.
    assert len(begun) == len(mixers) * 4
    # No row comes from examples that a trial was chosen by.
    validation, tested = set(), set()
    for path in out.glob("runs/*/evaluations/*.json"):
        evaluation = json.loads(path.read_text())["evaluation"]
        (validation if evaluation["seed"] >= 10**6 else tested).add(evaluation["seed"])
    assert validation == {10**6}
    assert tested == {0, 1}


def test_the_best_trial_is_that_of_the_best_accuracy(monkeypatch, tmp_path):
    # As if the outcomes were known: the higher rate is the better one for full attention alone.
    monkeypatch.setattr(engine.Workshop, "do", lambda self, jobs, label: None)
    monkeypatch.setattr(
        engine.RunJob,
        "outcomes",
        lambda job: [
            {
                "accuracy": 0.5
                + 0.1 * (job.config.train.learning_rate > 0.005) * (job.config.mixer == "full_attention")
            }
        ],
    )
    sweep, chosen = engine._sweep(FIGURE, FIGURE, workshop(tmp_path))
    assert {entry["mixer"]: entry["chosen"] for entry in sweep}["full_attention"] == "0.01, decay 0.5"
    # OVQ is tried with the dictionary it has in tests that are as long: a slot for 3.2 of 96 tokens.
    assert {entry["mixer"]: (entry["length"], entry["num_slots"]) for entry in sweep} == {
        "full_attention": (96, None),
        "ovq": (96, 30),
    }
    # Of equals the one nearer to 0.004.
    assert chosen[run_name(TINY.config("recall"))] == TINY.trials[1]
    usual = dataclasses.replace(TINY, trials=(Trial(learning_rate=2e-3), TINY.trials[1]))
    figure = two_mixers(usual)
    _, chosen = engine._sweep(figure, figure, workshop(tmp_path))
    assert chosen[run_name(TINY.config("recall"))] == usual.trials[0]


def test_what_is_finished_is_never_done_again(made, monkeypatch):
    out, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/*") if path.is_file()}
    rows = rows_of(out, "recall")
    monkeypatch.setattr(engine, "run_jobs", None)
    reproduce(FIGURE, workshop(out))
    assert rows_of(out, "recall") == rows
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/**/*") if path.is_file()} == before


def test_what_other_code_has_finished_is_named_with_what_to_delete(made, monkeypatch, tmp_path):
    out, said = tmp_path / "out", []
    shutil.copytree(made[0], out)
    shop = workshop(out)
    monkeypatch.setattr(shop.reporter, "say", said.append)
    begun = run_here(monkeypatch)
    reproduce(FIGURE, shop)
    assert said == [f"recall: {jobs}: 4 of 4 were finished before" for jobs in ("trials", "runs")]
    said.clear()
    for path in out.glob("runs/recall-ovq-*/evaluations/*.json"):
        record = json.loads(path.read_text())
        record["environment"] |= {"ovq": "0.0.1", "commit": "0000dead"}
        path.write_text(json.dumps(record))
    reproduce(FIGURE, shop, lines=["OVQ, 4 slots"])
    # One line, as the chosen trials are in the results.
    [line] = said
    notice = "recall: runs: 2 of 2 were finished before, 2 of them by 0.0.1 (commit 0000dead); this is "
    assert line.startswith(notice)
    assert line.endswith(f": to make them anew, delete {out}/runs/recall-ovq-seed*")
    assert begun == []
    for folder in out.glob("runs/recall-ovq-seed*"):
        shutil.rmtree(folder)
    said.clear()
    results = reproduce(FIGURE, shop, lines=["OVQ, 4 slots"])
    assert len(begun) == 2
    assert said == []
    [update] = results["updates"]
    assert "0000dead" not in json.dumps(update["environments"])


def test_another_figure_takes_the_runs_that_are_there(made, monkeypatch, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    row = next(row for row in rows_of(out, "recall") if row["mixer"] == "ovq")
    trial = Trial(learning_rate=row["learning_rate"], weight_decay=row["weight_decay"])
    usual = with_trial(CONFIG, trial)
    models = {path.parent for path in out.glob("runs/*/model.safetensors")}
    run_here(monkeypatch)
    figure = get_figure("dictionary", dataclasses.replace(TINY, configs={"recall": usual}))
    reproduce(undrawn(figure), workshop(out))
    assert {path.parent for path in out.glob("runs/*/model.safetensors")} == models
    # One model is evaluated at all sizes and lengths.
    rows = rows_of(out, "dictionary")
    assert len({row["run"] for row in rows}) == 2
    assert {row["num_slots"] for row in rows} == {4, 16}


def test_lines_made_anew_join_those_that_are_there(made, monkeypatch, tmp_path):
    out, _ = made
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    path = copy / "rows" / "recall.json"
    results = load_results(path)
    # As a file of an earlier version would be: without some lines, the rule of any row, and with a mark.
    earlier = [
        {**row, "accuracy": -1.0} for row in results["rows"] if not row["line"].startswith("OVQ, nearest")
    ]
    for row in earlier:
        del row["merge"]
    # Of these lines one is there, one is gone, and one is made once more.
    lines = [results["rows"][0]["line"], "a line of earlier", "OVQ, nearest, 4 slots"]
    updates = [{"lines": lines, "command": "as then", "environments": ["there"]}]
    updates.append({"lines": lines[1:], "command": "before", "environments": ["there"]})
    marks = {"environments": ["somewhere else"], "updates": updates}
    save_results(path, {**results, "rows": earlier, **marks})
    begun = run_here(monkeypatch)
    joined = reproduce(FIGURE, workshop(copy), lines=["OVQ, nearest, *"])
    assert begun == []
    assert joined == load_results(path)
    is_new = [row["line"].startswith("OVQ, nearest") for row in results["rows"]]
    assert set(is_new) == {True, False}
    assert [row["line"] for row in joined["rows"]] == [row["line"] for row in results["rows"]]
    for row, whole, new in zip(joined["rows"], results["rows"], is_new, strict=True):
        assert row == whole if new else row == {**whole, "accuracy": -1.0}
    for field in ("panels", "sweep", "seeds", "command"):
        assert joined[field] == results[field]
    assert joined["environments"] == ["somewhere else"]
    old, update = joined["updates"]
    assert old == updates[0] | {"lines": lines[:1]}
    assert update["lines"] == ["OVQ, nearest, 4 slots", "OVQ, nearest, a slot for 4.2 tokens"]
    assert update["command"].endswith(" --lines 'OVQ, nearest, *'")
    assert update["environments"] == results["environments"]
    # They go on with the settings that were chosen then, whatever a sweep would choose now.
    chosen = next(entry for entry in results["sweep"] if entry["mixer"] == "ovq")
    other = next(trial for trial in TINY.trials if trial.label != chosen["chosen"])
    sweep = [{**entry, "chosen": other.label} for entry in results["sweep"]]
    save_results(path, {**results, "sweep": sweep})
    joined = reproduce(FIGURE, workshop(copy), lines=["OVQ, nearest, 4 slots"])
    rates = {row["learning_rate"] for row in joined["rows"] if row["line"] == "OVQ, nearest, 4 slots"}
    assert rates == {other.learning_rate}


def test_lines_that_cannot_be_joined_are_refused_before_anything_is_trained(made, monkeypatch, tmp_path):
    out, _ = made
    begun = run_here(monkeypatch)
    with pytest.raises(
        ValueError, match=r"--lines: expected labels of recall, such as 'full attention', .*found 'ovq'"
    ):
        reproduce(FIGURE, workshop(out), lines=["ovq"])
    rows = tmp_path / "rows" / "recall.json"
    rows.parent.mkdir()
    results = load_results(out / "rows" / "recall.json")
    save_results(rows, {**results, "seeds": [0]})
    with pytest.raises(ValueError, match=r"expected .* to be of seeds \[0, 1\], found \[0\]"):
        reproduce(FIGURE, workshop(tmp_path), lines=["OVQ*"])
    # Rows of another share of held-out text would stand among the new ones.
    other = dataclasses.replace(FIGURE, arguments="recall --held-out 0.3")
    with pytest.raises(ValueError, match=r"to be made with --held-out 0.3, found it left out"):
        reproduce(other, workshop(out), lines=["OVQ*"])
    assert begun == []


def test_a_trial_that_diverged_is_not_chosen():
    trials = [Trial(learning_rate=rate) for rate in (0.004, 0.008)]
    for found in ((math.nan, 0.5), (0.5, math.nan)):
        chosen = choose_trial(dict(zip(trials, found, strict=True)), usual=trials[0])
        assert chosen is trials[found.index(0.5)]


def test_lines_that_nobody_has_made_are_named(made, monkeypatch, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(made[0], copy)
    path = copy / "rows" / "recall.json"
    results = load_results(path)
    assert "Not made yet" not in results["note"]
    others = [row for row in results["rows"] if row["mixer"] != "full_attention"]
    save_results(path, {**results, "rows": others})
    run_here(monkeypatch)
    joined = reproduce(FIGURE, workshop(copy), lines=["OVQ*"])
    assert joined["note"].endswith(" Not made yet: full attention.")
    assert {row["line"] for row in joined["rows"]} == {row["line"] for row in others}
    # Nor need there be any before.
    path.unlink()
    first = reproduce(FIGURE, workshop(copy), lines=["OVQ*"])
    assert "updates" not in first
    assert first["environments"] == results["environments"]
    assert {field: first[field] for field in ("rows", "note", "panels")} == {
        field: joined[field] for field in ("rows", "note", "panels")
    }
    whole = reproduce(FIGURE, workshop(copy), lines=["full attention"])
    assert "Not made yet" not in whole["note"]
    assert len(whole["rows"]) == len(results["rows"])


def test_damage_is_noticed_and_repaired(made, monkeypatch, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    row = rows_of(out, "recall")[0]
    folder = out / "runs" / row["run"]
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    outcome = next((folder / "evaluations").iterdir())
    begun = run_here(monkeypatch)
    reproduce(FIGURE, workshop(out))
    # Of the sweep and of the figure it is one run.
    assert len(begun) <= 2
    assert fault(folder) is None
    assert weights.read_bytes() == whole
    assert outcome.is_file()
    assert rows_of(out, "recall")[0] == row


def test_damaged_outcomes_are_measured_again(made, monkeypatch, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    rows = rows_of(out, "recall")
    folders = [out / "runs" / run / "evaluations" for run in dict.fromkeys(row["run"] for row in rows)]
    paths = [min(folder.iterdir()) for folder in folders]
    damages = ["", "[]", "{}", "[" * 10**5]
    for path, damage in zip(paths, damages, strict=True):
        path.write_text(damage)
    begun = run_here(monkeypatch)
    reproduce(FIGURE, workshop(out))
    assert len(damages) <= len(begun) <= 2 * len(damages)
    assert all(path.read_text() != damage for path, damage in zip(paths, damages, strict=True))
    assert rows_of(out, "recall") == rows


def test_a_training_that_was_stopped_goes_on_from_its_checkpoint(monkeypatch, tmp_path):
    shop = workshop(tmp_path)
    job = shop.job(CONFIG, (), "run")

    class Stop(Exception):
        pass

    def stop_at(step):
        def update(self, done, *, note=""):
            if done == step:
                raise Stop

        return update

    from ovq.runtime.progress import Work

    with monkeypatch.context() as patch:
        patch.setattr(Work, "update", stop_at(5))
        with pytest.raises(Stop):
            job.do(shop.reporter)
    assert not job.is_trained()
    assert newest_checkpoint(job.folder, print).name == "checkpoint-4"
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Work, "update", lambda self, done, *, note="": steps.append(done))
        job.do(shop.reporter)
    assert steps == [5, 6]
    assert job.is_trained()
    assert not list(job.folder.glob("checkpoint-*"))
    # The weights are those of a run that was never stopped.
    other = workshop(tmp_path / "other").job(CONFIG, (), "run")
    other.do(shop.reporter)
    assert (job.folder / "model.safetensors").read_bytes() == (
        other.folder / "model.safetensors"
    ).read_bytes()


def test_a_folder_of_another_run_is_left_alone(made, tmp_path):
    out, _ = made
    row = rows_of(out, "recall")[0]
    config = RunConfig.load(out / "runs" / row["run"])
    other = config.override(["model.conv_size=2"])
    folder = tmp_path / "runs" / run_name(other)
    shutil.copytree(out / "runs" / row["run"], folder)
    job = RunJob(config=other, evaluations=(), root=tmp_path / "runs", label="")
    with pytest.raises(
        ValueError, match="expected the run of this configuration, found another one, trained by"
    ):
        job.is_trained()


def test_outcomes_of_other_evaluations_do_not_count(made, tmp_path):
    out, _ = made
    row = rows_of(out, "recall")[0]
    config = RunConfig.load(out / "runs" / row["run"])
    [*known] = workshop(out).job(config, FIGURE.lines[0].evaluations, "").evaluations
    evaluations = [*known, dataclasses.replace(known[0], num_examples=3)]
    job = RunJob(config=config, evaluations=tuple(evaluations), root=out / "runs", label="")
    *found, missing = job.outcomes()
    assert [each["length"] for each in found] == [24, 48, 64]
    assert missing is None
    # A default that an earlier version had otherwise does not show in the name of the file.
    folder = tmp_path / "runs" / job.folder.name
    shutil.copytree(job.folder, folder)
    path = folder / "evaluations" / f"{known[0].name}.json"
    outcome = json.loads(path.read_text())
    outcome["evaluation"]["task"]["query_share"] = 0.25
    path.write_text(json.dumps(outcome))
    assert dataclasses.replace(job, root=tmp_path / "runs").outcomes()[0] is None


def test_logits_and_slots_are_as_an_evaluation_asks(made, monkeypatch, tmp_path):
    out, seen, evaluate = tmp_path / "out", [], accuracy.evaluate
    shutil.copytree(made[0], out)
    row = next(row for row in rows_of(out, "recall") if row["mixer"] == "ovq")
    plain = dataclasses.replace(TINY.evaluation(TINY.task("recall").at_length(48)), seed=7)
    changes = ({"logn_length": 24}, {"state_dtype": "int8"}, {})
    asked = tuple(dataclasses.replace(plain, **each) for each in changes)

    def noted(model, *args, **kwargs):
        ovq = model.mixers()[1]
        seen.append((model.config.logn_length, ovq.logn_length, ovq.state_dtype))
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(accuracy, "evaluate", noted)
    config = RunConfig.load(out / "runs" / row["run"])
    job = RunJob(config=config, evaluations=asked, root=out / "runs", label="")
    job.do(workshop(out).reporter)
    assert seen == [(24, 24, "float32"), (None, None, "int8"), (None, None, "float32")]
    outcomes = job.outcomes()
    assert [outcome["logn_length"] for outcome in outcomes] == [24, None, None]
    assert [outcome["state_dtype"] for outcome in outcomes] == [None, "int8", None]
    assert outcomes[1]["state_bytes"] < outcomes[2]["state_bytes"] == outcomes[0]["state_bytes"]


def test_results_of_two_presets_do_not_mix(made, monkeypatch):
    out, _ = made
    with pytest.raises(ValueError, match=r"expected a folder of results of preset cpu, found .* of tiny"):
        reproduce(get_figure("dictionary", TINY), workshop(out, preset="cpu"))


def measure(seed):
    return [{"line": "a", "group": "", "seed": seed, "length": n, "error": n + seed} for n in (1, 2)]


def measure_without_a_package(seed):
    raise ImportError("expected scikit-learn, found none")


def test_what_is_not_trained_is_measured_a_seed_at_a_time_and_never_twice(monkeypatch, tmp_path):
    begun = run_here(monkeypatch)
    figure = Figure(
        name="errors",
        title="Errors",
        measure=measure,
        draw=lambda results, path: path.write_text(str(len(results["rows"]))),
        panels=(Panel(title="errors", y="error"),),
    )
    reproduce(figure, workshop(tmp_path, num_seeds=1))
    results = reproduce(figure, workshop(tmp_path, num_seeds=2))
    assert begun == ["errors: seed 0", "errors: seed 1"]
    [path] = tmp_path.rglob("errors-seed1.json")
    path.write_text(path.read_text()[:9])
    assert reproduce(figure, workshop(tmp_path, num_seeds=2))["rows"] == results["rows"]
    assert begun[2:] == ["errors: seed 1"]
    assert [(row["seed"], row["length"]) for row in results["rows"]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert (tmp_path / "figures" / "errors.png").read_text() == "4"
    text = write_report(tmp_path).read_text()
    assert '<td class="best">1.500<small>1.000 to 2.000</small></td>' in text
    assert "trained models" not in text
    path.write_text(path.read_text().replace('"commit":', '"commit": "0000dead", "then":'))
    said, shop = [], workshop(tmp_path, num_seeds=2)
    monkeypatch.setattr(shop.reporter, "say", said.append)
    reproduce(figure, shop)
    [line] = said
    assert "2 of 2 were finished before, 1 of them by " in line
    assert line.endswith(f"to make them anew, delete {path.parent}/errors-seed*.json")
    missing = dataclasses.replace(figure, name="other", measure=measure_without_a_package)
    with pytest.raises(ValueError, match="other: expected scikit-learn"):
        reproduce(missing, workshop(tmp_path))


def test_fidelity_is_measured_on_every_stream(monkeypatch, tmp_path):
    run_here(monkeypatch)
    small = functools.partial(fidelity_rows, lengths=[64, 128], num_slots=16, head_dim=8)
    monkeypatch.setattr(figures, "fidelity_rows", small)
    results = reproduce(get_figure("fidelity", TINY), workshop(tmp_path, num_seeds=1))
    for panel in results["panels"]:
        lines = points(results, panel)
        assert {"OVQ", "linear attention"} <= set(lines)
        assert [point.x for point in lines["OVQ"]] == [64, 128]
    assert [panel["group"] for panel in results["panels"]] == list(STREAMS)
    with Image.open(tmp_path / "figures" / "fidelity.png") as picture:
        picture.verify()


def test_regression_is_drawn_by_functions_and_by_points_seen(monkeypatch, tmp_path):
    run_here(monkeypatch)
    shop = workshop(tmp_path, num_seeds=1)
    figure = get_figure("regression", TINY)
    results = reproduce(undrawn(dataclasses.replace(figure, lines=figure.lines[:1])), shop)
    by_functions, by_points = results["panels"][:2]
    errors = {row["length"]: row["mean_error"] for row in results["rows"]}
    assert len(errors) == 2
    [line] = points(results, by_functions).values()
    assert [(point.x, point.mean) for point in line] == [(2, errors[24]), (4, errors[48])]
    [line] = points(results, by_points).values()
    longest = next(row for row in results["rows"] if row["length"] == by_points["at_length"] == 48)
    assert {point.x: point.mean for point in line} == longest["slice_errors"]
    assert list(longest["slice_errors"]) == ["seen 2-3"]

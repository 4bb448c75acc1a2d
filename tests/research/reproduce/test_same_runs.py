"""Rows of the same runs are found in the files of other figures, and no others."""

import pytest

from ovq_lab.figures.figures import get_figure
from ovq_lab.figures.partial import chosen_lines, earlier_results
from ovq_lab.figures.plan import run_name, with_seed, with_trial
from ovq_lab.figures.results import save_results
from ovq_lab.figures.same_runs import found_elsewhere
from tests.research.reproduce.common import TINY

SEEDS = (0, 1)
OURS = get_figure("rivals-recall", TINY)
OTHER = get_figure("recall", TINY)
SHARED = [
    *("full attention", "OVQ, 4 slots", "OVQ, nearest, 4 slots"),
    *("Gated DeltaNet", "Mamba2", "window and sinks"),
]


def save(folder, change=lambda row: row, **fields):
    """A file of `recall` as if it had been made, the second trial chosen for all."""
    trial = OTHER.trials[1]
    rows = [
        {
            "line": line.label,
            "group": line.group,
            "mixer": line.config.mixer,
            "accuracy": seed + len(line.label) / 100,
            "merge": (evaluation.merge or "existing") if line.config.mixer == "ovq" else None,
            "num_slots": (evaluation.num_slots or 4) if line.config.mixer == "ovq" else None,
            **evaluation.row_fields(),
            "seed": seed,
            "run": run_name(with_seed(with_trial(line.config, trial), seed)),
        }
        # The last lines first: those of more slots, which are not ours.
        for line in reversed(OTHER.lines)
        for seed in SEEDS
        for evaluation in line.evaluations
    ]
    sweep = [
        {"line": line.label, "mixer": line.config.mixer, "accuracies": {}, "chosen": trial.label}
        for line in OTHER.lines
    ]
    results = {
        "figure": "recall",
        "title": "",
        "preset": "tiny",
        "command": "ovq reproduce recall",
        "seeds": list(SEEDS),
        "panels": [],
        "sweep": sweep,
        "environments": ["here"],
        "updates": [{"lines": [], "command": "", "environments": ["there"]}],
        "rows": [row for row in map(change, rows) if row],
    }
    save_results(folder / "recall.json", results | fields)


def test_rows_of_the_same_runs_are_found(tmp_path):
    save(tmp_path)
    found = found_elsewhere(tmp_path, OURS, OURS.lines, SEEDS)
    assert list(dict.fromkeys(row["line"] for row in found["rows"])) == SHARED
    # Two lengths, two seeds; the third length of the other figure is not one of ours.
    assert len(found["rows"]) == len(SHARED) * 4
    for row in found["rows"]:
        assert row["accuracy"] == row["seed"] + len(row["line"]) / 100
        assert row["task"]["length"] in TINY.near_lengths("recall")
    assert {row["merge"] for row in found["rows"] if "nearest" in row["line"]} == {"nearest"}
    assert [entry["line"] for entry in found["sweep"]] == [name for name in SHARED if "nearest" not in name]
    assert (found["command"], found["environments"]) == ("ovq reproduce recall", ["here", "there"])


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (lambda row: None if row["seed"] else row, {}),
        (lambda row: row | {"num_examples": row["num_examples"] + 1}, {}),
        (lambda row: row | {"run": row["run"] + "0"}, {}),
        (lambda row: row | {"logn_length": 16}, {}),
        (lambda row: row | {"task": row["task"] | {"pair_share": 0.3}}, {}),
        # Without a sweep, the settings were those that somebody had, not the best.
        (lambda row: row, {"sweep": []}),
    ],
    ids=["a seed is missing", "other examples", "another run", "scaled logits", "another task", "no sweep"],
)
def test_what_is_not_the_same_is_not_taken(tmp_path, change, fields):
    save(tmp_path, change, **fields)
    assert found_elsewhere(tmp_path, OURS, OURS.lines, SEEDS)["rows"] == []


def test_only_what_nobody_has_need_be_made(tmp_path):
    save(tmp_path)
    part = chosen_lines(OURS, ["KVM", "Raven", "KDA", "MesaNet", "OVQ, * gate*"])
    earlier = earlier_results(tmp_path / "rivals-recall.json", OURS, part, SEEDS)
    assert {row["line"] for row in earlier["rows"]} == {*SHARED}
    # The dictionary's rule and size count, not only the run.
    save(tmp_path, lambda row: row | {"merge": row["merge"] and "existing"})
    earlier = earlier_results(tmp_path / "rivals-recall.json", OURS, part, SEEDS)
    assert "OVQ, nearest, 4 slots" not in {row["line"] for row in earlier["rows"]}

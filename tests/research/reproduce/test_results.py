"""Files of results: what is read is what was written, and each thing is there once."""

import copy
import json
from pathlib import Path

import pytest

from ovq_lab.figures.results import load_results, save_results

COMMITTED = Path(__file__).parents[3] / "docs" / "results"
HEADER = {
    "figure": "recall",
    "title": "Recall",
    "panels": [{"title": "accuracy", "x": "length", "y": "accuracy", "group": "", "at_length": None}],
    "seeds": [0, 1],
    "command": "ovq reproduce recall",
    "environments": [{"torch": "2.x"}],
    "sweep": [],
}


def row(seed, length, **fields):
    return {
        "line": "OVQ, 64 slots",
        "group": "",
        "mixer": "ovq",
        "length": length,
        "accuracy": 0.1 + 0.2,
        "slices": {f"distance {length}": 1 / 3, "all": 1.0},
        "slice_errors": {},
        "task": {"name": "recall", "length": length, "num_pairs": None},
        "num_examples": 16,
        "seed": seed,
        "learning_rate": 0.008,
        "weight_decay": 0.5,
        "train_length": 256,
        "train_seconds": None if seed else 12.5,
        "num_parameters": 12345,
        "run": f"recall-ovq-seed{seed}",
        **fields,
    }


ROWS = [row(seed, length) for seed in (0, 1) for length in (256, 4096)]
MEASURED = [{"line": "OVQ", "group": "text", "seed": 0, "length": n, "error": 1 / n} for n in (8, 16)]


def changed(number, **fields):
    """The rows with fields of one changed, `None` for taken away."""
    rows = copy.deepcopy(ROWS)
    rows[number] |= fields
    rows[number] = {
        name: value for name, value in rows[number].items() if name not in fields or value is not None
    }
    return rows


# Rows that one file should not have: nothing of them may be lost.
UNLIKE = {
    "settings that change within a run": changed(1, learning_rate=0.004),
    "numbers of another type": changed(1, weight_decay=True, num_examples=16.0),
    "a field of the run missing": changed(3, mixer=None),
    "a field missing": changed(2, accuracy=None),
    "a row twice": [ROWS[0], *ROWS],
    "lines by turns": [ROWS[0], ROWS[2] | {"line": "VQ"}, *ROWS[1:]],
    "numbers that are no numbers": changed(0, accuracy=float("inf"), num_slots="64"),
    "runs and what was measured without": [*ROWS, *MEASURED],
}


@pytest.mark.parametrize(
    "rows",
    [ROWS, ROWS[:1], MEASURED, [], *UNLIKE.values()],
    ids=["runs", "one", "measured", "none", *UNLIKE],
)
def test_what_is_read_is_what_was_written(tmp_path, rows):
    path = tmp_path / "a.json"
    save_results(path, HEADER | {"rows": rows})
    found = load_results(path)
    # As text, for which 1, 1.0 and True differ.
    assert json.dumps(found, sort_keys=True) == json.dumps(HEADER | {"rows": rows}, sort_keys=True)
    # The order of parts is that of pictures and tables.
    assert [list(each.get("slices", ())) for each in found["rows"]] == [
        list(each.get("slices", ())) for each in rows
    ]


def test_what_belongs_to_a_line_a_run_or_an_evaluation_is_there_once_and_a_row_is_a_line(tmp_path):
    path = tmp_path / "a.json"
    # Two panels show the same rows.
    save_results(path, HEADER | {"rows": ROWS + [each | {"group": "other"} for each in ROWS]})
    text = path.read_text()
    assert text.count("12345") == text.count('"task.num_pairs"') == 1
    assert text.count('"distance 4096"') == text.count('"distance 256"') == 1
    assert text.count("recall-ovq-seed0") == 1
    stored = json.loads(text)
    assert stored["shared"]["task.name"] == "recall"
    assert stored["runs"] == [
        ["run", "seed", "train_seconds"],
        ["recall-ovq-seed0", 0, 12.5],
        ["recall-ovq-seed1", 1, None],
    ]
    assert stored["evaluations"] == [
        ["length", "slices.names", "task.length"],
        [256, ["distance 256", "all"], 256],
        [4096, ["distance 4096", "all"], 4096],
    ]
    assert stored["rows"] == [["run", "evaluation"], [1, 1], [1, 2], [2, 1], [2, 2]]
    assert stored["lines"] == [
        ["line", "group", "first", "last"],
        ["OVQ, 64 slots", "", 1, 4],
        ["OVQ, 64 slots", "other", 1, 4],
    ]
    assert "\n  [2,1],\n" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop("title"), r"'title'"),
        (lambda stored: stored["rows"][1].pop(), "zip"),
        (lambda stored: stored["runs"].clear(), "unpack"),
        (lambda stored: stored["evaluations"].pop(), "index out of range"),
        (lambda stored: stored["lines"][1].append(5), "zip"),
        (lambda stored: stored.update(rows=3), "int"),
    ],
    ids=["title", "cells", "runs", "evaluations", "lines", "rows"],
)
def test_a_broken_file_is_named(tmp_path, change, message):
    path = tmp_path / "a.json"
    save_results(path, HEADER | {"rows": ROWS})
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"a\.json: expected the rows of a figure, found .*{message}"):
        load_results(path)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(COMMITTED.glob("*.json")) if '"panels"' in path.read_text()],
    ids=lambda path: path.stem,
)
def test_committed_results_are_as_the_code_writes_them(path, tmp_path):
    save_results(tmp_path / "again.json", load_results(path))
    assert (tmp_path / "again.json").read_text() == path.read_text()

"""Tables of documents: each cell is what the results say, and what cannot be said is refused by name."""

import json
import math

import pytest

from ovq_lab.figures.results import save_results
from ovq_lab.figures.tables import make_table, update_tables, with_tables

ACCURACIES = {
    ("full attention", 256): (1.0, 0.99),
    ("full attention", 1024): (0.9, 0.8),
    ("OVQ", 256): (0.5, 0.5),
    ("OVQ", 1024): (0.4501, 0.35),
}
ROWS = [
    {
        "line": line,
        "group": group,
        "run": f"{line}-{seed}",
        "seed": seed,
        "length": length,
        "learning_rate": 0.008,
        "weight_decay": 0.0,
        "accuracy": accuracy,
        "state_bytes": length * (2048 if line == "OVQ" else 8192),
        "task": {"num_functions": length // 8},
        # Means over positions 0 to 1k, 1k to 2k and 2k to 4k.
        "position_losses": {"1024": 3.0 - seed, "2048": 2.0, "4096": 1.0 if line == "OVQ" else 2.0},
    }
    for (line, length), accuracies in ACCURACIES.items()
    # A row stands in the file once for each panel that shows it.
    for group in ("loss", "gap")
    for seed, accuracy in enumerate(accuracies)
]


@pytest.fixture
def described(tmp_path):
    """A way to describe one table, whose results are in a folder beside it."""
    (tmp_path / "results").mkdir()
    header = dict.fromkeys(("figure", "title", "panels", "seeds", "command", "environments"), "")
    save_results(tmp_path / "results" / "recall.json", {**header, "rows": ROWS})
    other = [{"line": "full attention", "length": 1024, "seed": seed, "accuracy": 0.5} for seed in (0, 1)]
    (tmp_path / "results" / "other.json").write_text(json.dumps(other))

    def describe(*columns, rows=("full attention", "OVQ")):
        table = {"file": "results/recall.json", "head": "mixer", "rows": rows, "columns": columns}
        path = tmp_path / "tables.json"
        path.write_text(json.dumps({"recall": table}))
        return path

    return describe


def cells(path):
    """The cells of each line, without the one of its label."""
    return [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in make_table(path, "recall").splitlines()[2:]
    ]


@pytest.mark.parametrize("seeds", [(0.5, math.nan), (math.nan, 0.5)])
def test_a_run_that_diverged_is_shown_as_such(seeds, described):
    path = described({"head": "", "value": "accuracy", "length": 256, "spread": 0.0})
    rows = [row | {"accuracy": seeds[row["seed"]]} for row in ROWS]
    (path.parent / "results" / "recall.json").write_text(json.dumps({"rows": rows}))
    assert cells(path) == [["nan"], ["nan"]]


def test_a_table_is_what_it_is_described_to_be(described):
    path = described(
        {"head": "rate, decay", "value": ["learning_rate", "weight_decay"], "length": 256},
        {"over": "length", "values": [256, 1024], "value": "accuracy", "spread": 0.05},
        {"head": "bytes", "value": "state_bytes", "length": 1024, "form": "commas"},
        rows=[{"label": "**all**", "line": "full attention"}, "OVQ"],
    )
    assert make_table(path, "recall") == (
        "| mixer | rate, decay | 256 | 1k | bytes |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| **all** | 0.008, 0.000 | 0.995 | 0.850 (0.800 to 0.900) | 8,388,608 |\n"
        "| OVQ | 0.008, 0.000 | 0.500 | 0.400 (0.350 to 0.450) | 2,097,152 |\n"
    )


def test_seeds_that_have_not_learned_a_task_are_not_averaged_into_those_that_have(described):
    at_256 = {"length": 256, "at_least": 0.995}
    path = described(
        {"over": "length", "values": [256, 1024], "value": "accuracy", "learned": at_256, "spread": 0.05},
        {"head": "said", "value": "accuracy", "length": 1024, "learned": at_256, "says_learned": True},
        {"head": "error", "value": "accuracy", "length": 1024, "learned": {"length": 256, "at_most": 0.995}},
    )
    assert cells(path) == [
        ["1.000", "0.900", "0.900, 1 of 2 seeds", "0.800"],
        ["0.500", "0.400 (0.350 to 0.450)", "0.400, not learned", "0.400"],
    ]


FULL = {"line": "full attention"}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        # The bounds are not told where they would read alike, or differ by less than is asked.
        ({"value": "accuracy", "length": 256, "spread": 0.0}, ["0.995 (0.990 to 1.000)", "0.500"]),
        ({"value": "accuracy", "length": 256, "spread": 0.02}, ["0.995", "0.500"]),
        ({"value": "accuracy", "length": 1024, "digits": 1, "unit": "x"}, ["0.9x", "0.4x"]),
        ({"value": "accuracy", "length": 1024, "form": "seeds"}, ["0.900, 0.800", "0.450, 0.350"]),
        ({"value": "accuracy", "length": 1024, "seed": 1}, ["0.800", "0.350"]),
        ({"value": "accuracy", "length": 1024, "seed": [0]}, ["0.900", "0.450"]),
        (
            {"value": "accuracy", "task.num_functions": 128, "each": ["seed", [1, 0]]},
            ["0.800, 0.900", "0.350, 0.450"],
        ),
        ({"value": "state_bytes", "length": 256, "form": "MiB"}, ["2.0 MiB", "0.5 MiB"]),
        ({"value": "position_losses", "positions": [1024, 4096], "length": 256}, ["2.000", "1.333"]),
        ({"value": "position_losses.4096", "length": 256}, ["2.000", "1.000"]),
        # Seed by seed: (0.5 + 0.5 / 0.99) / 2 and not 0.5 / 0.995.
        (
            {"value": "accuracy", "length": 256, "relative_to": FULL, "digits": 2, "unit": " %"},
            ["100.00 %", "50.25 %"],
        ),
        (
            {"value": "accuracy", "length": 256, "relative_to": FULL, "above": True, "digits": 2},
            ["", "-49.75"],
        ),
        # Another file's, at the length of this one.
        (
            {
                "value": "accuracy",
                "length": 1024,
                "relative_to": {"file": "results/other.json", "by": ["length"], "line": "full attention"},
                "digits": 0,
            },
            ["170", "80"],
        ),
        ({"value": "accuracy", "file": "results/other.json", "line": "full attention"}, ["0.500", "0.500"]),
    ],
)
def test_what_a_cell_tells(described, column, expected):
    assert cells(described({"head": "a", **column})) == [[each] for each in expected]


def test_what_is_rounded_to_nothing_has_no_sign(described):
    other = {"file": "results/close.json", "line": "OVQ"}
    column = {
        "head": "a",
        "value": "accuracy",
        "length": 256,
        "relative_to": other,
        "above": True,
        "digits": 1,
    }
    path = described(column, rows=["OVQ"])
    rows = [{"line": "OVQ", "length": 256, "seed": seed, "accuracy": 0.5001} for seed in (0, 1)]
    (path.parent / "results" / "close.json").write_text(json.dumps(rows))
    assert cells(path) == [["0.0"]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([{"head": "a", "value": "accuracy"}], "expected one accuracy per seed of .*, found two that differ"),
        ([{"head": "a", "value": "accuracy", "length": 5}], r"expected rows of .*'length': 5.*, found none"),
        ([{"head": "a", "value": "acuracy", "length": 256}], "expected 'acuracy', found none"),
        ([{"head": "a", "value": "accuracy", "digitz": 2}], "expected 'digitz', found none"),
        ([{"value": "accuracy", "length": 256}], "head"),
        ([{"head": "a", "value": "accuracy", "form": "MB"}], "form: expected one of number, .*found 'MB'"),
        (
            [{"head": "a", "value": "accuracy", "length": 256, "relative_to": {"seed": 1}}],
            "relative_to: expected rows of .* for each seed, found none of {0}",
        ),
        (
            [{"head": "a", "value": "position_losses", "positions": [0, 3000], "length": 256}],
            "positions: expected two of 0, 1024, 2048, 4096, found 0, 3000",
        ),
    ],
)
def test_what_cannot_be_told_is_named(described, columns, message):
    path = described(*columns).with_name("a.md")
    path.write_text("<!-- table: tables.json recall -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=rf"a\.md: table recall of .*tables\.json: .*{message}"):
        with_tables(path)


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n",
        "<!-- table: tables.json recall -->\n| a |\n",
        "<!-- table: tables.json recall -->\n| a |\n<!-- table: tables.json recall -->\n<!-- end -->\n",
        "<!-- table: tables.json recall -->\n<!-- end -->\n<!-- end -->\n",
        "<!-- table: tables.json -->\n<!-- end -->\n",
    ],
    ids=["none", "no end", "two beginnings", "two ends", "no name"],
)
def test_marks_that_do_not_match_change_nothing(described, text):
    good = {"head": "a", "value": "accuracy", "length": 256}
    path = described(good).with_name("a.md")
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.md: expected tables, each between .*, found"):
        update_tables([path])
    assert path.read_text() == text


def test_no_file_is_written_where_one_cannot_be(described):
    path = described({"head": "a", "value": "accuracy", "length": 256})
    good, bad = path.with_name("good.md"), path.with_name("bad.md")
    for file, name in ((good, "recall"), (bad, "recal")):
        file.write_text(f"<!-- table: tables.json {name} -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"bad\.md: table recal of .* expected one of recall, found 'recal'"):
        update_tables([good, bad])
    assert "|" not in good.read_text()
    assert update_tables([good]) == [good]
    assert update_tables([good]) == []

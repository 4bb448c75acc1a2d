"""Redrawing pictures from the JSON files of the commands, by the same drawing functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ovq.runtime.files import read_json
from ovq_lab.bench.show import save_figures as save_bench
from ovq_lab.eval.rows import ResultRow
from ovq_lab.figures.figures import FIGURES, TEXT_FIGURES
from ovq_lab.figures.presets import get_preset
from ovq_lab.figures.results import load_results
from ovq_lab.plots.draw import save_demo_figures, save_figure


def redraw(folder: Path) -> list[Path]:
    """Redraw the pictures of all JSON files in a folder; returns their paths.

    Files of `ovq reproduce` become `NAME.png`, those of `ovq demo` `NAME_accuracy.png` and `NAME_state.png`,
    all of `ovq bench` together one `bench.png`. Other files are ignored. Pictures are written beside the
    files, or into `figures/` for files in `rows/`, as by `ovq reproduce`.
    """
    rows = folder / "rows"
    source, target = (rows, folder / "figures") if rows.is_dir() else (folder, folder)
    drawn, reports, path = [], [], source
    try:
        for path in sorted(source.glob("*.json")):
            found = read_json(path)
            fields = found if isinstance(found, dict) else {}
            if "figure" in fields:
                target.mkdir(exist_ok=True)
                drawn.append(target / f"{path.stem}.png")
                results = load_results(path)
                _drawing(results)(results, drawn[-1])
            elif "matrix_rate" in fields:
                reports.append({name: fields[name] for name in ("suite", "rows")} | fields)
            elif "train_length" in fields:
                measured = [ResultRow(**row) for row in fields["rows"]]
                length = fields["train_length"]
                drawn += save_demo_figures(measured, target, train_length=length, prefix=f"{path.stem}_")
        if reports:
            path = source
            drawn += save_bench(_joined(reports), target)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected results of ovq, found something else ({error!r})") from error
    if not drawn:
        raise ValueError(f"--draw: expected JSON files of results in {folder}, found none")
    return drawn


def _drawing(results: dict[str, Any]) -> Callable[[dict[str, Any], Path], None]:
    """The drawing function for a file; the names of figures of another corpus include the corpus."""
    found = results["figure"]
    of_corpus = (name for name in TEXT_FIGURES if found.startswith(f"{name}-"))
    # The longest name that fits: rivals-lm-mamba2 is a figure, not rivals-lm of a corpus.
    name = found if found in FIGURES else max(of_corpus, key=len, default=None)
    # Figures that only earlier versions had are drawn by the default function.
    return save_figure if name is None else FIGURES[name](get_preset(results["preset"])).draw


def _joined(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the reports of several runs of `ovq bench` into one."""
    dtypes = dict.fromkeys(dtype for report in reports for dtype in report["suite"]["dtypes"])
    environments = [report.get("environment", {}) for report in reports]
    is_one = len({environment.get("processor") for environment in environments}) == 1
    return {
        "suite": {"dtypes": list(dtypes)},
        "rows": [row for report in reports for row in report["rows"]],
        "environment": environments[0] if is_one else {},
    }

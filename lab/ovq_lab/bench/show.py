"""The report of `ovq bench`: tables in the terminal and two figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.table import Table

from ovq.runtime.units import format_bytes
from ovq_lab.eval.rows import short_number
from ovq_lab.plots.draw import Panel, format_seconds, save_figure

TITLES = {
    "forward": "Prefill (forward)",
    "forward_backward": "Training (forward + backward)",
    "decode": "Decode (one token after T)",
    "memory": "Peak memory of forward + backward, inputs and gradients included",
    "model_training": "Training step of a model of T tokens",
    "model_memory": "Peak memory of it, weights, gradients and optimizer included",
    "model_generate": "generate(), one token after T",
    "converted_read": "Reading T tokens, time per token",
    "converted_write": "Writing one token after T",
    "converted_memory": "Peak memory of the process after T, libraries not included",
}
# Workloads have the style of the corresponding mixer.
_MIXERS = {
    **dict.fromkeys(("sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"), "full_attention"),
    **dict.fromkeys(("window", "flex_window"), "sliding_attention"),
    **dict.fromkeys(("llama", "llama_cpp", "transformers"), "full_attention"),
}


def tables(report: dict) -> list[Table]:
    """One table for each part and dtype: one column per length, one row per mixer."""
    made = []
    for what, title in TITLES.items():
        for dtype in report["suite"]["dtypes"]:
            rows = [r for r in report["rows"] if r["what"] == what and r["dtype"] == dtype]
            if rows:
                made.append(_table(f"{title}, {dtype}", rows))
    return made


def _table(title: str, rows: list[dict]) -> Table:
    lengths = sorted({r["length"] for r in rows})
    table = Table(title=title)
    table.add_column("")
    for length in lengths:
        table.add_column(short_number(length), justify="right")
    for label in dict.fromkeys(r["label"] for r in rows):
        by_length = {r["length"]: r for r in rows if r["label"] == label}
        table.add_row(label, *(_cell(by_length[t]) if t in by_length else "-" for t in lengths))
    return table


def _cell(row: dict) -> str:
    if "peak_bytes" in row:
        return format_bytes(row["peak_bytes"])
    # Marked if the trace does not show the intended kernels.
    parts = [format_seconds(row["seconds"]) + ("" if row.get("is_intended", True) else "!")]
    if row["what"].startswith("model_"):
        parts.append(f"{row['tokens_per_second']:.0f} tokens/s")
    if row["mixer"] != "sdpa" and "speedup" in row:
        parts.append(f"{row['speedup']:.2f}x")
    if "roofline_share" in row:
        parts.append(f"{row['roofline_share']:.0%}")
    return "  ".join(parts)


def sentences(report: dict) -> list[str]:
    """Sentences on the results: lengths from which OVQ is faster than exact attention, and growth of memory
    and decoding time."""
    said = []
    for found in report["crossover"]:
        part = f"{TITLES[found['what']]}, {found['dtype']}, {found['label']}"
        if found["length"] is None:
            said.append(f"{part}: not faster than exact attention at any length measured.")
        else:
            said.append(
                f"{part}: faster than exact attention from {short_number(found['length'])} tokens on."
            )
    for row in report["rows"]:
        if row["what"] == "stream":
            share, length = row["growth_bytes"] / row["resident_bytes"], short_number(row["length"])
            said.append(
                f"Streaming {length} tokens, {row['label']}: memory grew by {share:.1%} "
                f"after the first 64k; the state is {format_bytes(row['state_bytes'])}."
            )
        if not row.get("is_intended", True):
            said.append(
                f"! {row['what']} {row['dtype']} {short_number(row['length'])}, {row['label']}: not the "
                f"intended kernels, but {', '.join(row['kernels'])}."
            )
    for found in report.get("left_out", ()):
        said.append(
            f"Left out: {found['what']} {found['dtype']} {short_number(found['length'])}, {found['label']} "
            f"({found['reason']})."
        )
    return said


def save_figures(report: dict, folder: Path) -> list[Path]:
    """Draw time and memory by length into `bench.png`, one panel per part and dtype."""
    shown = [row for row in report["rows"] if row["what"] in TITLES]
    if not shown:
        return []
    panels = [
        Panel(
            title=f"{TITLES[what].split(' of ')[0]}, {dtype}",
            y="peak_bytes" if what.endswith("memory") else "seconds",
            group=f"{what}, {dtype}",
        )
        for what in TITLES
        for dtype in report["suite"]["dtypes"]
        if any((row["what"], row["dtype"]) == (what, dtype) for row in shown)
    ]
    kind = panels[0].group.partition(",")[0].partition("_")[0]
    what = {"model": "training and generation", "converted": "a pretrained model"}
    rows = [
        row
        | {"line": row["label"], "group": f"{row['what']}, {row['dtype']}", "seed": 0}
        | {"mixer": _MIXERS.get(row["mixer"], row["mixer"])}
        for row in shown
    ]
    results = {
        "title": f"Time and memory of {what.get(kind, 'one attention read')}{_processor(report)}",
        "panels": list(map(dataclasses.asdict, panels)),
        "rows": rows,
    }
    path = folder / "bench.png"
    save_figure(results, path)
    return [path]


def _processor(report: dict) -> str:
    """The processor in brackets; empty if the report does not name it."""
    environment = report.get("environment", {})
    names = [environment.get("processor"), *environment.get("features", ())]
    return f" ({', '.join(filter(None, names))})" if any(names) else ""

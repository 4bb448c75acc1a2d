"""Sentences of the results say what was measured, where no table made from it stands beside them."""

import json
from pathlib import Path
from statistics import fmean

from ovq_lab.figures.results import load_results

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def words_of(page):
    """A page on one line, because a sentence may break anywhere."""
    return " ".join((RESULTS / page).read_text().split())


def means_of(figure, value):
    """The mean of a value over seeds, by line, length and stream."""
    found: dict[tuple[str, int, str | None], list[float]] = {}
    for row in load_results(RESULTS / f"{figure}.json")["rows"]:
        found.setdefault((row["line"], row["length"], row.get("stream")), []).append(row[value])
    return {key: fmean(values) for key, values in found.items()}


def far_losses(partner):
    """The mean loss from 4k to 64k over three seeds, by line, beside a partner."""
    losses: dict[str, list[float]] = {}
    for row in load_results(RESULTS / f"rivals-lm-{partner}.json")["rows"]:
        # Octaves of positions, by their ends.
        octaves = [row["position_losses"][str(end)] * end for end in (8192, 16384, 32768, 65536)]
        losses.setdefault(row["line"], []).append(sum(octaves) / (2 * (65536 - 4096)))
    assert {len(values) for values in losses.values()} == {3}
    return {line: fmean(values) for line, values in losses.items()}


def test_mixers_with_a_lower_loss_on_text_are_those_that_the_overview_names():
    means = far_losses("mamba2")
    rivals = {line: loss for line, loss in means.items() if not line.startswith(("OVQ", "full attention"))}
    ours, gated = means["OVQ, 512 slots"], means["OVQ, forget and output gates, nearest, 512 slots"]
    missed = {line: 100 * (ours / loss - 1) for line, loss in sorted(rivals.items()) if loss < ours}
    assert list(missed) == ["Gated DeltaNet", "KDA", "Mamba2", "MesaNet", "window and sinks"]
    assert [line for line, loss in rivals.items() if loss < gated] == ["Gated DeltaNet"]
    page = words_of("index.md")
    assert f"missed against Gated DeltaNet by {missed['Gated DeltaNet']:.1f} %" in page
    others = "{Mamba2:.1f}, {KDA:.1f} and {MesaNet:.1f} % (gated: met)".format(**missed)
    assert f"Mamba2 alone, KDA and MesaNet by {others}" in page
    assert f"window and sinks by {missed['window and sinks']:.2f} %" in page


def test_losses_beside_partners_are_those_of_the_page():
    mamba2, deltanet, kda = map(far_losses, ("mamba2", "gated-deltanet", "kda"))
    page, ours = words_of("language.md"), "OVQ, forget and output gates, nearest, 512 slots"
    assert f"| OVQ | {mamba2[ours]:.4f} | {deltanet[ours]:.4f} | {kda[ours]:.4f} |" in page
    name = "Gated DeltaNet"
    assert f"| {name} | {mamba2[name]:.4f} | {deltanet[name]:.4f}, alone | {kda[name]:.4f} |" in page
    assert f"| KDA | {mamba2['KDA']:.4f} | | {kda['KDA']:.4f}, alone |" in page
    more = [f"{100 * (each[ours] / mamba2[ours] - 1):.1f}" for each in (deltanet, kda)]
    assert f"best partner tried**, for OVQ by {more[0]} and {more[1]} %" in page
    (lower,) = {f"{100 * (1 - each[name] / each[ours]):.1f}" for each in (deltanet, kda)}
    assert f"Beside both others Gated DeltaNet has a loss {lower} % lower than OVQ's" in page


def test_errors_of_memories_without_training_grow_as_the_page_says():
    errors = means_of("fidelity", "error")
    growth = {
        (line, stream): error / errors[line, 4096, stream] - 1
        for (line, length, stream), error in errors.items()
        if line.startswith("OVQ") and length == 65536
    }
    assert max(rise for (_, stream), rise in growth.items() if "cluster" in stream) <= 0
    most = f"{100 * max(growth.values()):.0f} %"
    assert f"do not rise on clusters, and by at most {most} elsewhere" in words_of("memory.md")


def test_scaling_changes_as_little_with_few_slots_as_the_page_says():
    def changes(figure, value):
        means = means_of(figure, value)
        return [
            means[f"{line}, log-n", length, None] - mean
            for (line, length, _), mean in means.items()
            if line.endswith("64 slots")
        ]

    tasks = ("logn-recall", "logn-positional", "logn-mqar")
    assert max(abs(change) for task in tasks for change in changes(task, "accuracy")) <= 0.03
    rise = max(changes("logn-regression", "mean_error"))
    assert f"by more than 0.03; on regression errors rise by up to {rise:.2f}" in words_of("length.md")


def test_results_do_not_call_lines_missing_that_they_have():
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        if "figure" not in found:
            continue
        results = load_results(path)
        _, _, missing = results.get("note", "").partition("Not made yet: ")
        assert not [line for line in {row["line"] for row in results["rows"]} if line in missing], path.name


def test_what_256_rows_recover_is_what_the_pages_say():
    names = {"prose": "Hamlet", "code": "argparse.py"}
    rows = [
        row | {"text": names.get(row["text"], row["text"])}
        for figure in ("convert_curve", "convert_use", "convert_nearest")
        for row in json.loads((RESULTS / f"{figure}.json").read_text())["rows"]
        if (row["what"], row.get("length")) == ("loss", 3072) and "variant" not in row
    ]
    exact = {row["text"]: row["loss"] for row in rows if row["method"] == "full"}
    window = {row["text"]: row["loss"] for row in rows if (row["method"], row.get("rows")) == ("window", 292)}
    assert len(exact) == len(window) == 6

    def lowest_to_highest(is_code, rules):
        shares = [
            (window[row["text"]] - row["loss"]) / (window[row["text"]] - exact[row["text"]])
            for row in rows
            if row["method"].startswith(("fitted", "ovq convert"))
            and round(row["rows"]) == 256
            and row["text"].endswith(".py") == is_code
            and row.get("merge", "ward") in rules
        ]
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f}"

    prose, code = (lowest_to_highest(is_code, ("ward", "nearest")) for is_code in (False, True))
    today = [lowest_to_highest(is_code, ("nearest",)) for is_code in (False, True)]
    page = words_of("convert.md")
    shares = f"{today[0]} % (prose) and {today[1]} % (code)"
    assert f"recovers {shares}" in page
    assert f"({prose} and {code} % with Ward's rule)" in page
    assert shares in words_of("index.md")
    ends = sorted(int(end) for shares in today for end in shares.split(" to "))
    readme = (RESULTS / "../../README.md").read_text()
    assert f"256 rows recover {ends[0]} to {ends[-1]} % of" in " ".join(readme.split())


def test_what_presets_recover_against_float32_is_what_the_page_says():
    def losses(figure, **fields):
        rows = json.loads((RESULTS / f"{figure}.json").read_text())["rows"]
        names = {"prose": "Hamlet", "code": "argparse.py"}
        return {
            names.get(row["text"], row["text"]): row["loss"]
            for row in rows
            if row["what"] == "loss" and row["length"] == 3072 and fields.items() <= row.items()
        }

    exact = losses("convert_presets", method="full attention", dtype="float32")
    said = []
    for num_rows, window in ((256, 292), (768, 804)):
        converted = losses("convert_presets", method="preset", rows=float(num_rows))
        windows = losses("convert_curve", method="window", rows=window)
        windows |= losses("convert_nearest", method="window", rows=window)
        assert converted.keys() == windows.keys() == exact.keys()
        shares = [100 * (windows[x] - converted[x]) / (windows[x] - exact[x]) for x in exact]
        said.append(f"{num_rows} rows recover {min(shares):.0f} to {max(shares):.0f} %")
    first, second = said[0], said[1].replace("recover ", "")
    assert f"against full attention in float32, {first}, {second}" in words_of("convert.md")

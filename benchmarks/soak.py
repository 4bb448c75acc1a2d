"""A long run of decode steps, checked against a recount in float64: `python benchmarks/soak.py`.

Two rows take one token per step. At the end of every chunk, a recount adds each token to its slot in float64.
At the end of the run, counts must be equal, means must be within the bound that `docs/method/guarantees.md`
derives for float32 sums, and memory must not have grown since the dictionary was full. Otherwise the exit
code is 1.

The op does not return the slots of tokens, but the values reveal them: their last channels are a one-hot code
of the token's position in its chunk, and sums of ones and zeros are exact.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from ovq.ops import OVQState, ovq_attention
from ovq.runtime.progress import Reporter
from ovq_lab.bench.pretrained_peer import resident

ROWS, DIM, CHUNK, SLOTS = 2, 8, 16, 32
DRIFT_BOUND = 2.0**-22
"""Bound of the error of a mean of c tokens, in units of sqrt(c) times the root mean square of the tokens."""
MEMORY_BOUND = 4 * 2**20
"""Tolerated growth of resident memory in bytes; what allocators hold back varies by about as much."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of a soak.

    Attributes:
        num_steps: decode steps.
        seconds: their time, including the recount.
        resident_bytes: resident memory at the end.
        growth_bytes: growth of resident memory since a tenth of the run.
        are_counts_exact: whether counts, tokens seen and tokens merged equal the recount.
        drift: largest error of a mean, in units of `DRIFT_BOUND * sqrt(count) * rms`; at most 1 to pass.
        largest_error: the largest error itself.
        largest_count: tokens in the fullest slot.
    """

    num_steps: int
    seconds: float
    resident_bytes: int
    growth_bytes: int
    are_counts_exact: bool
    drift: float
    largest_error: float
    largest_count: int

    @property
    def is_passed(self) -> bool:
        """Whether all checks hold."""
        return self.are_counts_exact and self.drift <= 1 and self.growth_bytes <= MEMORY_BOUND


class Recount:
    """Sums in float64, and counts, from the tokens and the slots they merged into."""

    def __init__(self) -> None:
        self.sums = np.zeros((ROWS, SLOTS, 2 * DIM))
        self.squares = np.zeros((ROWS, SLOTS, 2 * DIM))
        self.count = np.zeros((ROWS, SLOTS), dtype=np.int64)
        self._places = np.zeros((ROWS, SLOTS, CHUNK))

    def add(self, tokens: np.ndarray, state: OVQState) -> None:
        """Count the tokens of a chunk, `[CHUNK, ROWS, 2 DIM]`, that `state` has just merged."""
        places = np.zeros_like(self._places)
        places[:, : state.count.shape[2]] = state.value_sum[:, 0, :, DIM:].numpy()
        # [ROWS, SLOTS, CHUNK]: 1 where the token at a position merged into a slot.
        went = places - self._places
        if not np.array_equal(went.sum(1), np.ones((ROWS, CHUNK))):
            raise AssertionError("a token of the chunk went to no slot, or to more than one")
        self._places = places
        self.sums += np.einsum("bsc,cbd->bsd", went, tokens)
        self.squares += np.einsum("bsc,cbd->bsd", went, tokens**2)
        self.count += went.sum(2).astype(np.int64)

    def compare(self, state: OVQState) -> tuple[bool, float, float]:
        """Whether counts agree, and the largest error of a mean, in units of its bound and absolute."""
        used = state.count.shape[2]
        count = self.count[:, :used]
        merged = int(state.num_seen[0]) // CHUNK * CHUNK
        is_exact = np.array_equal(state.count[:, 0].numpy(), count) and bool((count.sum(1) == merged).all())
        means = torch.cat([state.keys, state.values[..., :DIM]], -1)[:, 0].double().numpy()
        safe = np.maximum(count, 1)[..., None]
        error = np.abs(means - self.sums[:, :used] / safe)
        rms = np.sqrt(self.squares[:, :used] / safe)
        bound = DRIFT_BOUND * np.sqrt(safe) * rms + np.finfo(np.float32).tiny
        return is_exact, float((error / bound).max()), float(error.max())


def draw_tokens(generator: torch.Generator) -> Tensor:
    """Keys around 16 themes and values with a mean that is not 0, `[CHUNK, ROWS, 2 DIM]`.

    Sums then grow linearly, which is the hard case for float32.
    """
    theme = torch.randint(2 * DIM, (CHUNK, ROWS), generator=generator)
    # Both directions along each axis.
    centres = torch.nn.functional.one_hot(theme % DIM, DIM) * (1 - 2 * (theme // DIM))[..., None]
    keys = centres + 0.3 * torch.randn(CHUNK, ROWS, DIM, generator=generator)
    values = 1 + torch.randn(CHUNK, ROWS, DIM, generator=generator)
    return torch.cat([torch.nn.functional.normalize(keys, dim=-1), values], -1)


def soak(num_steps: int, reporter: Reporter, *, seed: int = 0) -> Result:
    """Run `num_steps` decode steps, rounded up to whole chunks, and compare the state with the recount."""
    num_chunks = -(-num_steps // CHUNK)
    generator = torch.Generator().manual_seed(seed)
    places = torch.eye(CHUNK)[:, None].expand(-1, ROWS, -1)
    recount, state = Recount(), None
    early = num_chunks // 10
    early_bytes = 0
    work = reporter.start("decode steps", total=num_chunks * CHUNK)
    started = time.perf_counter()
    for chunk in range(num_chunks):
        tokens = draw_tokens(generator)
        values = torch.cat([tokens[..., DIM:], places], -1)
        for t in range(CHUNK):
            key = tokens[t, :, None, None, :DIM]
            _, state = ovq_attention(
                key,
                key,
                values[t, :, None, None],
                num_slots=SLOTS,
                chunk_size=CHUNK,
                initial_state=state,
                output_final_state=True,
            )
        recount.add(tokens.double().numpy(), state)
        if chunk == early:
            early_bytes = resident()
        if chunk % 64 == 0 or chunk + 1 == num_chunks:
            work.update((chunk + 1) * CHUNK, note=f"{resident() / 2**20:.1f} MiB resident")
    is_exact, drift, error = recount.compare(state)
    return Result(
        num_steps=num_chunks * CHUNK,
        seconds=time.perf_counter() - started,
        resident_bytes=resident(),
        growth_bytes=resident() - early_bytes,
        are_counts_exact=is_exact and state.num_seen.tolist() == [num_chunks * CHUNK] * ROWS,
        drift=drift,
        largest_error=error,
        largest_count=int(recount.count.max()),
    )


def main(
    steps: Annotated[int, typer.Option(min=CHUNK, help="Decode steps.")] = 1_000_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tokens.")] = 0,
) -> None:
    """Run the soak on one thread and print its results as JSON."""
    torch.set_num_threads(1)
    with torch.no_grad(), Reporter() as reporter:
        result = soak(steps, reporter, seed=seed)
    print(json.dumps({**dataclasses.asdict(result), "is_passed": result.is_passed}, indent=2))
    sys.exit(0 if result.is_passed else 1)


if __name__ == "__main__":
    typer.run(main)

"""Count the steps in which the Triton kernel of merge="ward-sqrt" merges a chunk, in the interpreter.

    python benchmarks/ward_sqrt_steps.py --num-slots 2048 --chunk-size 256

A step merges a pair or finds the nearest of an item, by some costs in float64. How many steps there are
depends on the data, and decides how long the kernel takes (docs/triton.md). The dictionary is filled by the
`cpu` backend, from four times as many tokens as slots; then the kernels merge one chunk. No GPU is needed.
"""

import argparse
import os
from collections import Counter

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ovq.ops import ovq_attention
from ovq.ops.backends.triton import one_by_one

COUNTED = ("_find_nearest", "_cost", "_merge")


def stream(kind: str, length: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys of length 1 and values `[1, length, 1, dim]`.

    Args:
        kind: `"random"`: each of its own; `"topics"`: near one of 1,000 centres, of which a few are frequent.
    """
    k, v = torch.randn(2, length, dim, generator=generator)
    if kind == "topics":
        centres = torch.randn(2, 1000, dim, generator=generator)
        shares = 1 / torch.arange(1, 1001)
        of = torch.multinomial(shares, length, replacement=True, generator=generator)
        k, v = (c[of] + 0.8 * x for c, x in zip(centres, (k, v), strict=True))
    return normalize(k, dim=-1)[None, :, None], v[None, :, None]


def steps(kind: str, num_slots: int, chunk_size: int, dim: int) -> Counter[str]:
    """How often each of `COUNTED` runs while a chunk is merged."""
    options = {"num_slots": num_slots, "chunk_size": chunk_size, "merge": "ward-sqrt"}
    length = (4 * num_slots + chunk_size - 1) // chunk_size * chunk_size
    k, v = stream(kind, length + chunk_size, dim, torch.Generator().manual_seed(0))
    first, last = ((k[:, part], v[:, part]) for part in (slice(length), slice(length, None)))
    _, state = ovq_attention(first[0], *first, **options, output_final_state=True, backend="cpu")
    found: Counter[str] = Counter()
    originals = {name: getattr(one_by_one, name) for name in COUNTED}

    def counting(name: str):
        def run(*args, **kwargs):
            found[name] += 1
            return originals[name](*args, **kwargs)

        return run

    for name in COUNTED:
        setattr(one_by_one, name, counting(name))
    try:
        ovq_attention(last[0], *last, **options, initial_state=state, backend="triton")
    finally:
        for name, original in originals.items():
            setattr(one_by_one, name, original)
    # Each of the items has been looked at once before the first merge.
    found["_find_nearest"] -= num_slots + chunk_size
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-slots", type=int, default=2048)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--head-dim", type=int, default=64)
    arguments = parser.parse_args()
    print(f"{'stream':8} {'merges':>7} {'found after the first merge':>28} {'costs in float64':>17}")
    for kind in ("random", "topics"):
        found = steps(kind, arguments.num_slots, arguments.chunk_size, arguments.head_dim)
        print(f"{kind:8} {found['_merge']:7} {found['_find_nearest']:28} {found['_cost']:17}", flush=True)


if __name__ == "__main__":
    main()

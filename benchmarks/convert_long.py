"""A converted model beside the original on one long text: loss by position, seconds, and bytes kept.

    python benchmarks/convert_long.py --model DIR --converted DIR --text book.txt --out long.json

Both read the text in pieces of 512 tokens, in turns, and after each `--step` tokens both generate a few
tokens, in turns as well, so that ratios of times hold on a machine with other work. A row is written after
each step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ovq.convert import MemoryCache, load
from ovq.eval.reading import read_pieces, target_losses
from ovq.runtime.environment import environment
from ovq.runtime.files import write_atomic

PIECE = 512
NUM_GENERATED = 12


def main() -> None:
    """Read, and write a row after each step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the original")
    parser.add_argument("--converted", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files, which are joined")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--step", type=int, default=2048)
    parser.add_argument("--full-length", type=int, default=16384, help="where the original stops")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = "\n\n".join(path.read_text() for path in arguments.text)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: arguments.length + 1]
    original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    converted = load(arguments.converted, dtype=dtype)
    readers = {
        "full": Reader(original, DynamicCache(config=original.config)),
        "converted": Reader(converted, converted.make_cache()),
    }
    rows: list[dict[str, Any]] = []
    for start in range(0, len(ids) - 1, arguments.step):
        if start >= arguments.full_length:
            readers.pop("full", None)
        end = min(start + arguments.step, len(ids) - 1)
        for place in range(start, end, PIECE):
            for reader in readers.values():
                reader.read(ids[place : min(place + PIECE, end) + 1])
        times: dict[str, list[float]] = {name: [] for name in readers}
        copies = {name: reader.copy() for name, reader in readers.items()}
        for place in range(NUM_GENERATED):
            for name, reader in readers.items():
                times[name].append(reader.decode(ids[place : place + 1], copies[name]))
        rows += [
            {
                "method": name,
                "tokens": end,
                **reader.row(),
                "decode_ms": round(1000 * statistics.median(times[name]), 1),
            }
            for name, reader in readers.items()
        ]
        about = {name: str(value) for name, value in vars(arguments).items()}
        content = {"about": about | {"environment": environment("cpu")}, "rows": rows}
        write_atomic(arguments.out, json.dumps(content, indent=1) + "\n")
        print(rows[-len(readers) :], flush=True)


class Reader:
    """A model with its cache.

    Args:
        model: either kind. cache: its own.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.losses: list[torch.Tensor] = []
        self.seconds = 0.0

    def read(self, ids: torch.Tensor) -> None:
        """Read all tokens but the last, each of which predicts the next."""
        begun = time.process_time()
        [hidden] = read_pieces(self.model, ids[:-1], self.cache, piece_size=PIECE)
        self.seconds += time.process_time() - begun
        self.losses.append(target_losses(self.model, hidden, ids[1:])[0])

    def copy(self) -> Any:
        """A copy of the cache."""
        return self.cache.snapshot() if isinstance(self.cache, MemoryCache) else copy.deepcopy(self.cache)

    @torch.no_grad()
    def decode(self, ids: torch.Tensor, cache: Any) -> float:
        """Seconds for one token."""
        begun = time.process_time()
        self.model(ids[None], past_key_values=cache)
        return time.process_time() - begun

    def row(self) -> dict[str, float]:
        """The mean loss and the seconds since the last row, and the bytes of the cache."""
        found = {
            "loss": round(float(torch.cat(self.losses).mean()), 4),
            "seconds": round(self.seconds, 2),
            "bytes": num_bytes(self.cache),
        }
        self.losses, self.seconds = [], 0.0
        return found


def num_bytes(cache: Any) -> int:
    """Bytes of keys and values."""
    if isinstance(cache, MemoryCache):
        return cache.nbytes
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


if __name__ == "__main__":
    main()

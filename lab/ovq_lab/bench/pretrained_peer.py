"""One way to run a pretrained model, alone in its process: how fast it reads and writes, and what it keeps.

    PYTHON pretrained_peer.py '{"kind": ..., "model": ..., "tokens": ..., "lengths": [...], ...}'

It is run as a file, by the interpreter of an environment that has the peer and need not have ovq: it imports
what every Python has, and the peer. After each length it prints a row as JSON. Times are of one token, in
seconds; bytes are those of the process beyond what it had once its libraries were loaded.
"""

from __future__ import annotations

import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Tokens that are read at a time, so that all of a long text is never in one call.
PIECE = 2048


class Peer(NamedTuple):
    """A loaded model that has read nothing.

    Attributes:
        version: of the package that runs it.
        read: reads tokens, and returns the most likely next one.
        imported_bytes: of the process, before the model was loaded.
    """

    version: str
    read: Callable[[list[int]], int]
    imported_bytes: int


def llama_cpp(model: str, *, most_tokens: int, threads: int) -> Peer:
    """A GGUF file, by llama-cpp-python, with flash attention and its default cache, float16."""
    import llama_cpp

    imported = resident()
    engine = llama_cpp.Llama(
        model,
        n_ctx=most_tokens,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )

    def read(tokens: list[int]) -> int:
        engine.eval(tokens)
        return engine.sample(temp=0.0)

    return Peer(llama_cpp.__version__, read, imported)


def transformers(model: str, *, most_tokens: int, threads: int, dtype: str) -> Peer:
    """A folder, by transformers, with SDPA and its cache that grows."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    imported = resident()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    # Its name for the cache has changed.
    named = "cache" if "cache" in inspect.signature(loaded.forward).parameters else "past_key_values"
    return Peer(transformers.__version__, _reader(loaded, named, transformers.DynamicCache()), imported)


def ovq(model: str, *, most_tokens: int, threads: int, dtype: str, weight_dtype: str) -> Peer:
    """A folder that `ovq convert` has written; tokens are written with weights in `weight_dtype`."""
    import torch

    import ovq
    from ovq.convert import load
    from ovq.hf.cache import CACHE_KEY

    torch.set_num_threads(threads)
    imported = resident()
    loaded: Any = load(model, weight_dtype=weight_dtype, dtype=getattr(torch, dtype)).eval()
    return Peer(ovq.__version__, _reader(loaded, CACHE_KEY, loaded.make_cache()), imported)


def _reader(model: Any, named: str, cache: Any) -> Callable[[list[int]], int]:
    import torch

    @torch.inference_mode()
    def read(tokens: list[int]) -> int:
        ids = torch.tensor([tokens])
        return int(model(ids, **{named: cache}, logits_to_keep=1).logits[0, -1].argmax())

    return read


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory; of `VmHWM`, the most that there were."""
    [line] = [
        x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(field)
    ]
    return int(line.split()[1]) * 1024


def main(kind: str, model: str, tokens: str, lengths: list[int], num_written: int, **options: Any) -> None:
    """Read a text up to each length, and write some tokens there."""
    text = json.loads(Path(tokens).read_text(encoding="utf-8"))
    peer = KINDS[kind](model, most_tokens=max(lengths) + num_written * (len(lengths) + 1), **options)
    num_read, seconds = 0, 0.0
    for length in lengths:
        begin = time.perf_counter()
        for start in range(num_read, length, PIECE):
            token = peer.read(text[start : min(start + PIECE, length)])
        seconds += time.perf_counter() - begin
        num_read, written = length, []
        for _ in range(num_written):
            begin = time.perf_counter()
            token = peer.read([token])
            written.append(time.perf_counter() - begin)
        row = {
            "length": length,
            "read_seconds": seconds / length,
            # The first token is slower: weights are packed, caches are cold.
            "write_seconds": statistics.median(written[1:]),
            "bytes": resident() - peer.imported_bytes,
            "peak_bytes": resident("VmHWM") - peer.imported_bytes,
            "version": peer.version,
        }
        print(json.dumps(row), flush=True)


KINDS: dict[str, Callable[..., Peer]] = {"llama_cpp": llama_cpp, "transformers": transformers, "ovq": ovq}

if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

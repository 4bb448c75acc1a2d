"""One runtime for a pretrained model in its own process: prompt speed, generation speed and memory.

    PYTHON pretrained_peer.py '{"kind": ..., "model": ..., "tokens": ..., "lengths": [...], ...}'

It is run as a file, by the interpreter of an environment that has the runtime and need not have ovq: it
imports only the standard library and the runtime. After each length it prints a row as JSON. Times are in
seconds per token; bytes are those of the process beyond its size once its libraries were loaded.
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

# Tokens per call, so that a long text is never in one call.
PIECE = 2048


class Peer(NamedTuple):
    """A loaded model with an empty context.

    Attributes:
        measure: returns the seconds to read a text, which extends the text of the previous call, and the
            seconds of each of a number of generated tokens.
        imported_bytes: bytes of the process before the model was loaded.
    """

    version: str
    measure: Callable[[list[int], int], tuple[float, list[float]]]
    imported_bytes: int


def llama_cpp(model: str, *, most_tokens: int, threads: int) -> Peer:
    """A GGUF file in llama-cpp-python, with flash attention and its default cache in float16."""
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

    return Peer(llama_cpp.__version__, _by_pieces(read), imported)


def transformers(model: str, *, most_tokens: int, threads: int, dtype: str) -> Peer:
    """A model folder in transformers, with SDPA and its growing cache."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    imported = resident()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    # The name of the cache argument depends on the version.
    named = "cache" if "cache" in inspect.signature(loaded.forward).parameters else "past_key_values"
    return Peer(
        transformers.__version__, _by_pieces(_reader(loaded, named, transformers.DynamicCache())), imported
    )


def ovq(model: str, *, most_tokens: int, threads: int, dtype: str, weight_dtype: str) -> Peer:
    """A folder of `ovq convert`, with weights in `weight_dtype`."""
    import torch

    import ovq
    from ovq.convert import load
    from ovq.hf.cache import CACHE_KEY

    torch.set_num_threads(threads)
    imported = resident()
    loaded: Any = load(model, weight_dtype=weight_dtype, dtype=getattr(torch, dtype)).eval()
    return Peer(ovq.__version__, _by_pieces(_reader(loaded, CACHE_KEY, loaded.make_cache())), imported)


def openvino(model: str, *, most_tokens: int, threads: int, rows: int) -> Peer:
    """A folder of `optimum-cli export openvino` in OpenVINO GenAI; its cache keeps `rows` tokens, 0 for all.

    It cannot continue from its cache: each length is read from the first token on.
    """
    import numpy
    import openvino
    import openvino_genai as genai

    imported = resident()
    scheduler = genai.SchedulerConfig()
    # GB.
    scheduler.cache_size = 1
    scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = PIECE, False
    if rows:
        scheduler.use_cache_eviction = True
        # Number of first tokens, of last tokens and of all; between them, the most attended tokens are kept.
        first, last, score = 32, max(32, min(128, rows // 4)), genai.AggregationMode.NORM_SUM
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(first, last, rows, score)
    engine = genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    def measure(tokens: list[int], num_written: int) -> tuple[float, list[float]]:
        ids = openvino.Tensor(numpy.array([tokens], dtype=numpy.int64))
        given = genai.TokenizedInputs(ids, openvino.Tensor(numpy.ones((1, len(tokens)), dtype=numpy.int64)))
        # The first token belongs to reading. Times are in microseconds.
        answer = engine.generate(given, max_new_tokens=num_written + 1, ignore_eos=True, do_sample=False)
        found = answer.perf_metrics.raw_metrics
        seconds, *written = (
            float(x) / 1e6 for x in (found.m_times_to_first_token[0], *found.m_durations[-num_written:])
        )
        return seconds, written

    return Peer(genai.__version__.split("-")[0], measure, imported)


def _by_pieces(read: Callable[[list[int]], int]) -> Callable[[list[int], int], tuple[float, list[float]]]:
    """`Peer.measure` for a runtime with a cache: `read` reads tokens and returns the most likely next one."""
    num_read, seconds = 0, 0.0

    def measure(tokens: list[int], num_written: int) -> tuple[float, list[float]]:
        nonlocal num_read, seconds
        begin = time.perf_counter()
        for start in range(num_read, len(tokens), PIECE):
            token = read(tokens[start : start + PIECE])
        seconds += time.perf_counter() - begin
        num_read, written = len(tokens), []
        for _ in range(num_written):
            begin = time.perf_counter()
            token = read([token])
            written.append(time.perf_counter() - begin)
        return seconds, written

    return measure


def _reader(model: Any, named: str, cache: Any) -> Callable[[list[int]], int]:
    import torch

    @torch.inference_mode()
    def read(tokens: list[int]) -> int:
        ids = torch.tensor([tokens])
        return int(model(ids, **{named: cache}, logits_to_keep=1).logits[0, -1].argmax())

    return read


def resident(field: str = "VmRSS") -> int:
    """Resident bytes of this process; for `VmHWM`, their peak."""
    [line] = [
        x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(field)
    ]
    return int(line.split()[1]) * 1024


def main(kind: str, model: str, tokens: str, lengths: list[int], num_written: int, **options: Any) -> None:
    """Read a text up to each length, and generate some tokens there."""
    text = json.loads(Path(tokens).read_text(encoding="utf-8"))
    peer = KINDS[kind](model, most_tokens=max(lengths) + num_written * (len(lengths) + 1), **options)
    for length in lengths:
        seconds, written = peer.measure(text[:length], num_written)
        row = {
            "length": length,
            "read_seconds": seconds / length,
            # The first token is slower (weights are packed, caches are cold) and not counted.
            "write_seconds": statistics.median(written[1:]),
            "bytes": resident() - peer.imported_bytes,
            "peak_bytes": resident("VmHWM") - peer.imported_bytes,
            "version": peer.version,
        }
        print(json.dumps(row), flush=True)


KINDS: dict[str, Callable[..., Peer]] = {
    kind.__name__: kind for kind in (llama_cpp, openvino, transformers, ovq)
}

if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

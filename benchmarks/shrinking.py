"""What a dictionary still knows once it is a quarter as large: `python benchmarks/shrinking.py`.

A stream is read into 1024 slots, which are then made 256: by merging what is nearest (`OVQState.resize`), and
by keeping the slots used most, each other going to the kept slot of the largest cosine. Errors are those of
`ovq reproduce fidelity`: of 256 queries against exact attention over all tokens, relative to its size.

With `--runs RUNS`, the `runs` of `ovq reproduce recall positional`, models trained by the paper's rule do the
same with the context of an example, and are then asked: the share of right answers. `docs/results/memory.md`
has what this printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize

from ovq.hf import OVQCache, OVQForCausalLM
from ovq.layers import OVQAttention
from ovq.ops import OVQState, ovq_attention
from ovq_lab.figures.fidelity.memories import CHUNK_SIZE, softmax_read
from ovq_lab.figures.fidelity.streams import STREAMS
from ovq_lab.figures.plan import run_name, with_seed
from ovq_lab.figures.presets import get_preset
from ovq_lab.tasks import IGNORE_INDEX, TaskBatch

TOKENS, QUERIES, DIM = 8192, 256, 64
LARGE, SMALL = 1024, 256
SEEDS = (0, 1, 2)
RULES = ("existing", "nearest")
LENGTH, EXAMPLES = 4096, 8


def most_used(state: OVQState) -> OVQState:
    """`state` with the slots used most, and the others merged into those nearest to them."""
    rows, heads = state.count.shape[:2]
    parts = []
    for row in range(rows):
        for head in range(heads):
            tensors = [x[row, head] for x in (state.key_sum, state.value_sum, state.count)]
            by_use = tensors[2].argsort(descending=True, stable=True)
            kept, dropped = (part.sort().values for part in by_use.tensor_split([SMALL]))
            means = normalize(state.keys[row, head], dim=-1)
            target = (means[dropped] @ means[kept].T).argmax(-1)
            parts.append([x[kept].index_add(0, target, x[dropped]) for x in tensors])
    key_sum, value_sum, count = (torch.stack(x).unflatten(0, (rows, heads)) for x in zip(*parts, strict=True))
    return dataclasses.replace(state, key_sum=key_sum, value_sum=value_sum, count=count, num_slots=SMALL)


WAYS: dict[str, Callable[[OVQState], OVQState]] = {
    "1024 slots": lambda state: state,
    "256, by resize": lambda state: state.resize(SMALL),
    "256, most used": most_used,
}


@torch.no_grad()
def errors(name: str, merge: str, seed: int) -> list[float]:
    """Of each of `WAYS`, and of 256 slots from the first token on."""
    _, stream = STREAMS[name](seed, 1, TOKENS + QUERIES, DIM)
    queries = stream.queries[TOKENS:]
    exact = softmax_read(queries, stream.keys[:TOKENS], stream.values[:TOKENS], DIM**0.5)
    states = {}
    for num_slots in (LARGE, SMALL):
        keys, values = (x[None, :TOKENS, None] for x in (stream.keys, stream.values))
        _, states[num_slots] = ovq_attention(
            keys,
            keys,
            values,
            num_slots=num_slots,
            chunk_size=CHUNK_SIZE,
            merge=merge,
            output_final_state=True,
        )
    found = []
    for state in (*(way(states[LARGE]) for way in WAYS.values()), states[SMALL]):
        o = softmax_read(queries, state.keys[0, 0], state.values[0, 0], DIM**0.5, state.count[0, 0])
        found.append(float((o - exact).norm() / exact.norm()))
    return found


@torch.no_grad()
def answers(name: str, merge: str, seed: int, *, runs: Path) -> list[float]:
    """The share of right answers after each of `WAYS`, and with 256 slots from the first token on."""
    preset = get_preset("cpu")
    folder = runs / run_name(with_seed(preset.config(name), seed))
    model = OVQForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    model.set_merge(merge)
    task = preset.task(name).at_length(LENGTH)
    batch = task.build(seed, indices=range(EXAMPLES), split="test")
    found = []
    for num_slots, way in (*((LARGE, way) for way in WAYS.values()), (SMALL, WAYS["1024 slots"])):
        model.set_num_slots(num_slots)
        found.append(_answered(model, batch, task.context_length, way))
    return found


def _answered(
    model: OVQForCausalLM, batch: TaskBatch, context_length: int, way: Callable[[OVQState], OVQState]
) -> float:
    """The share of right answers if the dictionaries are changed between the context and the questions."""
    inputs, cache = torch.from_numpy(batch.inputs), OVQCache(model.config)
    first = model.base_model(inputs[:, :context_length], past_key_values=cache).last_hidden_state
    for layer, mixer in zip(cache.layers, model.mixers(), strict=True):
        if isinstance(mixer, OVQAttention):
            smaller = way(layer.state)
            layer.set_state(smaller, 0)
            # The rule goes on from there with as many slots.
            mixer.set_num_slots(smaller.num_slots)
    rest = model.base_model(inputs[:, context_length:], past_key_values=cache).last_hidden_state
    is_asked = torch.from_numpy(batch.labels != IGNORE_INDEX)
    asked = torch.cat([first, rest], 1)[:, :-1][is_asked[:, 1:]]
    said = model.get_output_embeddings()(asked).argmax(-1).numpy()
    return float(np.mean(said == batch.labels[is_asked.numpy()]))


def main() -> None:
    """Print a row for each stream, or task, and rule that the dictionary was learned by."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="ask the models in this folder")
    arguments = parser.parse_args()
    what, names = errors, ("clustered", "text")
    if arguments.runs:
        what, names = functools.partial(answers, runs=arguments.runs), ("recall", "positional")
    console = Console(width=160)
    table = Table("stream or task", "learned by merge=", *WAYS, "256 from the start")
    for name in names:
        for merge in RULES:
            found = zip(*(what(name, merge, seed) for seed in SEEDS), strict=True)
            table.add_row(
                name, merge, *(f"{statistics.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in found)
            )
    console.print(table)


if __name__ == "__main__":
    main()

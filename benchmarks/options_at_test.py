"""A window and sinks at test time, on weights trained without them, at equal bytes.

`python benchmarks/options_at_test.py --out DIR --runs RUNS` asks models that `ovq reproduce` has trained
on recall and positional recall (RUNS is its folder of runs) with chunks, windows and sinks that they were not
trained with, by Ward-sqrt. A state has as many rows in all cases: what is exact takes the place of slots.
Answers that are in DIR are not asked again. `docs/results.md` has the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ovq.eval.accuracy import evaluate
from ovq.hf import OVQForCausalLM
from ovq.research.reproduce.plan import run_name, with_seed
from ovq.research.reproduce.presets import get_preset
from ovq.runtime.files import write_atomic
from ovq.runtime.progress import Reporter
from ovq.train.config import RunConfig

TEST_TOKENS = 32768
# Slots of the usual layer, and tokens.
CELLS = ((64, 1024), (256, 4096), (64, 4096))
# Tokens per chunk, tokens of the window, sinks. The usual layer has chunks of 32.
USUAL_CHUNK = 32
LAYERS = {
    "chunks of 32": (32, 0, 0),
    "chunks of 16, window of 16": (16, 16, 0),
    "chunks of 8, window of 24": (8, 24, 0),
    "chunks of 32, window of 32": (32, 32, 0),
    "chunks of 32, 4 sinks": (32, 0, 4),
    "chunks of 16, window of 16, 4 sinks": (16, 16, 4),
}


def folder_of(task: str, seed: int, runs: list[Path]) -> Path:
    """The folder of a trained model."""
    name = run_name(with_seed(get_preset("cpu").config(task), seed))
    found = [path / name for path in runs if (path / name / "model.safetensors").exists()]
    if not found:
        raise SystemExit(f"--runs: expected the trained model {name}, found none (ovq reproduce {task})")
    return found[0]


def answer(folder: Path, layer: str, num_slots: int, length: int, reporter: Reporter) -> dict:
    """What a model answers at a length, with as many rows as `num_slots` slots and the usual chunk."""
    chunk_size, window, num_sinks = LAYERS[layer]
    num_slots += USUAL_CHUNK - chunk_size - window
    model = OVQForCausalLM.from_pretrained(
        folder,
        local_files_only=True,
        num_slots=num_slots,
        chunk_size=chunk_size,
        window=window,
        ovq_sinks=num_sinks,
        merge="ward-sqrt",
        growth="immediate",
    )
    [row] = evaluate(
        model,
        RunConfig.load(folder).task,
        lengths=[length],
        num_examples=max(1, TEST_TOKENS // length),
        reporter=reporter,
        label=f"{folder.name}, {layer}, {length} tokens",
    )
    return {"accuracy": row.accuracy, "state_bytes": row.state_bytes}


def main() -> None:
    """Ask, and write `options_at_test.json` after each answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of trained models")
    parser.add_argument(
        "--tasks", nargs="+", choices=["recall", "positional"], default=["recall", "positional"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    path = arguments.out / "options_at_test.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = [
        {"task": task, "seed": seed, "layer": layer, "num_slots": num_slots, "length": length}
        for num_slots, length in CELLS
        for task in arguments.tasks
        for seed in arguments.seeds
        for layer in LAYERS
    ]
    with Reporter() as reporter:
        for case in cases:
            if any(case.items() <= row.items() for row in rows):
                continue
            folder = folder_of(case["task"], case["seed"], arguments.runs)
            found = answer(folder, case["layer"], case["num_slots"], case["length"], reporter)
            rows.append({**case, **found})
            write_atomic(path, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

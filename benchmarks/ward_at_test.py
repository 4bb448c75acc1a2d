"""Rules that merge pairs, on weights trained with the paper's rule.

`python benchmarks/ward_at_test.py --out DIR --runs RUNS` trains OVQ by that rule, and full attention, on
basic and on positional recall at up to 256 tokens, and asks each model at longer lengths, OVQ by each rule
with equal slots. Runs that are in RUNS are not trained again, and answers that are in DIR not asked again.
The tables are in `docs/results/rules.md`. Two hours on two cores: one process per core halves that if each is
given its own `--seeds`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ovq.eval.accuracy import evaluate
from ovq.hf import OVQForCausalLM
from ovq.research.reproduce.presets import get_preset
from ovq.runtime.files import write_atomic
from ovq.runtime.progress import Reporter
from ovq.train.config import RunConfig
from ovq.train.loop import train

TEST_TOKENS = 65536
# Slots and tokens. With 130 token ids there are keys enough for a context of 64k tokens, with 66 for 16k.
CELLS = {
    "recall, 66 ids": ((64, 1024), (256, 4096), (1024, 16384), (64, 4096), (256, 16384)),
    "positional": ((64, 1024), (256, 4096), (1008, 4096), (4032, 16384)),
    "recall, 130 ids": ((64, 1024), (256, 4096), (1024, 16384), (4032, 16384), (16128, 65536)),
}
RULES = {
    "paper's": {"merge": "existing", "growth": "plateau"},
    **{
        f"{name}, w = {weight:g}": {"merge": merge, "growth": "immediate", "value_weight": weight}
        for name, merge in (("Ward", "ward"), ("Ward-sqrt", "ward-sqrt"))
        for weight in (0.5, 0.35, 0.25)
    },
}
# What decides the weight of values, at one size each.
WEIGHTS = (0.0, 0.125, 1.0)
WEIGHT_CELL = (256, 4096)


def config_of(task: str, mixer: str, seed: int) -> RunConfig:
    """The run of a task: that of the figures, but for the keys of one and the steps of the other."""
    preset = get_preset("cpu")
    config = preset.config(task.split(",")[0], mixer)
    if task == "recall, 66 ids":
        config = config.override(["task.vocab_size=66"])
    if task == "positional":
        config = config.override(["train.steps=1200", "train.learning_rate=0.006"])
    return config.override([f"train.seed={seed}"])


def trained(config: RunConfig, folder: Path, reporter: Reporter) -> Path:
    """The folder of a trained model."""
    if not (folder / "model.safetensors").exists():
        train(config, folder, reporter=reporter, label=f"train {folder.name}")
    return folder


def answer(folder: Path, rule: dict, num_slots: int | None, length: int, reporter: Reporter) -> dict:
    """What a model answers at a length, its dictionary kept by a rule."""
    model = OVQForCausalLM.from_pretrained(folder, local_files_only=True, **rule)
    [row] = evaluate(
        model,
        RunConfig.load(folder).task,
        lengths=[length],
        num_slots=[] if num_slots is None else [num_slots],
        num_examples=max(1, TEST_TOKENS // length),
        reporter=reporter,
        label=f"{folder.name}, {length} tokens",
    )
    return {"accuracy": row.accuracy, "state_bytes": row.state_bytes}


def questions(task: str, seed: int) -> list[dict]:
    """All that is asked of the models of a task and seed, without the answers."""
    cells = CELLS[task]
    by_rule = [(cell, name, rule) for cell in cells for name, rule in RULES.items()]
    by_rule += [
        (WEIGHT_CELL, f"{name}, w = {w:g}", {**RULES[f"{name}, w = 0.5"], "value_weight": w})
        for name in ("Ward", "Ward-sqrt")
        for w in WEIGHTS
    ]
    asked = [
        {"mixer": "ovq", "rule": name, "options": rule, "num_slots": slots, "length": length}
        for (slots, length), name, rule in by_rule
    ]
    lengths = dict.fromkeys(length for _, length in cells)
    asked += [
        {"mixer": "full_attention", "rule": "", "options": {}, "num_slots": None, "length": length}
        for length in lengths
    ]
    return [{"task": task, "seed": seed, **each} for each in asked]


def main() -> None:
    """Train and ask, and write `ward_at_test.json` after each answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trained models")
    parser.add_argument("--tasks", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    path = arguments.out / "ward_at_test.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Reporter() as reporter:
        for task in arguments.tasks:
            for seed in arguments.seeds:
                for question in questions(task, seed):
                    options = question.pop("options")
                    if any(question.items() <= row.items() for row in rows):
                        continue
                    name = "-".join([*task.replace(",", "").split(), question["mixer"], str(seed)])
                    folder = arguments.runs / name
                    trained(config_of(task, question["mixer"], seed), folder, reporter)
                    found = answer(folder, options, question["num_slots"], question["length"], reporter)
                    rows.append({**question, **found})
                    write_atomic(path, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

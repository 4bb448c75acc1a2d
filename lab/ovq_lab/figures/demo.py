"""The demonstration: three models that differ only in their long-range mixer, trained on short examples and
tested on long ones.

Run it as `ovq demo --out DIR`. OVQ, full attention and a window alone learn in-context recall with the same
recipe, at lengths up to 256 tokens. They are tested at up to 16 times that length. The weights of OVQ are
tested with the dictionary of training and with dictionaries 4 and 16 times as large, each with the merge rule
of training (the paper's) and with "nearest".
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from ovq.hf import OVQForCausalLM
from ovq.runtime.files import TemporaryFolder, write_atomic
from ovq.runtime.progress import Reporter
from ovq.runtime.units import format_bytes
from ovq_lab.eval.accuracy import evaluate
from ovq_lab.eval.rows import ResultRow
from ovq_lab.mixers.names import MIXER_NAMES
from ovq_lab.plots.draw import save_demo_figures
from ovq_lab.plots.tables import result_table
from ovq_lab.runtime.environment import environment
from ovq_lab.runtime.workers import RemoteReporter, run_jobs
from ovq_lab.tasks import RecallTask
from ovq_lab.train.config import CONFIG_FILE, RunConfig
from ovq_lab.train.loop import train
from ovq_lab.train.recipes import get_recipe

RECIPES = ("recall-ovq", "recall-full", "recall-sliding")
LENGTH_FACTORS = (1, 2, 4, 8, 16)
SLOT_FACTORS = (1, 4, 16)
MERGES = ("existing", "nearest")

# With this many questions at each length, an accuracy of 0.97 is known to about 0.005.
_TEST_TOKENS_PER_LENGTH = 65536


def run_demo(
    out: Path, *, seed: int = 0, is_quick: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train, test, draw and report; returns the content of `results.json`.

    Args:
        out: Folder for `results.json`, `accuracy.png`, `state.png` and the OVQ model (`ovq/`); created if
            necessary. Earlier results in it are replaced.
        is_quick: Cut training and tests down to seconds. The models then learn nothing, and the conclusion
            says so.
    """
    console = console or Console()
    # A run of the user may be of this name, too: only a demonstration leaves both files.
    if (out / "ovq").exists() and not all(
        path.is_file() for path in (out / "ovq" / CONFIG_FILE, out / "results.json")
    ):
        raise ValueError(
            f"--out: expected a folder in which ovq/ is free or the model of an earlier demonstration, "
            f"found something else in {out / 'ovq'}"
        )
    out.mkdir(parents=True, exist_ok=True)
    configs = [_configure(name, seed, is_quick=is_quick) for name in RECIPES]
    begun = time.monotonic()
    # Temporary runs are in `out`, so that an unwritable folder fails at once and the model moves by a rename.
    with TemporaryFolder("runs", out) as runs, Reporter() as reporter:
        jobs = [(config, Path(runs) / config.mixer) for config in configs]
        outcomes = run_jobs(partial(_train_and_test, is_quick=is_quick), jobs, reporter=reporter)
        rows = [row for of_model, _ in outcomes for row in of_model]
        seconds = {
            f"{what} {config.mixer}": round(value, 1)
            for config, (_, taken) in zip(configs, outcomes, strict=True)
            for what, value in taken.items()
        }
        seconds["total"] = round(time.monotonic() - begun, 1)

        results: dict[str, Any] = {
            "rows": [dataclasses.asdict(row) for row in rows],
            "is_quick": is_quick,
            "seed": seed,
            "train_length": max(configs[0].train.lengths),
            "config": {
                name: json.loads(config.to_json()) for name, config in zip(RECIPES, configs, strict=True)
            },
            "seconds": seconds,
            "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
        }
        # First, as it marks the model as one of a demonstration, which the next one may replace.
        write_atomic(out / "results.json", json.dumps(results, indent=2) + "\n")
        if (out / "ovq").exists():
            shutil.rmtree(out / "ovq")
        os.replace(Path(runs) / "ovq", out / "ovq")
    figures = save_demo_figures(rows, out, train_length=results["train_length"])

    console.print(result_table(rows, title="In-context recall: share of right answers by length in tokens"))
    console.print(_one_answer(out / "ovq", seed), highlight=False)
    console.print(
        f"Wrote {out / 'results.json'}, {', '.join(str(path) for path in figures)} "
        f"and the model {out / 'ovq'} in {seconds['total']:.0f} s.",
        # Keeps the path on one line, so that it can be copied.
        soft_wrap=True,
    )
    console.print(conclusion(rows, train_length=results["train_length"], is_quick=is_quick), highlight=False)
    return results


def conclusion(rows: Sequence[ResultRow], *, train_length: int, is_quick: bool = False) -> str:
    """Summarise the results at the longest length in a few sentences."""
    longest = max(row.length for row in rows)
    rows = [row for row in rows if row.length == longest]
    papers, ours = (
        sorted((row for row in rows if row.merge == merge), key=attrgetter("num_slots")) for merge in MERGES
    )
    trained, *others = papers
    full = next(row for row in rows if row.mixer == "full_attention")
    window = next(row for row in rows if row.mixer == "sliding_attention")
    by_size = [
        f"{trained.accuracy:.1%} of the questions with the {trained.num_slots} slots it was trained with",
        *(f"{row.accuracy:.1%} with {row.num_slots}" for row in others),
    ]
    by_pairs = [f"{row.accuracy:.1%}" for row in ours]
    text = (
        f"At {longest} tokens, {longest / train_length:g} times the training length, OVQ answers "
        f"{_listed(by_size)} (state: {_bytes_of(papers)}). With the same weights and slots, but the "
        f"shortest edges merged (nearest), it answers {_listed(by_pairs)} ({_bytes_of(ours)}). "
        f"Full attention answers {full.accuracy:.1%} ({_bytes_of([full])}) and a window alone "
        f"{window.accuracy:.1%} ({_bytes_of([window])})."
    )
    if is_quick:
        text = f"This was a quick run, far too short to learn anything; its numbers mean nothing. {text}"
    return text


def _configure(recipe: str, seed: int, *, is_quick: bool) -> RunConfig:
    """The recipe with this seed, shortened if `is_quick`."""
    changes = [f"train.seed={seed}"]
    if is_quick:
        changes += ["train.steps=6", "train.batch_size=4", "train.log_every=1"]
    return get_recipe(recipe).override(changes)


def _train_and_test(
    job: tuple[RunConfig, Path], reporter: RemoteReporter, *, is_quick: bool
) -> tuple[list[ResultRow], dict[str, float]]:
    """Train a model, and test it at every length, and with every dictionary if it has one."""
    config, folder = job
    name = MIXER_NAMES[config.mixer]
    begun = time.monotonic()
    model = train(config, folder, reporter=reporter, label=f"train {name}")
    trained = time.monotonic()
    assert isinstance(config.task, RecallTask)
    lengths = [max(config.train.lengths) * factor for factor in LENGTH_FACTORS]
    sizes = [config.model.num_slots * factor for factor in SLOT_FACTORS]
    rows = evaluate(
        model,
        config.task,
        lengths=lengths,
        num_slots=sizes if config.mixer == "ovq" else (),
        merges=MERGES if config.mixer == "ovq" else (),
        num_examples=1 if is_quick else [_TEST_TOKENS_PER_LENGTH // length for length in lengths],
        seed=config.train.seed,
        reporter=reporter,
        label=f"test {name}",
    )
    return rows, {"train": trained - begun, "test": time.monotonic() - trained}


def _one_answer(folder: Path, seed: int) -> str:
    """The saved model's answer to the first question of an unseen example, by `generate`, as text."""
    # Loading a model this small is too fast for a progress bar.
    disable_progress_bar()
    model = OVQForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    task = RunConfig.load(folder).task
    assert isinstance(task, RecallTask)
    batch = task.build(seed, indices=[0], split="test")
    key_start = task.context_length + 1
    prompt_length = key_start + task.key_length
    prompt = torch.from_numpy(batch.inputs[:, :prompt_length])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=task.value_length, do_sample=False
    )
    answer = output[0, prompt_length:].tolist()
    expected = batch.inputs[0, prompt_length : prompt_length + task.value_length].tolist()
    key = batch.inputs[0, key_start:prompt_length].tolist()
    return (
        f"One question, answered by generate(): of {task.num_stored} pairs in {task.context_length} tokens, "
        f"which value belongs to key {_words(key)}? "
        f"The model says {_words(answer)}; right is {_words(expected)}."
    )


def _bytes_of(rows: Sequence[ResultRow]) -> str:
    return _listed([format_bytes(row.state_bytes) for row in rows])


def _listed(parts: Sequence[str]) -> str:
    """Join words with commas and "and".

    Example:
        >>> _listed(["a"]), _listed(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _words(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))

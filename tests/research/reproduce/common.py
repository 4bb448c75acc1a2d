"""A preset whose figures take seconds, and a way to run its jobs without other processes."""

import dataclasses

from rich.console import Console

from ovq.runtime.progress import Reporter
from ovq_lab.figures import engine
from ovq_lab.figures.engine import Workshop
from ovq_lab.figures.plan import Trial
from ovq_lab.figures.presets import Preset, TextEvaluations
from ovq_lab.figures.results import load_results
from ovq_lab.train.recipes import recipe_for
from tests.tiny import TINY as FIELDS


def _config(task, *changes):
    return recipe_for(task, "ovq").override([*FIELDS, "train.steps=6", *" ".join(changes).split()])


CONFIG = _config("recall")
_LM = "model.num_attention_heads=1 train.length_shares=1"
_NEEDLE = f"{_LM} task.needle_share=1 train.lengths=288"

TINY = Preset(
    name="tiny",
    configs={
        "recall": CONFIG,
        "positional": _config("positional"),
        "regression": _config("regression", "task.points_per_function=4 task.max_functions=4"),
        "mqar": _config("mqar", "task.vocab_size=64"),
        **dict.fromkeys(("lm", "long"), _config("lm", _LM, "train.lengths=32")),
        "needle": _config("lm", _NEEDLE),
        "needles": _config("lm", _NEEDLE, "task.needle_values=number,uuid task.bare_needle_share=0.5"),
    },
    length_factors=(1, 2),
    far_lengths={"recall": (64,)},
    evaluation_tokens=100,
    trials=(Trial(learning_rate=1e-3), Trial(learning_rate=1e-2, weight_decay=0.5)),
    slot_factors=(1, 4),
    sizes={"ovq": ({"num_slots": 2},)},
    chunk_sizes=(4, 8),
    rates=(0.1,),
    text=TextEvaluations(
        length=4096,
        num_windows=2,
        slot_factors=(1, 4),
        needle_lengths=(512, 1152),
        num_needles=2,
        needle_depths=(0.0, 1.0),
    ),
    text_trials=dict.fromkeys(
        ("lm", "needle", "needles"), (Trial(learning_rate=3e-3, weight_decay=0.1), Trial(learning_rate=1e-3))
    ),
)


def workshop(out, **fields):
    usual = {"preset": "tiny", "num_seeds": 2, "num_workers": 2, "reporter": Reporter(Console(quiet=True))}
    return Workshop(**{"out": out, **usual, **fields})


def with_steps(preset, steps):
    """The same preset with longer training."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=steps))
    return dataclasses.replace(preset, configs={"recall": config})


def books(folder):
    """A corpus of a few files in a folder, of which half are held out, and runs without checkpoints on it."""
    for number in range(24):
        words = (f"{number * word % 97} is {word}." for word in range(600))
        (folder / f"{number}.txt").write_text(" ".join(words))
    return [f"task.dataset={folder}", "task.held_out=0.5", "train.save_every=0"]


def undrawn(figure):
    """The same figure, with a picture that nobody looks at."""
    return dataclasses.replace(figure, draw=lambda results, path: path.touch())


def run_here(monkeypatch):
    """Let jobs run in this process, one after the other; the list of their labels grows as they begin."""
    begun = []

    def run_jobs(function, jobs, *, reporter, num_workers, label):
        for job in jobs:
            begun.append(job.label)
            function(job, reporter)

    monkeypatch.setattr(engine, "run_jobs", run_jobs)
    return begun


def rows_of(out, name):
    """The rows of a figure, without what differs from one time to the next."""
    rows = load_results(out / "rows" / f"{name}.json")["rows"]
    for row in rows:
        for field in ("seconds", "microseconds_per_token", "train_seconds"):
            del row[field]
    return rows

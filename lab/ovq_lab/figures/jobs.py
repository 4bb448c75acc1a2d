"""Jobs of worker processes for a figure: train and evaluate a run, or measure without training.

A job can be interrupted at any moment and resumed. The folder of a run is sealed once its model is trained
(`ovq_lab.train.checkpoints`); until then it holds checkpoints to resume from. Each outcome of an evaluation
is a file, `evaluations/NAME.json`, and so are the rows that are measured for a seed; files are written
atomically.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from ovq.hf import OVQForCausalLM
from ovq.layers import Mixer, register_mixer
from ovq.runtime.files import read_json, write_atomic
from ovq_lab.figures.evaluations import Evaluation
from ovq_lab.figures.plan import is_same_run, run_name
from ovq_lab.runtime.environment import environment
from ovq_lab.runtime.workers import RemoteReporter, RemoteWork
from ovq_lab.tasks import TextTask
from ovq_lab.text import get_tokenizer, load_corpus
from ovq_lab.train import loop
from ovq_lab.train.checkpoints import fault, newest_checkpoint, seal
from ovq_lab.train.config import CONFIG_FILE, RunConfig
from ovq_lab.train.data import CORPUS_FILE, check_corpus

TRAINING_FILE = "training.json"
"""Name of the file with the training time, number of parameters and environment of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunJob:
    """A run to train, and evaluations of the trained model; `root` is the folder of all runs.

    `mixers` are the model's, by name: in a worker process, a user's own are not registered yet.
    """

    root: Path
    label: str
    config: RunConfig
    evaluations: tuple[Evaluation, ...]
    mixers: tuple[tuple[str, type[Mixer]], ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.root / run_name(self.config)

    def is_done(self) -> bool:
        """Whether the model is trained, and all evaluations are finished."""
        return self.is_trained() and not self.missing()

    def is_trained(self) -> bool:
        """Whether the folder holds the complete trained model."""
        if fault(self.folder) is not None:
            return False
        found = RunConfig.load(self.folder)
        if not is_same_run(found, self.config):
            raise ValueError(
                f"{self.folder}: expected the run of this configuration, found another one, "
                "trained by an earlier version; move it away, or choose another --out"
            )
        task = self.config.task
        # Files may have been changed or added since.
        if isinstance(task, TextTask) and Path(task.dataset).exists():
            tokenizer = get_tokenizer(str(self.folder))
            check_corpus(self.folder / CORPUS_FILE, load_corpus(task, "train", tokenizer=tokenizer))
        return True

    def outcomes(self) -> list[dict[str, Any] | None]:
        """Outcomes of the evaluations; None for those that are not finished."""
        return [self._outcome(evaluation) for evaluation in self.evaluations]

    def missing(self) -> list[Evaluation]:
        """The evaluations that are not finished."""
        return [evaluation for evaluation in self.evaluations if self._outcome(evaluation) is None]

    def training_record(self) -> dict[str, Any]:
        """The content of `TRAINING_FILE` of the trained run."""
        return read_json(self.folder / TRAINING_FILE)

    def environments(self) -> list[dict[str, Any]]:
        """The environments of the training and of the finished evaluations."""
        records = (self.training_record(), *self.outcomes())
        return [record["environment"] for record in records if record is not None]

    @property
    def pattern(self) -> Path:
        """What matches the folders of all runs of this task and mixer."""
        return self.root / f"{self.config.task.name}-{self.config.mixer}-seed*"

    def do(self, reporter: RemoteReporter) -> None:
        """Train the model if it is not trained, and do the missing evaluations."""
        for name, cls in self.mixers:
            register_mixer(name, cls)
        # Loading a model this small is too fast for a progress bar.
        disable_progress_bar()
        if not self.is_trained():
            self._train(reporter)
        if missing := self.missing():
            self._evaluate(missing, reporter)

    def _train(self, reporter: RemoteReporter) -> None:
        """Train the model, from the newest undamaged checkpoint if there is one, and seal the folder."""
        begun = time.monotonic()
        can_resume = (
            (self.folder / CONFIG_FILE).is_file()
            and is_same_run(RunConfig.load(self.folder), self.config)
            and newest_checkpoint(self.folder, reporter.say) is not None
        )
        label = f"train {self.label}"
        if can_resume:
            model = loop.resume(self.folder, reporter=reporter, label=label)
        else:
            # Remove incomplete or damaged files.
            shutil.rmtree(self.folder, ignore_errors=True)
            model = loop.train(self.config, self.folder, reporter=reporter, label=label)
        record = {
            # For a resumed run only the time of the last part is known.
            "seconds": None if can_resume else round(time.monotonic() - begun, 2),
            "num_parameters": model.num_parameters(),
            "environment": environment(model.device.type),
        }
        write_atomic(self.folder / TRAINING_FILE, json.dumps(record, indent=2) + "\n")
        seal(self.folder)
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def _evaluate(self, evaluations: list[Evaluation], reporter: RemoteReporter) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = OVQForCausalLM.from_pretrained(self.folder, local_files_only=True)
        # transformers wraps `to` in a way that leaves mypy without its `self`.
        model = model.to(device).eval()  # type: ignore[arg-type]
        (self.folder / "evaluations").mkdir(exist_ok=True)
        total = sum(evaluation.num_steps for evaluation in evaluations)
        work = reporter.start(f"evaluate {self.label}", total=total)
        done, use_bfloat16 = 0, self.config.train.precision == "bfloat16"
        for evaluation in evaluations:
            # For models that open slots at random.
            set_seed(evaluation.seed)
            begun = time.monotonic()
            # Models are trained without.
            if evaluation.logn_length != model.config.logn_length:
                model.set_logn_length(evaluation.logn_length)
            if evaluation.state_dtype != getattr(model.config, "state_dtype", None):
                model.set_state_dtype(evaluation.state_dtype or "float32")
            with torch.autocast(device, torch.bfloat16, enabled=use_bfloat16):
                found = evaluation.evaluate(model, self.folder, _PartReporter(work, done))
            done += evaluation.num_steps
            outcome = {
                "evaluation": evaluation.as_json(),
                **found,
                "seconds": round(time.monotonic() - begun, 3),
                "environment": environment(device),
            }
            write_atomic(self._path(evaluation), json.dumps(outcome, indent=2) + "\n")

    def _path(self, evaluation: Evaluation) -> Path:
        return self.folder / "evaluations" / f"{evaluation.name}.json"

    def _outcome(self, evaluation: Evaluation) -> dict[str, Any] | None:
        """The outcome of an evaluation from its file; None if missing or of another evaluation."""
        path = self._path(evaluation)
        if not path.is_file():
            return None
        try:
            outcome = read_json(path)
            return outcome if outcome["evaluation"] == evaluation.as_json() else None
        except (KeyError, TypeError, ValueError):
            # Damaged outcomes are computed again.
            return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureJob:
    """The measurement of a figure without training, for one seed; see `Figure.measure`."""

    root: Path
    label: str
    figure: str
    measure: Callable[[int], list[dict[str, Any]]]
    seed: int

    @property
    def path(self) -> Path:
        """The file of the rows."""
        return self.root / f"{self.figure}-seed{self.seed}.json"

    @property
    def pattern(self) -> Path:
        """What matches the files of all seeds."""
        return self.root / f"{self.figure}-seed*.json"

    def is_done(self) -> bool:
        """Whether the rows of this seed exist and can be read."""
        try:
            return {"rows", "environment"} <= self.record().keys()
        except (AttributeError, FileNotFoundError, ValueError):
            return False

    def do(self, reporter: RemoteReporter) -> None:
        """Measure, and write the rows."""
        self.root.mkdir(parents=True, exist_ok=True)
        work = reporter.start(self.label, total=1)
        try:
            rows = self.measure(self.seed)
        except ImportError as error:
            raise ValueError(f"{self.figure}: {error}") from error
        record = {"rows": rows, "environment": environment("cpu")}
        write_atomic(self.path, json.dumps(record, indent=1) + "\n")
        work.update(1)

    def record(self) -> dict[str, Any]:
        """The rows, and the environment in which they were measured."""
        return read_json(self.path)

    def environments(self) -> list[dict[str, Any]]:
        """The environment in which the rows were measured."""
        return [self.record()["environment"]]


Job = RunJob | MeasureJob


def do_job(job: Job, reporter: RemoteReporter) -> None:
    """Do a job; the function that worker processes call."""
    job.do(reporter)


class _PartReporter:
    """A reporter for one of several evaluations that share a progress bar."""

    def __init__(self, work: RemoteWork, done_before: int) -> None:
        self._work = work
        self._done_before = done_before

    def start(self, label: str, *, total: int) -> _PartReporter:
        """Begin this part; label and total are ignored, as the bar has its own."""
        return self

    def update(self, done: int, *, note: str = "") -> None:
        self._work.update(self._done_before + done, note=note)

"""One training run and its answers, in a folder that only ever holds what is whole.

The folder of a run is sealed when the model in it is trained (`ovq.train.checkpoints`); until then it holds
checkpoints to go on from. Answers are files of their own, `evaluations/NAME.json`, each written in one piece.
So whatever ends the work, at any moment, it goes on from there.
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
from ovq.research.reproduce.asking import ask, num_parts
from ovq.research.reproduce.plan import is_same_run, run_name
from ovq.research.reproduce.questions import Question
from ovq.runtime.environment import environment
from ovq.runtime.files import write_atomic
from ovq.runtime.workers import RemoteReporter, RemoteWork
from ovq.train import loop
from ovq.train.checkpoints import fault, newest_checkpoint, seal
from ovq.train.config import CONFIG_FILE, RunConfig

TRAINING_FILE = "training.json"
"""How the training of a run went: seconds, parameters, where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunJob:
    """A run to train and questions to ask it, as far as that is not done yet.

    Attributes:
        config: The run.
        evaluations: The questions.
        root: The folder that the folders of runs are in.
        label: What to call the run in progress reports.
    """

    config: RunConfig
    evaluations: tuple[Question, ...]
    root: Path
    label: str

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.root / run_name(self.config)


def is_trained(job: RunJob) -> bool:
    """Whether the folder of a run holds its trained model, whole.

    Raises:
        ValueError: If it holds that of another configuration, which is left as it is.
    """
    if fault(job.folder) is not None:
        return False
    found = RunConfig.load(job.folder)
    if not is_same_run(found, job.config):
        raise ValueError(
            f"{job.folder}: expected the run of this configuration, found one that an earlier version has "
            "trained by another; move it away, or choose another --out"
        )
    return True


def answers(job: RunJob) -> list[dict[str, Any] | None]:
    """What is known to each question, None where it was not asked yet."""
    return [_read_answer(_answer_path(job, evaluation), evaluation) for evaluation in job.evaluations]


def training_record(job: RunJob) -> dict[str, Any]:
    """What `TRAINING_FILE` of a trained run holds."""
    return json.loads((job.folder / TRAINING_FILE).read_text())


def do_job(job: RunJob, reporter: RemoteReporter) -> None:
    """Train the model if it is not trained, and ask it what it was not asked.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If the folder holds another run, or the model cannot be asked.
    """
    # The bar of loading a model this small is over before it is seen.
    disable_progress_bar()
    if not is_trained(job):
        _train(job, reporter)
    missing = [
        evaluation for evaluation, answer in zip(job.evaluations, answers(job), strict=True) if answer is None
    ]
    if missing:
        _ask(job, missing, reporter)


def _train(job: RunJob, reporter: RemoteReporter) -> None:
    """Train the model, from the newest whole checkpoint if there is one, and seal the folder."""
    begun = time.monotonic()
    can_resume = (
        (job.folder / CONFIG_FILE).is_file()
        and is_same_run(RunConfig.load(job.folder), job.config)
        and newest_checkpoint(job.folder, reporter.say) is not None
    )
    label = f"train {job.label}"
    if can_resume:
        model = loop.resume(job.folder, reporter=reporter, label=label)
    else:
        # What is there was never finished, or is damaged.
        shutil.rmtree(job.folder, ignore_errors=True)
        model = loop.train(job.config, job.folder, reporter=reporter, label=label)
    record = {
        # Of a run that was interrupted only the last part is known.
        "seconds": None if can_resume else round(time.monotonic() - begun, 2),
        "num_parameters": model.num_parameters(),
        "environment": environment(model.device.type),
    }
    write_atomic(job.folder / TRAINING_FILE, json.dumps(record, indent=2) + "\n")
    seal(job.folder)
    for checkpoint in job.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _ask(job: RunJob, evaluations: list[Question], reporter: RemoteReporter) -> None:
    """Ask the trained model, and write each answer as it is there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OVQForCausalLM.from_pretrained(job.folder, local_files_only=True).to(device).eval()
    (job.folder / "evaluations").mkdir(exist_ok=True)
    work = reporter.start(f"test {job.label}", total=sum(map(num_parts, evaluations)))
    done = 0
    for evaluation in evaluations:
        # For models that open slots at random.
        set_seed(evaluation.seed)
        begun = time.monotonic()
        use_bfloat16 = job.config.train.precision == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=use_bfloat16):
            answer = ask(evaluation, model, job.folder, _PartReporter(work, done))
        done += num_parts(evaluation)
        answer = {
            "evaluation": evaluation.as_json(),
            **answer,
            "seconds": round(time.monotonic() - begun, 3),
            "environment": environment(device),
        }
        write_atomic(_answer_path(job, evaluation), json.dumps(answer, indent=2) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyJob:
    """A seed of a study.

    Attributes:
        name: That of the study.
        measure: See `Study`.
        seed: The seed.
        root: The folder that measured seeds are in.
    """

    name: str
    measure: Callable[[int], list[dict[str, Any]]]
    seed: int
    root: Path

    @property
    def path(self) -> Path:
        """Where the rows are kept."""
        return self.root / f"{self.name}-seed{self.seed}.json"

    @property
    def label(self) -> str:
        """What to call it in progress reports."""
        return f"{self.name}: seed {self.seed}"


def do_study(job: StudyJob, reporter: RemoteReporter) -> None:
    """Measure a seed of a study, and write its rows in one piece.

    Raises:
        ValueError: If a package is missing that only this study needs.
        OSError: If the folder cannot be written.
    """
    job.root.mkdir(parents=True, exist_ok=True)
    work = reporter.start(job.label, total=1)
    try:
        rows = job.measure(job.seed)
    except ImportError as error:
        raise ValueError(f"{job.name}: {error}") from error
    write_atomic(job.path, json.dumps({"rows": rows, "environment": environment("cpu")}, indent=1) + "\n")
    work.update(1)


class _PartReporter:
    """A reporter for one test of several that are shown as one piece of work."""

    def __init__(self, work: RemoteWork, done_before: int) -> None:
        self._work = work
        self._done_before = done_before

    def start(self, label: str, *, total: int) -> _PartReporter:
        """Begin this part; its label and total are known."""
        return self

    def update(self, done: int, *, note: str = "") -> None:
        """Say how far this part has come."""
        self._work.update(self._done_before + done, note=note)


def _answer_path(job: RunJob, evaluation: Question) -> Path:
    return job.folder / "evaluations" / f"{evaluation.name}.json"


def _read_answer(path: Path, evaluation: Question) -> dict[str, Any] | None:
    """The answer in a file, None if there is none to this very question."""
    if not path.is_file():
        return None
    answer = json.loads(path.read_text())
    return answer if answer["evaluation"] == evaluation.as_json() else None

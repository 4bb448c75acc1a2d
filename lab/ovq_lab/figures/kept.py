"""The figure `kept`: slots of the paper's rule and of "nearest" on a recall task, on the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ovq.ops.options import BEST_MERGE
from ovq.runtime.progress import WorkReporter
from ovq_lab.eval.rows import model_label
from ovq_lab.figures.evaluations import TaskEvaluation
from ovq_lab.figures.plan import Figure, Line, Panel
from ovq_lab.figures.presets import Preset
from ovq_lab.tasks import RecallTask

if TYPE_CHECKING:
    from ovq.hf import OVQForCausalLM

_RULES = ("existing", BEST_MERGE)
_LENGTH_FACTORS = (4, 16)
_SLOT_FACTORS = (1, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptEvaluation(TaskEvaluation):
    """Statistics of slots on a recall task; see `ovq_lab.eval.kept`."""

    known_as: ClassVar[str] = "KeptEvaluation"

    def evaluate(self, model: OVQForCausalLM, folder: Path, reporter: WorkReporter) -> dict[str, Any]:
        """The fields of a `KeptRow`."""
        from ovq_lab.eval.kept import evaluate_kept

        assert isinstance(self.task, RecallTask), "other tasks have no pairs"
        assert self.num_slots is not None, "the figure says how many"
        assert self.merge is not None, "the figure says which"
        row = evaluate_kept(
            model,
            self.task,
            num_slots=self.num_slots,
            merge=self.merge,
            num_examples=self.num_examples,
            seed=self.seed,
            reporter=reporter,
        )
        return dataclasses.asdict(row)


def kept(preset: Preset) -> Figure:
    """Pairs with a slot of their own, and the fill and age of slots."""
    config = preset.config("recall")
    trained = config.model.num_slots
    lengths = [preset.train_length("recall") * factor for factor in _LENGTH_FACTORS]
    tasks, lines = [preset.task("recall").at_length(n) for n in lengths], []
    for merge in _RULES:
        for num_slots in (trained * factor for factor in _SLOT_FACTORS):
            evaluations = [
                preset.evaluation(task, num_slots=num_slots, merge=merge, kind=KeptEvaluation)
                for task in tasks
            ]
            label = model_label("ovq", num_slots, merge=merge)
            lines.append(Line(label=label, config=config, evaluations=tuple(evaluations)))
    longest = max(lengths)
    part = f"{longest} tokens: by sixteenth of the context"
    return Figure(
        name="kept",
        title=f"What is kept of basic recall, trained with {trained} slots by the paper's rule",
        note="A pair has a slot of its own if the token that is read of it shares its slot with no such "
        "token of another pair, in one of the heads, when it is asked for. Tokens per slot and ages are "
        "those when the questions begin.",
        lines=tuple(lines),
        panels=(
            Panel(title="questions whose pair has a slot of its own", y="own_share"),
            Panel(title="where the pair has a slot of its own", y="own_accuracy"),
            Panel(title="where it has none", y="shared_accuracy"),
            Panel(title=f"{longest} tokens: tokens per slot", x="slices", y="slot_counts", at_length=longest),
            Panel(title=f"{part}, the oldest token of a slot", x="slices", y="oldest", at_length=longest),
            Panel(title=f"{part}, its mean token", x="slices", y="mean_position", at_length=longest),
        ),
    )

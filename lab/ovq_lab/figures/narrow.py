"""The figure `narrow`: slots in float32, bfloat16 and int8, at equal bytes."""

from __future__ import annotations

import dataclasses

from ovq.ops.narrow import STATE_DTYPES
from ovq.ops.options import BEST_MERGE
from ovq_lab.figures.plan import Figure, Line, Panel
from ovq_lab.figures.presets import Preset

# What is measured of each task.
_TASKS = {
    "recall": "accuracy",
    "positional": "accuracy",
    "mqar": "accuracy",
    "regression": "mean_error",
}


def narrow(preset: Preset) -> Figure:
    """Quality against bytes of state, by the format of the slots, on the same weights."""
    lines, panels = [], []
    for name, quality in _TASKS.items():
        task = preset.task(name).at_length(max(preset.near_lengths(name)))
        trained = preset.configs[name].model.num_slots
        sizes = [preset.evaluation(task, num_slots=trained * each, merge=BEST_MERGE) for each in (1, 2, 4, 8)]
        lines += [
            Line(
                label=f"slots in {state_dtype}",
                config=preset.config(name),
                evaluations=tuple(dataclasses.replace(each, state_dtype=state_dtype) for each in sizes),
                group=name,
            )
            for state_dtype in STATE_DTYPES
        ]
        title = f"{name}, {task.length} tokens: {quality.replace('_', ' ')}"
        panels.append(Panel(title=title, x="state_bytes", y=quality, group=name))
    return Figure(
        name="narrow",
        title="OVQ by nearest: slots in fewer bytes, on the same weights",
        note="From left to right, one to eight times as many slots as in training, which is by the paper's "
        "rule in float32.",
        lines=tuple(lines),
        panels=tuple(panels),
    )

"""The figure `layer`: what an OVQ layer may have besides its dictionary, at equal bytes."""

from __future__ import annotations

from typing import Any

from ovq.research.reproduce.plan import Figure, Line, Panel
from ovq.research.reproduce.presets import Preset


def layer(preset: Preset) -> Figure:
    """What an OVQ layer may have besides its dictionary, each option alone and all together."""
    lines, panels = [], []
    for task in ("recall", "positional"):
        usual = preset.configs[task].model
        for label, fields in _layer_options(
            usual.num_slots,
            usual.chunk_size,
            usual.head_dim or usual.hidden_size // usual.num_attention_heads,
        ).items():
            config = preset.config(task, **fields)
            for group, factor in (("as in training", 1), ("four times as many rows", 4)):
                exact = config.model.window + config.model.chunk_size
                num_slots = max(1, factor * usual.num_slots + usual.chunk_size - exact)
                evaluations = [
                    preset.evaluation(
                        preset.task(task).at_length(length), num_slots=num_slots, merge="ward-sqrt"
                    )
                    for length in reversed(preset.near_lengths(task)[::-2])
                ]
                lines.append(
                    Line(
                        label=label,
                        config=config,
                        evaluations=tuple(evaluations),
                        group=f"{task}, slots {group}",
                    )
                )
        panels += [
            Panel(title=f"{task}, {factor * usual.num_slots} slots", group=f"{task}, slots {group}")
            for group, factor in (("as in training", 1), ("four times as many rows", 4))
        ]
    return Figure(
        name="layer",
        title="What an OVQ layer may have besides its dictionary, at equal bytes",
        note="All are trained by the paper's rule and asked by Ward-sqrt. A state holds as many rows in all "
        "lines: a window takes the place of slots, or of half of the own chunk; sinks are slots. The weights "
        "of a merge gate add 4 bytes per row.",
        lines=tuple(lines),
        panels=tuple(panels),
    )


def _layer_options(num_slots: int, chunk_size: int, head_dim: int) -> dict[str, dict[str, Any]]:
    """Fields of the model by what they add to an OVQ layer of these sizes; rows are as many in each."""
    half = chunk_size // 2
    num_sinks = min(4, half - 1)
    sinks, gate, temperature = {"ovq_sinks": num_sinks}, {"merge_gate": True}, {"slot_temperature": True}
    return {
        "OVQ": {},
        "half chunks, as many tokens in a window": {"chunk_size": half, "window": half},
        "a window in the place of slots": {
            "window": chunk_size,
            "num_slots": max(1, num_slots - chunk_size),
        },
        f"{num_sinks} sinks": sinks,
        "merge gate": gate,
        "temperature of slots": temperature,
        "rotary embedding on half of the components of exact tokens": {"exact_rope_dim": head_dim // 2},
        "half chunks, window, sinks, gate and temperature": {
            "chunk_size": half,
            "window": half,
            **sinks,
            **gate,
            **temperature,
        },
    }

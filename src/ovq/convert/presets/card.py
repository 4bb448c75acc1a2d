"""The card of a preset: its model, the probe that found it, and measured losses."""

from __future__ import annotations

from itertools import chain
from typing import Any

from ovq.convert.config import MemoryConfig

_CARD = """\
# {name}

A memory of constant size for {model}, as `ovq convert` gives it: {rows:.0f} rows of a key
and a value per head on average ({num_sinks} first tokens, {least} to {most} slots, windows of {near} to {far}
tokens), allocated by the losses that a probe measured per head. Of the model's weights it has only a few
hundred, by which the model is recognised.

    ovq convert --model {model} --preset {name} --out converted

## How it was found

{probe}

## What was measured

{losses}
"""


def preset_card(*, name: str, model: str, config: MemoryConfig, measured: dict[str, Any]) -> str:
    """The text of a preset's README.md.

    Args:
        name: of the preset. model: name of the model.
        measured: may have `probe`, a list of texts with `text` (name) and `tokens`; `losses`, the same with
            the losses `full` and `converted`; `about`, a sentence on these losses; `dtype`; and
            `environment`, with the `processor`, versions, and optionally the commit.

    Example:
        >>> config = MemoryConfig(num_slots=[[8, 0]], window=[[32, 64]])
        >>> losses = [{"text": "a play", "tokens": 3072, "full": 3.2634, "converted": 3.2931}]
        >>> print(preset_card(name="a", model="b", config=config, measured={"losses": losses}))
        # a
        ...
        | text | tokens | full attention | converted |
        | --- | ---: | ---: | ---: |
        | a play | 3,072 | 3.263 | 3.293 |
    """
    slots, windows = (sorted(chain.from_iterable(table)) for table in (config.num_slots, config.window))
    return _CARD.format(
        name=name,
        model=model,
        rows=config.rows_per_head,
        num_sinks=config.num_sinks,
        least=slots[0],
        most=slots[-1],
        near=windows[0],
        far=windows[-1],
        probe=_probe(measured),
        losses=_losses(measured),
    )


def _probe(measured: dict[str, Any]) -> str:
    texts = [f"- {text['text']}, {text['tokens']:,} tokens" for text in measured.get("probe", [])]
    where = measured.get("environment", {})
    said = [f"{name} {where[name]}" for name in ("ovq", "commit", "torch", "transformers") if where.get(name)]
    if where.get("processor"):
        said.append(where["processor"])
    if measured.get("dtype"):
        said.append(measured["dtype"])
    lines = ["The probe read:", "", *texts] if texts else ["The texts of the probe are not recorded."]
    return "\n".join([*lines, "", f"({', '.join(said)})"] if said else lines)


def _losses(measured: dict[str, Any]) -> str:
    rows = measured.get("losses", [])
    if not rows:
        return "No losses are recorded."
    lines = [measured.get("about", "The loss of the last third of each text, in nats per token:"), ""]
    lines += ["| text | tokens | full attention | converted |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {r['text']} | {r['tokens']:,} | {r['full']:.3f} | {r['converted']:.3f} |" for r in rows]
    return "\n".join(lines)

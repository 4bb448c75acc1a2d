"""The model card of a run: the card of its model, plus training data, settings and losses."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ovq.hf import OVQForCausalLM
from ovq.hf.card import markdown_table, model_card, save_card
from ovq_lab.runtime.environment import environment
from ovq_lab.tasks import TextTask
from ovq_lab.text.readers import INSTALLED, LICENSES, parts_of, public_name
from ovq_lab.train.config import CONFIG_FILE, RunConfig
from ovq_lab.train.history import History


def save_run_card(
    model: OVQForCausalLM,
    config: RunConfig,
    run: Path,
    *,
    picture: Path | None,
    out: Path | None = None,
    name: str | None = None,
    results: str | None = None,
    license: str | None = None,
) -> bool:
    """Write the model card of a finished run into its folder or `out`, unless a user has written or edited
    one; returns whether it was written.

    `picture` is a figure of the losses, `name` that of the model (by default of the folder), `results` has
    evaluation results as Markdown, `license` is an identifier of the hub.
    """
    sections = {"Training": _training(config, History.load(run))}
    if results is not None:
        sections = {"Results": results, **sections}
    if any(getattr(mixer, "supports_logn", False) for mixer in model.mixers()):
        sections["Longer texts"] = _LONGER.format(length=max(config.train.lengths))
    if picture is not None:
        sections["Losses"] = f"![loss by step]({picture.name})"
    card = model_card(
        model,
        name=name or run.resolve().name,
        sections=sections,
        datasets=_hub_datasets(config),
        has_tokenizer=isinstance(config.task, TextTask),
        license=license,
    )
    return save_card(card, out or run, replaces=["Training", "Longer texts", "Losses"])


_LONGER = """\
It was trained on texts of up to {length} tokens. In far longer ones full attention, and dictionaries with
slots enough, answer more if their logits grow with the logarithm of the length:

```python
model.set_logn_length({length})
```"""


def _training(config: RunConfig, history: History) -> str:
    args = config.train
    num_tokens = sum(args.length_at(step) for step in range(args.steps)) * args.batch_size
    found = environment("cuda" if torch.cuda.is_available() else "cpu")
    rows = {
        "data": _data(config),
        **_licenses(config),
        "steps": f"{args.steps:,}, {args.batch_size:,} examples each; {num_tokens:,} tokens in all",
        "lengths": ", ".join(f"{length:,}" for length in args.lengths),
        "optimizer": f"AdamW, learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}",
        "precision": args.precision,
        "seed": str(args.seed),
    }
    if args.init_from is not None:
        rows["begun with the weights of"] = public_name(args.init_from)
    for name, losses in (("training loss", history.training), ("loss on held-out text", history.held_out)):
        if losses:
            step, loss = list(losses.items())[-1]
            rows[name] = f"{loss:.4f} nats per token at step {step:,}"
    rows["software"] = f"ovq {found['ovq']}, torch {found['torch']}, transformers {found['transformers']}"
    rows["hardware"] = found["processor"] if found["device"] == "cpu" else found["device"]
    return (
        markdown_table(("", ""), rows.items())
        + f"\n\n`{CONFIG_FILE}` holds every setting; `ovq train {CONFIG_FILE}` trains the model again."
    )


def _data(config: RunConfig) -> str:
    task = config.task
    if not isinstance(task, TextTask):
        return f"the synthetic task `{task.name}`"
    parts = ", ".join(f"`{public_name(part)}`" for part in parts_of(task.dataset))
    held_out = f"; {100 * task.held_out:g}% of the documents are held out" if task.held_out else ""
    return f"{parts}, tokenizer `{public_name(task.tokenizer)}`{held_out}"


def _licenses(config: RunConfig) -> dict[str, str]:
    """A row with the known licences of a corpus."""
    parts = parts_of(config.task.dataset) if isinstance(config.task, TextTask) else []
    known = {f"`{part}`: {LICENSES[part]}": None for part in parts if part in LICENSES}
    return {"licence of the data": "; ".join(known)} if known else {}


def _hub_datasets(config: RunConfig) -> list[str]:
    if not isinstance(config.task, TextTask):
        return []
    return [
        part
        for part in parts_of(config.task.dataset)
        if part not in INSTALLED and not Path(part).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", part)
    ]

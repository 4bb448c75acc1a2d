"""What options of the OVQ layer do to the loss on text: `python benchmarks/layer_on_text.py --out DIR`.

Language models as those of `ovq reproduce lm`, on the first seed, each with one change, are trained and read
by the paper's rule. Runs that are in DIR are not trained again (about seven minutes each, on one core).
`docs/results.md`, section 7, has the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ovq.research.reproduce.engine import Workshop
from ovq.research.reproduce.evaluations import LossEvaluation
from ovq.research.reproduce.plan import with_seed
from ovq.research.reproduce.presets import get_preset
from ovq.runtime.files import write_atomic
from ovq.runtime.progress import Reporter

EVERYWHERE = {"mixer_types": ("ovq",) * 4}
LAYERS: dict[str, dict[str, Any]] = {
    "merge gate": {"merge_gate": True},
    "temperature of slots": {"slot_temperature": True},
    "OVQ in every layer": EVERYWHERE,
    "OVQ in every layer, window of 128 in the place of slots, rotary embedding of exact tokens": {
        **EVERYWHERE,
        "window": 128,
        "num_slots": 384,
        "exact_rope_dim": 32,
    },
}


def main() -> None:
    """Write the losses to DIR/layer_on_text.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("layer-on-text"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    preset, reporter = get_preset("cpu"), Reporter(Console())
    shop = Workshop(out=out, preset="cpu", num_seeds=1, reporter=reporter)
    text, source = preset.text, preset.text_task("lm")
    loss = LossEvaluation(
        source=dataclasses.replace(source, join_to=text.length),
        length=text.length,
        num_examples=text.num_windows,
        merge="existing",
    )
    rows = []
    for label, fields in LAYERS.items():
        job = shop.job(with_seed(preset.config("lm", "ovq", **fields), 0), (loss,), label)
        if not job.is_done():
            job.do(reporter)
        (found,) = job.outcomes()
        assert found is not None
        kept = {name: found[name] for name in ("loss", "state_bytes", "position_losses")}
        rows.append({"line": label, "run": job.folder.name, **kept})
        print(f"{label}: {found['loss']:.4f}")
    write_atomic(out / "layer_on_text.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

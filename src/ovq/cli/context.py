"""`ovq context build` reads a document and saves the model's memory of it; `info` describes such a file."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli import options
from ovq.cli.common import check_file, check_model_path, print_table, read_text
from ovq.cli.loading import check_generating_folder, load_any_model, load_tokenizer
from ovq.prompts import check_chat_template, document_ids, encode, note_of_chat

if TYPE_CHECKING:
    from ovq.hf import ContextInfo
    from ovq.ops import OVQState

app = typer.Typer(help="Read a document once and continue from it any number of times.", no_args_is_help=True)


@app.command("build")
def build(
    model: options.Model,
    text: Annotated[
        str,
        typer.Option(
            help="File to read, or - for standard input: text if the model has a tokenizer, else token ids."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="For chats: as the system message, by the chat template.")
    ] = False,
    num_slots: options.NumSlots = None,
    merge: options.MergeRule = None,
    logn_length: options.LognLength = None,
    state_dtype: options.StateDtype = None,
    weight_dtype: options.WeightDtype = None,
    prefill_chunk_size: Annotated[
        int, typer.Option(min=1, help="Tokens read at a time; fewer need less memory.")
    ] = 2048,
    seed: options.SlotSeed = 0,
) -> None:
    """Read a document and save the memory of all layers, whose size does not depend on the document's length.

    Only the model that read the document can use the file, with the same --num-slots and --merge.

    Example: [bold]ovq context build --model runs/ovq --text book.txt --out book.ctx[/bold], and then
    [bold]ovq generate --model runs/ovq --context book.ctx --prompt "12 7"[/bold]
    """
    document = read_text(text, flag="--text")
    check_generating_folder(model)
    check_file("--out", out, text=text)
    check_model_path("--out", out)

    from transformers import set_seed

    from ovq.hf import build_context, save_context
    from ovq.runtime.progress import Reporter
    from ovq.runtime.units import format_bytes

    loaded = load_any_model(
        model,
        num_slots=num_slots,
        merge=merge,
        logn_length=logn_length,
        state_dtype=state_dtype,
        weight_dtype=weight_dtype,
    )
    tokenizer, vocab_size = load_tokenizer(model), loaded.config.vocab_size
    messages: list[dict[str, str]] = []
    if chat:
        check_chat_template(tokenizer, name="--chat")
        ids, messages = document_ids(document, tokenizer, vocab_size=vocab_size, name="--text")
    else:
        ids = encode(document, tokenizer, vocab_size=vocab_size, name="--text")
    set_seed(seed)
    with Reporter() as reporter:
        work = reporter.start(f"read {text}", total=len(ids))
        context = build_context(loaded, ids, prefill_chunk_size=prefill_chunk_size, progress=work.update)
    save_context(dataclasses.replace(context, note=note_of_chat(messages, ids)), out)
    size = format_bytes(out.stat().st_size)
    typer.echo(f"Saved what the model remembers of {len(ids)} tokens in {out} ({size}).")


@app.command("info")
def info(
    file: Annotated[Path, typer.Argument(help="A file that ovq context build has written.")],
    json_: options.Json = False,
) -> None:
    """Describe a saved context, layer by layer; the model is not needed.

    Example: [bold]ovq context info book.ctx[/bold]
    """
    # Imported from here, so that contexts of converted models can be read too.
    from ovq.convert import context_info

    found = context_info(file)
    layers = _layers(found)
    if json_:
        fields = {
            "file": str(file),
            "num_tokens": found.num_tokens,
            "bytes": found.nbytes,
            "dtype": found.dtype,
            "weights": found.weights,
            "layers": layers,
        }
        typer.echo(json.dumps(fields, indent=2))
        return

    from rich.table import Table

    from ovq.runtime.units import format_bytes

    typer.echo(f"{file}: what is kept of {found.num_tokens:,} tokens, {format_bytes(found.nbytes)}")
    table = Table()
    table.add_column("layer", justify="right")
    table.add_column("mixer", no_wrap=True)
    # With manual line breaks, because rich would truncate heads or mixers at 80 columns.
    for column in ("bytes", "slots\nin use", "fullest\nslot", "single\ntokens", "effective\nslots"):
        table.add_column(column, justify="right")
    for layer in layers:
        cells = [f"{layer['layer']}", layer["mixer"], format_bytes(layer["bytes"])]
        if "num_open" in layer:
            cells += [
                f"{layer['num_open']} of {layer['num_slots']}",
                f"{layer['largest_count']}",
                f"{layer['single_share']:.0%}",
                f"{layer['effective_slots']:.1f}",
            ]
        table.add_row(*cells)
    print_table(table)
    typer.echo(f"Of a model in {found.dtype.removeprefix('torch.')} with weights of SHA-256 {found.weights}.")


def _layers(found: ContextInfo) -> list[dict[str, Any]]:
    rows = []
    mixers = getattr(found.config, "mixer_types", None) or ["converted"] * len(found.cache.layers)
    for i, (name, layer) in enumerate(zip(mixers, found.cache.layers, strict=True)):
        row = {"layer": i, "mixer": name, "memory": layer.memory.kind, "bytes": layer.nbytes}
        if name == "converted":
            row |= _heads(layer.slot_states)
        elif layer.slot_states:
            summary = layer.slot_states[0].summary()
            row |= {
                "num_open": summary.num_open[0],
                "num_slots": summary.num_slots,
                "num_pending": summary.num_pending[0],
                "largest_count": summary.largest_count,
                "single_share": summary.single_share,
                "effective_slots": summary.effective_slots[0],
            }
        rows.append(row)
    return rows


def _heads(states: list[OVQState]) -> dict[str, Any]:
    """Statistics of all heads of a converted layer together, as their budgets differ."""
    from ovq.ops.summary import effective_slots

    counts = [count for state in states for count in state.count.flatten().tolist()]
    used = [count for count in counts if count]
    effective = [x for state in states for x in effective_slots(state.count).flatten().tolist()]
    return {
        "num_open": len(used),
        "num_slots": len(counts),
        "largest_count": max(used, default=0),
        "single_share": used.count(1) / max(1, len(used)),
        "effective_slots": statistics.fmean(effective),
    }

"""`ovq inspect`: show the memory of a model that reads a text, as one HTML page and as figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovq.cli import options
from ovq.cli.common import as_text, check_file, check_folder, print_table, read_text
from ovq.cli.loading import (
    check_generating_folder,
    is_converted,
    load_any_config,
    load_any_model,
    load_tokenizer,
)
from ovq.plugins import from_laboratory
from ovq.prompts import encode

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedConfig

    from ovq.inspect import InspectedText


def inspect(
    model: options.Model,
    text: Annotated[
        str | None,
        typer.Option(
            help="File to read, or - for standard input: text if the model has a tokenizer, else token ids."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text itself, instead of a file.")] = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("inspect.html"),
    figures: Annotated[Path | None, typer.Option(help="Folder for figures as PNG.")] = None,
    num_slots: options.NumSlots = None,
    merge: options.MergeRule = None,
    logn_length: options.LognLength = None,
    state_dtype: options.StateDtype = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Layer shown first, and in figures; default: the highest one with slots."),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(
            min=0, help="Query head shown first, and in figures; default: the one that attends most to slots."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=16_384, help="Tokens to read, from the beginning of the text.")
    ] = 4096,
    reads: Annotated[
        int, typer.Option(min=1, max=64, help="Largest attention weights to show per query.")
    ] = 8,
) -> None:
    """Let a model read a text, and show which tokens it keeps exactly, which it merges, and where it attends.

    The page is one file and needs no network: open it in a browser. It shows the first --max-tokens tokens.

    Example: [bold]ovq inspect --model runs/ovq --text book.txt --out book.html[/bold]

    The same weights with another dictionary, and figures: [bold]ovq inspect --model runs/ovq --text book.txt
    --merge nearest --num-slots 256 --figures figures[/bold]
    """
    if (text is None) == (prompt is None):
        raise ValueError("expected one of --text and --prompt, found both or neither")
    check_generating_folder(model)
    check_file("--out", out, text=text)
    check_folder("--figures", figures)
    given = as_text(prompt, flag="--prompt") if prompt is not None else read_text(str(text), flag="--text")
    if figures is not None:
        # Before reading, so that a missing extra does not waste it.
        save_figures = from_laboratory("ovq_lab.plots.memory:save_memory_figures", what="--figures")
    from ovq.inspect import inspect_text, token_pieces, write_page
    from ovq.runtime.progress import Reporter
    from ovq.runtime.units import format_bytes

    layers = _check_view(model, load_any_config(model), layer, head)
    loaded = load_any_model(
        model, num_slots=num_slots, merge=merge, logn_length=logn_length, state_dtype=state_dtype
    )
    tokenizer = load_tokenizer(model)
    flag = "--prompt" if prompt is not None else "--text"
    ids = encode(given, tokenizer, vocab_size=loaded.config.vocab_size, name=flag)
    name = "prompt" if text is None else "standard input" if text == "-" else Path(text).name
    with Reporter() as reporter:
        # Tokens are counted per layer.
        total = len(layers) * min(len(ids), max_tokens)
        work = reporter.start(f"read {name}", total=total)
        found = inspect_text(
            loaded,
            ids,
            token_pieces(given, ids, tokenizer),
            model_name=model.resolve().name,
            name=name,
            has_ids=tokenizer is None,
            max_tokens=max_tokens,
            num_reads=reads,
            work=work,
        )
    write_page(found, out, layer=layer, head=head)
    written = [f"{out} ({format_bytes(out.stat().st_size)})"]
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        written += map(str, save_figures(found, figures, layer=layer, head=head))
    print_table(_table(found))
    if found.num_given > found.num_tokens:
        typer.echo(f"Read the first {found.num_tokens:,} of {found.num_given:,} tokens (--max-tokens).")
    typer.echo(f"Wrote {', '.join(written)}")


def _check_view(model: Path, config: PreTrainedConfig, layer: int | None, head: int | None) -> list[int]:
    """Indices of the layers with slots.

    Raises:
        ValueError: If there are none, the layer is not one of them, or there is no such head.
    """
    layers = list(range(config.num_hidden_layers))
    if not is_converted(model):
        layers = [i for i in layers if config.mixer_types[i] == "ovq"]
    if not layers:
        raise ValueError(f"--model: expected one with 'ovq' layers, found mixer_types {config.mixer_types}")
    if layer is not None and layer not in layers:
        raise ValueError(f"--layer: expected an OVQ layer, one of {layers}, found {layer}")
    if head is not None and head >= config.num_attention_heads:
        raise ValueError(f"--head: expected 0 to {config.num_attention_heads - 1}, found {head}")
    return layers


def _table(found: InspectedText) -> Table:
    """Statistics of the tokens in each head, as a table for the terminal."""
    from rich.table import Table

    from ovq.inspect import LEVEL_NAMES, sharing

    table = Table(title=f"What is kept of {found.num_tokens:,} token{'s' * (found.num_tokens != 1)}")
    has_dropped = found.level_names == LEVEL_NAMES
    # With manual line breaks, because rich would truncate heads at 80 columns.
    for column in (
        "layer",
        "head",
        "slots\nin use",
        "exact or\nalone",
        "shared\nby 2-16",
        "by more",
        *(["dropped"] if has_dropped else []),
        "values\nkept",
    ):
        table.add_column(column, justify="right")
    for memory in found.layers:
        group = memory.num_heads // memory.num_kv_heads
        for kv_head in range(memory.num_kv_heads):
            shown, first = sharing(memory, kv_head), kv_head * group
            shares = [n / found.num_tokens for n in shown.num_tokens]
            table.add_row(
                str(memory.layer),
                str(first) if group == 1 else f"{first}-{first + group - 1}",
                f"{shown.num_open:,}/{memory.num_slots[kv_head]:,}",
                *(f"{share:.0%}" for share in (shown.exact_share, sum(shares[2:4]), sum(shares[4:6]))),
                *([f"{shares[6]:.0%}"] if has_dropped else []),
                f"{shown.kept_share:.0%}",
            )
    return table

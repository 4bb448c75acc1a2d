"""`ovq memory`: bytes of a model's state at any length, compared with the KV cache of full attention."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ovq.cli import options
from ovq.cli.common import parse_ints, print_table
from ovq.cli.loading import is_converted, load_any_config, load_config, refuse_options, set_options
from ovq.plugins import from_laboratory


def memory(
    config: Annotated[str, typer.Option(help="Folder of a trained or converted model, or a recipe.")],
    lengths: Annotated[str, typer.Option(help="Numbers of tokens.")] = "1024,4096,16384,65536,262144",
    num_slots: options.NumSlots = None,
    state_dtype: options.StateDtype = None,
    json_: options.Json = False,
) -> None:
    """Show the bytes of the state of one sequence, and of the KV cache that full attention would need.

    The compared model has full attention in its long-range layers and is otherwise the same; nothing is run.

    Example: [bold]ovq memory --config recall-ovq --lengths 4096,65536 --num-slots 1024[/bold]
    """
    at_lengths = parse_ints(lengths, flag="--lengths")
    if Path(config).is_dir() and is_converted(Path(config)):
        given = {"num_slots": num_slots, "state_dtype": state_dtype}
        refuse_options("a converted model", hint=": convert it again", **given)
        rows = _converted_bytes(Path(config), at_lengths)
    else:
        rows = _state_bytes(_load_config(config), at_lengths, num_slots, state_dtype)
    if json_:
        typer.echo(json.dumps({"config": config, "rows": rows}, indent=2))
        return

    from rich.table import Table

    from ovq.runtime.units import format_bytes

    table = Table(title=f"State of one sequence: {config}")
    for column in ("tokens", "this model", "with full attention", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        ours, full = row["state_bytes"], row["full_attention_bytes"]
        table.add_row(f"{row['length']}", format_bytes(ours), format_bytes(full), f"{full / ours:.1f}")
    print_table(table)


def _load_config(name: str) -> Any:
    """The `OVQConfig` in a folder or of a recipe."""
    if Path(name).is_dir():
        return load_config(Path(name))
    get_recipe = from_laboratory(
        "ovq_lab.train.recipes:get_recipe", what=f"--config: {name} is no folder; for a recipe"
    )
    try:
        recipe = get_recipe(name)
    except ValueError as error:
        what = str(error).removeprefix("recipe: expected ")
        raise ValueError(f"--config: expected a folder or a recipe: {what}") from error
    return from_laboratory("ovq_lab.train.loop:model_config", what="--config")(recipe)


def _state_bytes(
    config: Any, lengths: list[int], num_slots: int | None, state_dtype: str | None
) -> list[dict[str, int]]:
    """State bytes of the model and of its counterpart with full attention, one row per length."""
    import torch

    from ovq.hf import OVQForCausalLM

    twin = copy.deepcopy(config)
    twin.mixer_types = [
        name if name == "sliding_attention" else "full_attention" for name in config.mixer_types
    ]
    if "full_attention" not in twin.mixer_types:
        twin.mixer_types = ["full_attention"] * len(config.mixer_types)
    # Only shapes matter, so no weights are allocated.
    with torch.device("meta"):
        model, full = OVQForCausalLM(config), OVQForCausalLM(twin)
    set_options(model, num_slots=num_slots, state_dtype=state_dtype)
    return [
        {"length": n, "state_bytes": model.state_bytes(n), "full_attention_bytes": full.state_bytes(n)}
        for n in lengths
    ]


def _converted_bytes(folder: Path, lengths: list[int]) -> list[dict[str, int]]:
    """`_state_bytes` of a converted model, which has all of its memory from the first token on."""
    import torch

    from ovq.convert.attach import memory_config_in
    from ovq.convert.cache import MemoryCache

    config: Any = load_any_config(folder)
    memory = memory_config_in(folder)
    assert memory is not None
    cache, per_token = MemoryCache(memory), 0
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in cache.layers:
        like = torch.empty(1, layer.config.num_kv_heads, 1, dim, dtype=config.dtype, device="meta")
        layer.begin(like, like)
        per_token += 2 * like.nbytes
    return [
        {"length": n, "state_bytes": cache.nbytes, "full_attention_bytes": n * per_token} for n in lengths
    ]

"""`ovq convert`: give a pretrained model a memory of constant size, and save it."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli import options
from ovq.cli.common import check_new_folder, flag_of, given_options, read_text
from ovq.cli.pretrained import DTYPES, load_pretrained
from ovq.cli.probing import run_probe

if TYPE_CHECKING:
    from ovq.convert.presets import Preset

# docs/results/convert.md, "By rows".
_NO_PROBE = (
    "--no-probe: all heads are treated alike. Of 3,072 tokens of code, 256 rows per head then have a loss of "
    "1.96 nats per token, a window of 292 rows 1.85, 256 rows with a probe 1.64, and full attention 1.63 "
    "(SmolLM2-135M)"
)
_SIZES = ("rows", "num_slots", "window", "num_sinks", "chunk_size", "merge", "value_weight")
_PROBE = ("probe", "probe_tokens", "needle_weight", "fit_bias")
# By option, the options that have no effect beside it.
_EXCLUDED = {
    "no_probe": ("preset", "save_preset", *_PROBE),
    "preset": (*_SIZES, *_PROBE),
    "rows": ("num_slots",),
}


def convert(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Folder of a model of transformers, its name on the hub, or a GGUF file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows (a key and a value each) per head, on average; replaces --num-slots."),
    ] = None,
    num_slots: Annotated[
        int, typer.Option(min=0, help="Slots per head, on average; 0 for a sliding window alone.")
    ] = 256,
    window: Annotated[
        int, typer.Option(min=1, help="Last tokens that each head keeps exactly, a multiple of --chunk-size.")
    ] = 256,
    num_sinks: Annotated[int, typer.Option(min=0, help="First tokens kept exactly (attention sinks).")] = 4,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens merged at a time.")] = 32,
    merge: Annotated[str, typer.Option(help="Merge rule: nearest or existing (the paper's).")] = "nearest",
    value_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="Weight of distances between values in merges, relative to keys.",
        ),
    ] = 1.0,
    state_dtype: Annotated[
        str,
        options.one_of(
            options.STATE_DTYPES, "Data type of the slots: float32, bfloat16, or int8 with a scale per slot."
        ),
    ] = "float32",
    preset: Annotated[
        str,
        typer.Option(
            help="Rows per head, as an earlier probe found them: a folder, or a name on the hub. auto: the "
            "preset in this package for this model and about as many rows, if there is one and no "
            "option of the probe is given. none: a new probe."
        ),
    ] = "auto",
    probe: Annotated[
        str | None,
        typer.Option(
            help="Text file, or several with commas between them, for the probe: it tries many budgets on "
            "every head and gives each row to the head where it reduces the loss most. Default "
            "without a preset: an address and code that come with the package."
        ),
    ] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Give all heads equally many rows.")] = False,
    probe_tokens: Annotated[
        int,
        typer.Option(
            min=16,
            help="Tokens of each text of the probe, from its beginning, at most the model's "
            "max_position_embeddings; best as many as it is going to read.",
        ),
    ] = 3072,
    needle_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="Weight of a copy of the first text of the probe with numbers hidden in it, where each "
            "text has 1; 0 for none.",
        ),
    ] = 0.1,
    fit_bias: Annotated[
        bool, typer.Option(help="Fit a bias of the slots' attention logits to the texts of the probe.")
    ] = True,
    save_preset: Annotated[
        Path | None,
        typer.Option(help="Folder to save the result of the probe in, for --preset; it must not exist."),
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option(help="Name of a GGUF file in the folder or repository --model.")
    ] = None,
    dtype: Annotated[
        str,
        options.one_of(
            DTYPES,
            "Data type of the weights: float32, bfloat16, float16, or auto: the model's own, or 16 bits if "
            "that loses nothing.",
        ),
    ] = "auto",
) -> None:
    """Give a pretrained Llama, Qwen, Mistral or similar model a memory of constant size. Nothing is trained.

    The new folder has the weights of the original, and one more field in its config. Use it with [bold]ovq
    generate[/bold], [bold]ovq chat[/bold], [bold]ovq serve[/bold] or [bold]ovq.convert.load[/bold].

    Example: [bold]ovq convert --model HuggingFaceTB/SmolLM2-135M-Instruct --out smol --rows 768[/bold]
    """
    given = given_options(context)
    if preset in ("auto", "none"):
        given.discard("preset")
    for name, others in _EXCLUDED.items():
        if name in given and (found := [other for other in others if other in given]):
            raise ValueError(f"{flag_of(found[0])}: expected none with {flag_of(name)}, found one")
    if not math.isfinite(needle_weight):
        raise ValueError(f"--needle-weight: expected a finite number, found {needle_weight}")
    texts = {} if probe is None else _read_texts(probe)
    check_new_folder("--out", out)
    if save_preset is not None:
        check_new_folder("--save-preset", save_preset)
        if save_preset.resolve() == out.resolve():
            raise ValueError(
                f"--save-preset: expected another folder than that of --out, found {save_preset}"
            )
    if rows is not None:
        # Window and slots if all heads are alike; a probe allocates their sum to heads.
        if "window" not in given:
            window = max(1, min(window, rows // 3) // chunk_size) * chunk_size
        num_slots = rows - num_sinks - window
        if num_slots < 0:
            least = num_sinks + window
            raise ValueError(f"--rows: expected at least {least}, for sinks and the window, found {rows}")
        if num_slots and "window" in given and not no_probe:
            raise ValueError("--window: expected --no-probe beside it and --rows, found none")
    wanted = num_sinks + num_slots + window

    from ovq.convert import MemoryConfig, attach
    from ovq.convert.card import converted_card
    from ovq.convert.presets import save_preset as write_preset
    from ovq.runtime.files import atomic_folder
    from ovq.runtime.progress import Reporter

    say = Reporter().say
    settings: dict[str, Any] = {"num_sinks": num_sinks, "chunk_size": chunk_size, "merge": merge}
    settings["value_weight"] = value_weight
    # Refuse values out of range before the model is loaded.
    MemoryConfig.uniform(num_layers=1, num_kv_heads=1, num_slots=num_slots, window=window, **settings)
    original, tokenizer = load_pretrained(model, gguf_file=gguf_file, dtype=dtype, say=say)
    chosen, origin = None, "all heads alike"
    if no_probe:
        say(f"warning: {_NO_PROBE}")
    # With a window alone, there is nothing to allocate.
    elif num_slots or given & {"preset", "save_preset", *_PROBE}:
        chosen = None if given & {*_PROBE} else _preset(preset, original, wanted, settings, say)
        if chosen is not None:
            say(f"Preset {chosen.name}: {chosen.rows} rows per head, as a probe of that model allocated them")
            origin = f"allocated by the preset {chosen.name}"
        else:
            chosen = run_probe(
                original,
                tokenizer,
                texts,
                name=model,
                rows=wanted,
                num_tokens=probe_tokens,
                needle_weight=needle_weight,
                fit_bias=fit_bias,
                settings=settings,
            )
            origin = f"allocated by a probe of {', '.join(x['text'] for x in chosen.measured['probe'])}"
        if save_preset is not None:
            write_preset(dataclasses.replace(chosen, name=save_preset.resolve().name), save_preset)
            say(f"Saved what the probe has found in {save_preset} (--preset {save_preset})")
    if tokenizer is None:
        say(f"{model} has no tokenizer: the converted model reads token ids")
    alike = {"num_slots": num_slots, "window": window, **settings}
    memory = alike if chosen is None else {"config": chosen.config}
    converted = attach(original, **memory, state_dtype=state_dtype)
    card = converted_card(converted, original=model, name=out.name, how=origin)
    with atomic_folder(out) as temporary:
        converted.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    average = converted.memory_config.rows_per_head
    typer.echo(
        f"Saved a model that keeps {average:.0f} rows per head on average in {out}. Next:\n"
        f"ovq generate --model {shlex.quote(str(out))} {_prompt(tokenizer)}"
    )


def _read_texts(files: str) -> dict[str, str]:
    """The texts of `--probe` by file name, or by path if file names repeat."""
    paths = [path for path in files.split(",") if path]
    if not paths:
        raise ValueError(f"--probe: expected text files with commas between them, found {files!r}")
    is_clear = len({Path(path).name for path in paths}) == len(set(paths))
    return {Path(path).name if is_clear else path: read_text(path, flag="--probe") for path in paths}


def _preset(
    name: str, model: Any, rows: int, settings: dict[str, Any], say: Callable[[str], None]
) -> Preset | None:
    """The requested preset, checked to be for this model; None if a probe is needed."""
    from ovq.convert.presets import find_preset, load_preset, packaged_presets, presets_of

    if name == "none":
        return None
    if name == "auto":
        # Presets were made with `value_weight` 1, which multiplies the weights that a probe finds.
        if (found := find_preset(model, rows)) and settings == {**_settings_of(found), "value_weight": 1.0}:
            return found
        if others := presets_of(model):
            sizes = ", ".join(f"{preset.rows}" for preset in others)
            fixed = ", ".join(f"{name} {value}" for name, value in _settings_of(others[0]).items())
            say(f"The presets of this model have {sizes} rows per head ({fixed}), none as requested")
        return None
    packaged = {preset.name: preset for preset in packaged_presets()}
    try:
        if name in packaged and not Path(name).exists():
            preset = packaged[name]
        else:
            preset = load_preset(_folder_of(name))
        preset.check(model)
    except ValueError as error:
        raise ValueError(f"--preset: {error}") from error
    return preset


def _settings_of(preset: Preset) -> dict[str, Any]:
    return {name: getattr(preset.config, name) for name in ("num_sinks", "chunk_size", "merge")}


def _folder_of(name: str) -> Path:
    """The folder of a preset, downloaded from the hub if there is no local folder of this name."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["preset.*", "README.md"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"expected a folder or a name on the hub, found {name} ({error})") from error


def _prompt(tokenizer: Any) -> str:
    """Example options of `ovq generate` for a model."""
    if tokenizer is None:
        return '--prompt "12 7 33"'
    is_chat = getattr(tokenizer, "chat_template", None) is not None
    return '--chat --prompt "Name three fruits."' if is_chat else '--prompt "Once upon a time"'

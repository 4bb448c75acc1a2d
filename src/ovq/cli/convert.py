"""`ovq convert`: give a pretrained model a memory of constant size, and save it."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli.common import check_new_folder, out_console, read_text
from ovq.cli.loading import FOREIGN_ERRORS

if TYPE_CHECKING:
    from ovq.convert import MemoryConfig

_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of the numbers that are hidden in a text of the probe.
_NEEDLE_SEED = 7


def convert(
    model: Annotated[
        str,
        typer.Option(help="Folder of a model of transformers, or its name on the hub.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.", show_default=False)],
    num_slots: Annotated[int, typer.Option(min=0, help="Slots per head.")] = 256,
    window: Annotated[
        int,
        typer.Option(min=1, help="Last tokens per head that are kept exactly, a multiple of --chunk-size."),
    ] = 256,
    num_sinks: Annotated[int, typer.Option(min=0, help="First tokens that are kept exactly.")] = 4,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens merged at a time.")] = 32,
    merge: Annotated[str, typer.Option(help="nearest or existing (the paper's rule).")] = "nearest",
    value_weight: Annotated[
        float, typer.Option(min=0, help="Weight of distances between values, relative to keys.")
    ] = 1.0,
    probe: Annotated[
        str | None,
        typer.Option(
            help="Text file, or several with commas between them: try many budgets on every head, and share "
            "out the sum of rows that the options above give, by what heads lose.",
            show_default=False,
        ),
    ] = None,
    probe_tokens: Annotated[
        int,
        typer.Option(
            min=16,
            help="Tokens of each of these texts, from its beginning: as many as are to be read, if possible.",
        ),
    ] = 3072,
    needle_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="Weight of numbers hidden in the first of these texts, where each text has 1; 0 for none.",
        ),
    ] = 0.1,
    fit_bias: Annotated[
        bool,
        typer.Option(help="With --probe, fit to its texts how much of the attention slots get."),
    ] = True,
    gguf_file: Annotated[
        str | None, typer.Option(help="Name of a GGUF file in --model to load.", show_default=False)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto for what the model has.")
    ] = "auto",
) -> None:
    """Give a pretrained Llama, Qwen, Mistral or similar model a memory of constant size. Nothing is trained.

    The folder is that of the original with one more field in its config. Use it with [bold]ovq
    generate[/bold], [bold]ovq context[/bold] or [bold]ovq.convert.load[/bold].

    Example: [bold]ovq convert --model HuggingFaceTB/SmolLM2-135M-Instruct --out smol --num-slots 512
    --window 256 --probe book.txt,code.txt[/bold]
    """
    texts = [read_text(name, flag="--probe") for name in probe.split(",")] if probe is not None else []
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype: expected {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, found {dtype!r}")
    check_new_folder("--out", out)

    from ovq.convert import attach

    settings: dict[str, Any] = {
        "num_sinks": num_sinks,
        "chunk_size": chunk_size,
        "merge": merge,
        "value_weight": value_weight,
    }
    original, tokenizer = _load(model, gguf_file, dtype)
    config = None
    if texts:
        if tokenizer is None:
            raise ValueError(f"--probe: expected a model with a tokenizer, found none in {model}")
        rows = num_sinks + num_slots + window
        config = _probed(
            original,
            tokenizer,
            texts,
            rows=rows,
            num_tokens=probe_tokens,
            needle_weight=needle_weight,
            has_fit=fit_bias,
            settings=settings,
        )
    converted = attach(original, num_slots=num_slots, window=window, **settings, config=config)
    # Beside its place, so that moving it there is one step.
    temporary = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    try:
        converted.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    average = converted.memory_config.rows_per_head
    out_console.print(
        f"Saved a model that keeps {average:.0f} rows per head on average in {out}.", soft_wrap=True
    )


def _load(name: str, gguf_file: str | None, dtype: str) -> tuple[Any, Any]:
    """The model, and its tokenizer or None."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    if gguf_file is not None:
        try:
            importlib.import_module("gguf")
        except ImportError:
            raise ValueError(
                "--gguf-file: expected the package gguf, found none: pip install 'ovq[convert]'"
            ) from None
        options["gguf_file"] = gguf_file
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options).eval()
    except (*FOREIGN_ERRORS, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"--model: expected a causal language model, found {name!r} ({error})") from error
    if gguf_file is not None:
        model = _unquantized(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    # The tokenizers library raises plain exceptions; token ids can be read without a tokenizer.
    except Exception:
        tokenizer = None
    return model, tokenizer


def _unquantized(model: Any) -> Any:
    """The same weights, which loading has dequantised, in a model that transformers agrees to save."""
    fields = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = type(model)(type(model.config)(**fields)).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def _probed(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    *,
    rows: int,
    num_tokens: int,
    needle_weight: float,
    has_fit: bool,
    settings: dict[str, Any],
) -> MemoryConfig:
    """The budgets that a probe finds, with `rows` rows per head on average, and biases if `has_fit`."""
    import numpy as np
    import torch

    from ovq.convert import Captures, default_options, fitted_bias, hidden_numbers, probe
    from ovq.runtime.progress import Reporter

    ids = [torch.tensor(tokenizer(text, verbose=False)["input_ids"][:num_tokens]) for text in texts]
    targets: list[torch.Tensor | None] = [None] * len(ids)
    weights = [1.0] * len(ids)
    if needle_weight:
        random = np.random.default_rng(_NEEDLE_SEED)
        try:
            found = hidden_numbers(tokenizer, texts[0], len(ids[0]), random=random)
        except ValueError as error:
            raise ValueError(
                f"--needle-weight: expected 0 with so few tokens, found {needle_weight} ({error})"
            ) from error
        ids.append(torch.from_numpy(found[0]))
        targets.append(torch.from_numpy(found[1]))
        weights.append(needle_weight)
    num_sinks, chunk_size = settings["num_sinks"], settings["chunk_size"]
    length = max(map(len, ids))
    options = default_options(rows, num_sinks=num_sinks, chunk_size=chunk_size, length=length)
    # Each text is read once for both.
    with Reporter() as reporter, Captures(model) as captures:
        work = reporter.start("probe", total=len(ids) * len(options))
        probed = probe(
            model,
            ids,
            options=options,
            targets=targets,
            weights=weights,
            **settings,
            captures=captures,
            progress=work.update,
        )
        config = probed.config(rows)
        if has_fit:
            work = reporter.start("bias", total=len(texts))
            given: dict[str, Any] = {"captures": captures, "progress": work.update}
            config = fitted_bias(model, ids[: len(texts)], config, **given)
    return config

"""`ovq bench`: how fast OVQ attention is on this machine, compared with exact attention."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli.common import (
    check_folder,
    flag_of,
    given_options,
    out_console,
    parse_ints,
    print_table,
    read_text,
)
from ovq.cli.loading import is_converted as has_memory
from ovq.cli.loading import load_any_config, load_tokenizer
from ovq.cli.options import Json
from ovq.prompts import encode
from ovq_lab.bench import PARTS, check_chosen
from ovq_lab.cli import dictionaries

if TYPE_CHECKING:
    from ovq.runtime.progress import WorkReporter
    from ovq_lab.bench.pretrained_suite import PretrainedSuite

_LENGTHS = "1024, 2048, 4096, 8192, 16384, 32768, 65536"
_TRAINED = "2048, 8192, 32768"
_READ = "1024, 4096, 8192, 16384"
_SIZES = ("num_slots", "merge", "chunk_size", "num_heads", "head_dim")
# Options that not every kind of --what reads; None stands for several parts of the op, or one with lengths.
_OPTIONS: dict[str | None, tuple[str, ...]] = {
    None: ("lengths", "long", "dtypes", *_SIZES),
    "stream": _SIZES,
    "model": ("lengths", "long", "models", "sizes", "prompts"),
    "converted": ("lengths", "long", "model", "text", "gguf", "llama_cpp", "openvino", "genai"),
}


def bench(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Option(
            help="Parts to measure: forward, forward_backward, decode, memory, stream (CPU only); default: "
            "all. Or one of these alone, on a CPU: model (whole models) or converted (a converted "
            "model beside other runtimes)."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers of tokens. Default: {_LENGTHS}; with --what model: {_TRAINED} (training steps); "
            f"with --what converted: {_READ}."
        ),
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="Measure 131072 tokens too.")] = False,
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16 or both.")] = "float32,bfloat16",
    num_slots: Annotated[str, typer.Option(help="Slots per head of OVQ.")] = "256,1024,4096",
    merge: Annotated[
        str, typer.Option(help="Merge rules of OVQ: existing (the paper's), updated, nearest.")
    ] = "existing",
    chunk_size: Annotated[int, typer.Option(min=1, help="Chunk size of OVQ, and width of the window.")] = 256,
    num_heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Dimension of a head.")] = 64,
    models: Annotated[
        str,
        typer.Option(
            help="With --what model: some of llama, ovq, full_attention, mamba2, gated_deltanet; the first "
            "is the baseline."
        ),
    ] = "llama,ovq",
    sizes: Annotated[str, typer.Option(help="With --what model: some of 2M, 30M, 135M.")] = "30M",
    prompts: Annotated[
        str, typer.Option(help="With --what model: tokens of the prompts before generation.")
    ] = "1024,8192,65536",
    model: Annotated[
        Path | None, typer.Option(help="With --what converted: folder of the converted model.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="With --what converted: a text to read.")] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="With --what converted: the original as a GGUF file, for llama.cpp.")
    ] = None,
    llama_cpp: Annotated[
        str | None, typer.Option(help="Python with llama-cpp-python; default: this one.")
    ] = None,
    openvino: Annotated[
        Path | None,
        typer.Option(help="With --what converted: the original in OpenVINO's format."),
    ] = None,
    genai: Annotated[str | None, typer.Option(help="Python with openvino-genai; default: this one.")] = None,
    as_json: Json = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench-out"),
) -> None:
    """Measure the time and memory of OVQ, exact attention (SDPA) and a sliding window on this machine.

    Cells show the median time, the speedup over SDPA, and the fraction of the rate of matrix products
    measured in the same run. The default takes about a quarter of an hour on two cores, nearly all of it for
    exact attention at 64k. With --merge existing,nearest the rule with the best recall is measured beside the
    paper's, on independent random keys, its slowest case.

    With --device cuda each backend of SDPA is measured by itself, beside a window of FlexAttention and, where
    flash-linear-attention is installed, Gated DeltaNet and Mamba2. Speedups are then over the fastest SDPA,
    and the trace shows whether the intended kernels ran.

    With --what model, training steps (forward, loss, backward, optimizer) and generate() of models with
    random weights are measured, beside transformers' Llama of equal size with SDPA and its dynamic cache.
    The fraction then counts the products with weights alone.

    With --what converted, a model of ovq convert reads a text and generates tokens after each length, beside
    transformers with its full cache and, if --gguf and --openvino are given, llama.cpp and OpenVINO GenAI,
    the latter with a full cache, one of as many rows, and one of as many bytes. Each runs in its own process.

    Example: [bold]ovq bench --what forward --lengths 4096,16384 --num-slots 1024[/bold]
    """
    # All arguments are validated before anything is measured.
    kinds = [] if what is None else [name.strip() for name in what.split(",")]
    if len(kinds) > 1 and {"model", "converted"} & set(kinds):
        raise ValueError(f"--what: expected model or converted alone, found {what}")
    kind = kinds[0] if len(kinds) == 1 and kinds[0] in _OPTIONS else None
    is_model, is_converted = kind == "model", kind == "converted"
    others = {name for names in _OPTIONS.values() for name in names} - {*_OPTIONS[kind]}
    if unused := sorted(given_options(context) & others):
        raise ValueError(
            f"{flag_of(unused[0])}: expected none with --what {what or ','.join(PARTS)}, "
            f"found {context.params[unused[0]]}"
        )
    dtype_names = [name.strip() for name in dtypes.split(",")]
    check_chosen("--dtypes", dtype_names, ("float32", "bfloat16"))
    if kinds and not (is_model or is_converted):
        check_chosen("--what", kinds, PARTS)
    if lengths is None:
        lengths = _TRAINED if is_model else _READ if is_converted else _LENGTHS
    at_lengths = sorted({*parse_ints(lengths, flag="--lengths"), *([131072] if long else [])})
    tested = dictionaries.parse(num_slots, [merge])
    check_folder("--out", out)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, found {device!r}")
    if kind is not None and device != "cpu":
        raise ValueError(f"--device: expected cpu with --what {kind}, found {device}")
    if is_converted:
        peers = {"gguf": gguf, "llama_cpp": llama_cpp, "openvino": openvino, "genai": genai}
        suite_of_peers = _pretrained_suite(model, text, peers, at_lengths)
        from ovq_lab.bench.pretrained_suite import run_pretrained

        run = partial(run_pretrained, suite_of_peers)
    elif is_model:
        from ovq_lab.bench.model_suite import ModelSuite, run_models

        models_suite = ModelSuite(
            models=[name.strip() for name in models.split(",")],
            sizes=[name.strip() for name in sizes.split(",")],
            lengths=at_lengths,
            prompts=sorted(parse_ints(prompts, flag="--prompts")),
        )
        run = partial(run_models, models_suite)
    else:
        from ovq_lab.bench.suite import Suite, run_suite

        parts = [name for name in PARTS if device == "cpu" or name != "stream"]
        suite = Suite(
            parts=kinds or parts,
            lengths=at_lengths,
            dtypes=dtype_names,
            **tested,
            chunk_size=chunk_size,
            num_heads=num_heads,
            head_dim=head_dim,
            device=device,
        )
        run = partial(run_suite, suite)
    _measure(run, out, as_json=as_json)


def _pretrained_suite(
    model: Path | None, text: Path | None, peers: dict[str, Any], lengths: list[int]
) -> PretrainedSuite:
    """The suite of `--what converted`; `peers` are files and interpreters of other runtimes, or None."""
    if model is None or text is None:
        raise ValueError("--what converted: expected --model and --text, found one of them or none")
    if not has_memory(model):
        raise ValueError(f"--model: expected a folder that ovq convert has written, found {model}")
    for name, is_there, kind in (("gguf", Path.is_file, "a file"), ("openvino", Path.is_dir, "a folder")):
        if (path := peers[name]) is not None and not is_there(path):
            raise ValueError(f"--{name}: expected {kind}, found none at {path}")
    for name, beside in (("llama_cpp", "gguf"), ("genai", "openvino")):
        flag, python = flag_of(name), peers[name]
        if python is not None and shutil.which(python) is None:
            raise ValueError(f"{flag}: expected an interpreter of Python, found none at {python}")
        if python is not None and peers[beside] is None:
            raise ValueError(f"{flag}: expected --{beside} beside it, found none")
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ValueError(f"--model: expected a tokenizer in {model}, found none")
    from ovq_lab.bench.pretrained_suite import PretrainedSuite

    num_ids = load_any_config(model).vocab_size
    ids = encode(read_text(str(text), flag="--text"), tokenizer, vocab_size=num_ids, name="--text")
    given = {name: value for name, value in peers.items() if value is not None}
    return PretrainedSuite(model=model, tokens=ids, lengths=lengths, **given)


def _measure(run: Callable[[WorkReporter], dict], out: Path, *, as_json: bool) -> None:
    """Run a suite, write its report and figures, and print it."""
    from ovq.runtime.files import write_atomic
    from ovq.runtime.progress import Reporter
    from ovq_lab.bench.show import save_figures, sentences, tables

    out.mkdir(parents=True, exist_ok=True)
    with Reporter() as reporter:
        report = run(reporter)
    write_atomic(out / "bench.json", json.dumps(report, indent=1))
    paths = save_figures(report, out)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    env = report["environment"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in report["matrix_rate"].items())
    where = env["device"]
    if where == "cpu":
        processor = ", ".join([env["processor"], *env["features"]])
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        where = f"{processor}, {threads}, CPU kernels {env['cpu_kernels']}"
    backends = "".join(f", backend {backend} ({part})" for part, backend in env["backends"].items())
    copies = f", copies {report['copy_rate'] / 1e9:.0f} GB/s" if "copy_rate" in report else ""
    products = f", matrix products {rates}" if rates else ""
    out_console.print(
        f"{where}, torch {env['torch']}{backends}{products}{copies}",
        highlight=False,
    )
    for table in tables(report):
        print_table(table)
    for sentence in sentences(report):
        out_console.print(sentence, highlight=False)
    written = ", ".join(str(path) for path in (out / "bench.json", *paths))
    typer.echo(f"Wrote {written}")

"""`ovq bench`: how fast OVQ attention is on this machine, compared with exact attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ovq.cli.common import out_console, parse_ints


def bench(
    what: Annotated[
        str | None,
        typer.Option(
            help="Parts to measure: forward, forward_backward, decode, memory, stream (CPU only). "
            "Default: all of them."
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Numbers of tokens.")
    ] = "1024,2048,4096,8192,16384,32768,65536",
    long: Annotated[bool, typer.Option("--long", help="Measure 131072 tokens too.")] = False,
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16 or both.")] = "float32,bfloat16",
    num_slots: Annotated[str, typer.Option(help="Dictionary sizes of OVQ.")] = "256,1024,4096",
    chunk_size: Annotated[int, typer.Option(min=1, help="Chunk of OVQ, and width of the window.")] = 256,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Components per head.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench-out"),
) -> None:
    """Measure the time and memory of OVQ, exact attention (SDPA) and a sliding window on this machine.

    Cells show the median time, how many times faster than SDPA that is, and the share of the matrix rate
    measured in the same run. The default takes about a quarter of an hour on two cores, nearly all of it for
    exact attention at 64k.

    With --device cuda each backend of SDPA is measured by itself, beside a window of FlexAttention and, where
    flash-linear-attention is installed, Gated DeltaNet and Mamba2. Times faster are then relative to the
    fastest SDPA, and the trace is searched for the kernels that were meant to run.

    Example: [bold]ovq bench --what forward --lengths 4096,16384 --num-slots 1024[/bold]
    """
    # Everything that can be wrong is checked before anything is measured.
    at_lengths = sorted({*parse_ints(lengths, flag="--lengths"), *([131072] if long else [])})
    sizes = parse_ints(num_slots, flag="--num-slots")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, found {device!r}")
    from ovq.research.bench.show import save_figures, sentences, tables
    from ovq.research.bench.suite import PARTS, Suite, run_suite
    from ovq.runtime.files import write_atomic
    from ovq.runtime.progress import Reporter

    parts = [name for name in PARTS if device == "cpu" or name != "stream"]
    suite = Suite(
        parts=parts if what is None else [name.strip() for name in what.split(",")],
        lengths=at_lengths,
        dtypes=[name.strip() for name in dtypes.split(",")],
        num_slots=sizes,
        chunk_size=chunk_size,
        num_heads=num_heads,
        head_dim=head_dim,
        device=device,
    )
    out.mkdir(parents=True, exist_ok=True)
    with Reporter() as reporter:
        work = reporter.start("measuring", total=suite.total)
        report = run_suite(suite, lambda done, note: work.update(done, note=note))
    write_atomic(out / "bench.json", json.dumps(report, indent=1))
    paths = save_figures(report, out)
    env = report["environment"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in report["matrix_rate"].items())
    where = env["device"]
    if device == "cpu":
        where = f"{env['processor']}, {env['threads']} threads, CPU kernels {env['cpu_kernels']}"
    backends = ", ".join(f"{backend} ({part})" for part, backend in env["backends"].items())
    copies = f", copies {report['copy_rate'] / 1e9:.0f} GB/s" if "copy_rate" in report else ""
    out_console.print(
        f"{where}, torch {env['torch']}, backends {backends}, matrix products {rates}{copies}",
        highlight=False,
    )
    for table in tables(report):
        # Wide enough for all columns when the output goes to a file or a pipe.
        out_console.print(table, width=None if out_console.is_terminal else 150)
    for sentence in sentences(report):
        out_console.print(sentence, highlight=False)
    written = ", ".join(str(path) for path in (out / "bench.json", *paths))
    # A path broken over two lines could not be copied.
    out_console.print(f"Wrote {written}", highlight=False, soft_wrap=True)

"""Parity, times and a profile of the Triton kernels on a GPU, in one call of under six minutes.

    python benchmarks/gpu_report.py --out gpu-report
    python benchmarks/gpu_report.py --dry-run        # list the parts; needs no GPU

Each part runs in a process of its own with a time limit, and hands over row after row, so that what was done
when a part fails or its time is up is kept. `report.json` and `report.md` are written anew after each part.
Exit code 1 if results of the kernels are not those of the reference or a part failed, 2 without a GPU. Other
mixers are measured beside them by `ovq bench --device cuda`.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ovq.ops import OVQState, backend_used, ovq_attention
from ovq.runtime.files import write_atomic
from ovq_lab.bench import gpu
from ovq_lab.bench.measure import spread
from ovq_lab.bench.workloads import Workload
from ovq_lab.runtime.environment import environment

# Time limit of all parts together, so that a call stays below six minutes.
SECONDS = 340
RULES = ("existing", "nearest")
# The size of the targets and of the estimates in docs/method/triton.md.
SIZE = {"dtype": "bfloat16", "chunk_size": 256, "num_heads": 16, "head_dim": 128}
NUM_SLOTS = 2048
# Tensors of slots that not every state has.
OPTIONAL = ("weight", "key_step", "value_step")

Row = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        name: name for `--part`.
        seconds: time limit; time that earlier parts did not use is not added.
        what: one-line description.
        rows: generator of the measured rows.
    """

    name: str
    seconds: int
    what: str
    rows: Callable[[], Iterator[Row]]


def parity_row(
    merge: str,
    dtype: str,
    length: int,
    num_slots: int,
    chunk_size: int,
    dim: int,
    device: str = "cuda",
    *,
    has_weights: bool = False,
    state_dtype: str = "float32",
) -> Row:
    """Compare a forward and backward of the kernels with the `torch` backend on the CPU.

    Two rows of different lengths, two query heads per key/value head; a fifth of the weights, if any, are 0.
    Counts and sums must be bit-identical to the reference, and so must two runs of the kernels to each other;
    outputs and gradients must agree up to rounding, that of the read in `dtype`. With narrow formats there is
    no backward.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, heads, dim) for heads in (4, 2, 2))
    tokens = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]
    if has_weights:
        tokens.append((torch.rand(2, length, 2, generator=generator) - 0.2).clamp(min=0))
    mask = (torch.arange(length) >= torch.tensor([[0], [length // 3]])).long()
    options = {"num_slots": num_slots, "chunk_size": chunk_size, "merge": merge}

    sizes = {"num_kv_heads": 2, "key_dim": dim, "value_dim": dim}
    sizes |= {"num_slots": num_slots, "chunk_size": chunk_size}
    empty = OVQState.empty(batch_size=2, dtype=tokens[0].dtype, **sizes).to_state_dtype(state_dtype)
    has_gradients = state_dtype == "float32"

    def run(where: str, backend: str) -> tuple[OVQState, list[torch.Tensor]]:
        leaves = [x.to(where).requires_grad_(has_gradients) for x in tokens]
        given = {"token_weights": leaves[3]} if has_weights else {}
        o, state = ovq_attention(
            *leaves[:3],
            initial_state=empty.to(where),
            attention_mask=mask.to(where),
            backend=backend,
            output_final_state=True,
            **options,
            **given,
        )
        assert state is not None
        assert backend_used() == backend
        grads = torch.autograd.grad(o.float().square().sum(), leaves) if has_gradients else ()
        return state, [x.detach().cpu().float() for x in (o, *grads)]

    (state, found), (_, again) = run(device, "triton"), run(device, "triton")
    expected_state, expected = run("cpu", "torch")
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
    names = [name for name in ("key_sum", "value_sum", *OPTIONAL) if getattr(state, name) is not None]
    are_equal = torch.equal(state.count.cpu(), expected_state.count)
    sums = (torch.equal(getattr(state, name).cpu(), getattr(expected_state, name)) for name in names)
    bound = 1e-4 if dtype == "float32" else 0.03
    is_repeatable = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    row = {
        "merge": merge,
        "weights": has_weights,
        "dtype": dtype,
        "state_dtype": state_dtype,
        "length": length,
        "num_slots": num_slots,
        "head_dim": dim,
    }
    row |= {"are_counts_equal": are_equal, "are_sums_equal": all(sums), "is_repeatable": is_repeatable}
    row |= {"output_error": errors[0], "gradient_error": max(errors[1:], default=0.0)}
    row["is_passed"] = are_equal and bool(row["are_sums_equal"]) and is_repeatable and max(errors) < bound
    return row


def parity() -> Iterator[Row]:
    """Short rows first, as most errors show there. Each dtype and head size compiles all kernels anew."""
    calls = [("float32", 150, 24, 16, 64), ("bfloat16", 150, 24, 16, 64), ("bfloat16", 3000, 512, 256, 128)]
    calls += [("float32", 1500, 256, 64, 64), ("bfloat16", 1500, 256, 64, 64)]
    for (dtype, *size), merge in itertools.product(calls, RULES):
        yield parity_row(merge, dtype, *size)
    # Weights and narrow formats only on short rows, as their kernels take another compilation.
    for (dtype, *size), merge in itertools.product(calls[:2], RULES):
        yield parity_row(merge, dtype, *size, has_weights=True)
        for state_dtype in ("bfloat16", "int8"):
            yield parity_row(merge, dtype, *size, state_dtype=state_dtype)


def _calls(merge: str, length: int, *, has_weights: bool = False) -> dict[str, Callable[[], object]]:
    """A forward, and a forward with its backward, with a merge rule."""
    inputs = Workload(mixer="ovq", length=length, num_slots=NUM_SLOTS, **SIZE).inputs(device="cuda")
    leaves = [x.clone().requires_grad_() for x in inputs]
    options = {"num_slots": NUM_SLOTS, "chunk_size": SIZE["chunk_size"], "merge": merge, "backend": "triton"}
    if has_weights:
        options["token_weights"] = torch.rand(inputs[1].shape[:3], device="cuda")

    def forward() -> object:
        with torch.no_grad():
            return ovq_attention(*inputs, **options)

    def forward_backward() -> object:
        return torch.autograd.grad(ovq_attention(*leaves, **options)[0].sum(), leaves)

    return {"forward": forward, "forward_backward": forward_backward}


def rules() -> Iterator[Row]:
    """Times of each merge rule."""
    for length, merge in itertools.product((4096, 16384), RULES):
        for what, call in _calls(merge, length).items():
            times = gpu.flushed_times([call], max_rounds=10, seconds=2.0)[0]
            yield {"merge": merge, "length": length, "what": what, **spread(times)}
    for merge in RULES:
        for what, call in _calls(merge, 4096, has_weights=True).items():
            times = gpu.flushed_times([call], max_rounds=5, seconds=1.0)[0]
            yield {"merge": merge, "length": 4096, "what": f"{what}, weights", **spread(times)}


def profile() -> Iterator[Row]:
    """Time of each kernel in a forward and a backward."""
    for merge in RULES:
        events = gpu.kernel_events(_calls(merge, 16384)["forward_backward"])
        total = sum(event.self_device_time_total for event in events)
        for event in events[:12]:
            seconds = event.self_device_time_total / 1e6
            row = {"merge": merge, "kernel": event.key[:60], "launches": event.count, "seconds": seconds}
            yield row | {"share": event.self_device_time_total / total}


PARTS = (
    Part("parity", 155, "the kernels against the torch backend on the CPU, each rule of merging", parity),
    Part("rules", 85, "the rules of merging beside each other at 4k and 16k", rules),
    Part("profile", 65, "the time of each kernel in a forward and a backward at 16k", profile),
)


def run_part(command: list[str], rows_file: Path, seconds: float) -> dict:
    """Run a process that writes rows to a file; returns its rows, how it ended and how long it took."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            code = process.wait(timeout=seconds)
            log.seek(0)
            lines = log.read().strip().splitlines() or ["no message"]
            status = "complete" if code == 0 else f"failed with exit code {code}: {lines[-1]}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"stopped after {seconds:.0f} s"
    found = []
    for line in rows_file.read_text().splitlines() if rows_file.is_file() else []:
        # The last line is incomplete if the process was killed while writing it.
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            status += ", in the middle of a row"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "rows": found}


def _cell(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/")


def as_markdown(report: dict) -> str:
    """The report as a page of tables."""
    env = report["environment"]
    lines = ["# Report on the Triton kernels", ""]
    lines += [f"{env['device']}, torch {env['torch']}, ovq {env['ovq']} at commit {env['commit']}.", ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}", "", f"{part['what']}: {part['status']} ({part['seconds']} s).", ""]
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
        if columns:
            lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
            for row in part["rows"]:
                lines.append(f"| {' | '.join(_cell(row.get(key, '')) for key in columns)} |")
            lines.append("")
    return "\n".join(lines)


def make_report(parts: tuple[Part, ...], out: Path, where: dict, command: list[str]) -> dict:
    """Run all parts within the time limit, and write the report after each.

    Args:
        parts: the parts to run.
        out: folder of the report.
        where: the environment.
        command: command that runs a part, without `--part NAME --rows FILE`.
    """
    report: dict = {"environment": where, "parts": {}}
    end = time.monotonic() + SECONDS
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            left = min(part.seconds, end - time.monotonic())
            rows_file = Path(folder) / f"{part.name}.jsonl"
            if left > 1:
                found = run_part([*command, "--part", part.name, "--rows", str(rows_file)], rows_file, left)
            else:
                found = {"status": "not started, no time was left", "seconds": 0, "rows": []}
            report["parts"][part.name] = {"what": part.what, **found}
            write_atomic(out / "report.json", json.dumps(report, indent=1))
            write_atomic(out / "report.md", as_markdown(report))
            print(f"{part.name}: {found['status']}, {len(found['rows'])} rows", flush=True)
    return report


def has_passed(report: dict) -> bool:
    """Whether parity was checked completely, all checks of all parts hold, and no part failed."""
    parts = report["parts"]
    failed = any(part["status"].startswith("failed") for part in parts.values())
    is_checked = parts["parity"]["status"] == "complete" and bool(parts["parity"]["rows"])
    rows = itertools.chain.from_iterable(part["rows"] for part in parts.values())
    return is_checked and all(row.get("is_passed", True) for row in rows) and not failed


def main() -> int:
    """Run as `__doc__` says; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the report")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and run none")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry_run:
        for part in PARTS:
            print(f"{part.name:17} at most {part.seconds:4} s  {part.what}")
        return 0
    if not torch.cuda.is_available():
        print(f"expected a CUDA device, found none (torch {torch.__version__})", file=sys.stderr)
        return 2
    if arguments.part is not None:
        part = next(part for part in PARTS if part.name == arguments.part)
        with arguments.rows.open("w") as file:
            for row in part.rows():
                print(json.dumps(row), file=file, flush=True)
        return 0
    report = make_report(PARTS, arguments.out, environment("cuda"), [sys.executable, __file__])
    print(f"Wrote {arguments.out / 'report.json'} and {arguments.out / 'report.md'}")
    return 0 if has_passed(report) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compile the Triton kernels for a GPU that need not be there, and tell what they take of it.

    python benchmarks/compile_kernels.py --arch 90 --head-dims 64,128 --dtypes bfloat16

Triton brings its own assembler, so that this runs on any Linux machine: it finds what the interpreter lets
pass (variables that change type in a loop) and shows registers, bytes of stack (what did not fit into
registers) and shared memory. Nothing runs on a GPU.
"""

import argparse
import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

# Importing the kernels chooses between compiler and interpreter, by this variable.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ovq.ops.backends import triton as triton_backend
from ovq.ops.backends.triton import merging
from ovq.ops.checks import checked_call
from ovq.ops.narrow import STATE_DTYPES
from ovq.ops.options import Options

MERGES = ("existing", "nearest")


class _NoDriver:
    """Stand-in for a GPU driver: answers what the compiler asks."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(arch: int, dtype: str, head_dim: int, chunk_size: int = 256) -> list[dict]:
    """Compile all kernels of a forward, a backward and a decode step; returns a row of resources each."""
    driver.set_active(_NoDriver(arch))
    found: dict[int, dict] = {}
    original = JITFunction.run

    @functools.wraps(original)
    def compile_only(self, *args, grid, warmup, **options):
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in found:
            found[id(kernel)] = {"kernel": self.fn.__name__, **_resources(kernel)}
        return kernel

    JITFunction.run = compile_only
    try:
        # No kernel runs, so there are no items that PyTorch could merge.
        with mock.patch.object(merging.PairRecurrence, "_join"):
            _call(getattr(torch, dtype), head_dim, chunk_size)
    finally:
        JITFunction.run = original
    return list(found.values())


def _call(dtype: torch.dtype, dim: int, chunk_size: int) -> None:
    """A forward, a backward and a decode step, without weights, with weights, and with forgetting.

    Then a forward and a decode step for slots in narrow formats.
    """
    length = 4 * chunk_size
    q, k, v = (torch.zeros(1, length, heads, dim, dtype=dtype) for heads in (2, 1, 1))
    weights, scale = torch.ones(1, length, 1), torch.ones(2)
    for merge in MERGES:
        for has_weights, weighs_chunk in ((False, False), (True, False), (True, True)):
            options = Options(
                num_slots=2 * chunk_size,
                chunk_size=chunk_size,
                growth="plateau",
                init="novelty",
                merge=merge,
                seed=0,
                weighs_chunk=weighs_chunk,
            )
            tokens = {"q": q, "k": k, "v": v} | ({"token_weights": weights} if has_weights else {})
            call = checked_call(**tokens, scale=scale, options=options, wants_state=True)
            o, state = triton_backend.run(dataclasses.replace(call, q=q.clone().requires_grad_()))
            o.sum().backward()
            token = {name: x[:, :1] for name, x in tokens.items()}
            call = checked_call(**token, scale=scale, options=options, initial_state=state.detach())
            triton_backend.run(call)
            for state_dtype in STATE_DTYPES[1:]:
                options = dataclasses.replace(options, state_dtype=state_dtype)
                call = checked_call(**tokens, scale=scale, options=options, wants_state=True)
                _, state = triton_backend.run(dataclasses.replace(call, options=options))
                narrow = state.to_state_dtype(state_dtype)
                triton_backend.run(checked_call(**token, scale=scale, options=options, initial_state=narrow))


def _resources(kernel) -> dict:
    """Registers and stack bytes per thread, shared memory and warps of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="80 for A100, 89 for L4 and RTX 40, 90 for H100")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--chunk-size", type=int, default=256)
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}, sm_{arguments.arch}, chunks of {arguments.chunk_size}")
    print(f"{'kernel':24} {'dtype':9} {'dim':>4} {'warps':>5} {'registers':>9} {'stack':>6} {'shared':>7}")
    for dtype in arguments.dtypes.split(","):
        for dim in map(int, arguments.head_dims.split(",")):
            for row in compile_all(arguments.arch, dtype, dim, arguments.chunk_size):
                print(
                    f"{row['kernel']:24} {dtype:9} {dim:4} {row['warps']:5} {row['registers']:9} "
                    f"{row['stack']:6} {row['shared']:7}"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The environment that is recorded with measurements: hardware, versions, threads and commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import ovq


def environment(device: str) -> dict[str, Any]:
    """Hardware (of device `"cpu"` or `"cuda"`) and software of this process, as JSON types.

    `features` are the processor's instruction sets that matter for the speed of matrix products.

    Example:
        >>> found = environment("cpu")
        >>> found["device"], found["cores"] == os.cpu_count()
        ('cpu', True)
    """
    features = f"{_cpu_line('flags')} {_cpu_line('Features')}".split()
    return {
        "processor": _cpu_line("model name") or platform.processor() or platform.machine(),
        "features": [name for name in _FEATURES if name in features],
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "ovq": ovq.__version__,
        "commit": _commit(),
    }


def code_of(environment: Mapping[str, Any]) -> str:
    """The version and the commit of this project in a recorded environment.

    Example:
        >>> code_of({"ovq": "0.2.0", "commit": "abc1234+"})
        '0.2.0 (commit abc1234+)'
    """
    return f"{environment.get('ovq')} (commit {environment.get('commit')})"


# The recorded processor features, by their names in Linux.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def _cpu_line(name: str) -> str:
    """The value of the first line with this name in Linux's /proc/cpuinfo; empty if there is none."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else ():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


@functools.cache
def _commit() -> str | None:
    """The commit of the source tree, with `+` if it has changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An environment may lie in the checkout of another project, whose commit says nothing.
        if not (Path(git("rev-parse", "--show-toplevel")) / "lab" / "ovq_lab").is_dir():
            return None
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

"""What must stand beside a measured number: hardware, versions, threads and commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import ovq


def environment(device: str) -> dict[str, Any]:
    """Where and with which software this process computes.

    Args:
        device: `"cpu"` or `"cuda"`, the device that is used.

    Returns:
        Processor, device, cores, threads, versions and commit by name, as JSON types.

    Example:
        >>> found = environment("cpu")
        >>> found["device"], found["cores"] == os.cpu_count()
        ('cpu', True)
    """
    return {
        "processor": _processor(),
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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _commit() -> str | None:
    """The commit of the source tree, with `+` if it has changes; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")

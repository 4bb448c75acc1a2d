"""What must be settled before anything is collected: who runs Triton's kernels, where garbage is sought."""

import atexit
import gc
import importlib.util
import os
import sys
import types

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

# Triton's own functions are made for its interpreter or for a GPU when they are read.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Without the extra ovq[triton] the kernels cannot be read at all.
collect_ignore_glob = [] if HAS_TRITON else ["src/ovq/ops/backends/triton/*"]

# Modules, tests and their parameters live to the end. To look through them again and again, while they are
# read and whenever a test collects garbage, takes a tenth of the time.
gc.disable()
# Triton's bindings count what is left of them at the very end.
atexit.register(gc.unfreeze)


def pytest_configure():
    """Compile the kernels once, before there are workers that would, and tests with a cache of their own."""
    from ovq.ops import cpu_kernels

    cpu_kernels()


def pytest_collection_finish():
    """From here on garbage is sought among what tests make, and the interpreter looks its names up once."""
    gc.freeze()
    gc.enable()
    if memory := sys.modules.get("accelerate.utils.memory"):
        # Each training would seek it before its first step and after its last.
        memory.gc = types.SimpleNamespace(collect=int)
    if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter import remember_names, take_numbers_from_arrays

        take_numbers_from_arrays()
        remember_names()

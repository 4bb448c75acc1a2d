"""What must be settled before anything imports Triton: who runs the kernels of `ovq.ops.backends.triton`."""

import importlib.util
import os

import torch

# Triton's own functions are made for its interpreter or for a GPU when they are read.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Without the extra ovq[triton] the kernels cannot be read at all.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["src/ovq/ops/backends/triton/*"]

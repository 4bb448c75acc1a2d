"""How few functions of the library lie between a layer and a kernel."""

import sys
import traceback
from pathlib import Path

import pytest
import torch

import ovq
from ovq.layers import OVQAttention
from ovq.ops import cpu_kernels
from ovq.ops.backends.cpu import build

FOLDER = Path(ovq.__file__).parent


@pytest.mark.skipif("compiled" not in cpu_kernels(), reason=cpu_kernels())
@torch.no_grad()
def test_a_prefill_goes_through_five_functions_and_a_token_through_four(monkeypatch):
    kernels, found = build.load(), []

    class Library:
        def __getattr__(self, name):
            if name in ("ovq_forward", "ovq_decode"):
                frames = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))]
                files = [Path(code.co_filename) for code in frames]
                found.append((name, sum(file.is_relative_to(FOLDER) for file in files)))
            return getattr(kernels, name)

    monkeypatch.setattr(build, "load", Library)
    layer = OVQAttention(16, 2, num_slots=8, chunk_size=8)
    *_, cache = layer(torch.randn(1, 10, 16), use_cache=True)
    for _ in range(2):
        layer(torch.randn(1, 1, 16), past_key_values=cache)
    # The first token prepares what the second repeats.
    assert found == [("ovq_forward", 5), ("ovq_decode", 5), ("ovq_decode", 4)]

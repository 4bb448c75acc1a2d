"""Memories whose tokens are merged by the kernels for GPUs, here in Triton's interpreter."""

import pytest
import torch

from ovq.convert import compiled
from ovq.ops import backends
from ovq.ops.state import tensors_of
from tests.convert.test_compiled import inputs, layer_of, read

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
# numpy, which the interpreter computes with, warns of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(("merge", "state_dtype"), [("nearest", "int8"), ("existing", "float32")])
def test_the_kernels_for_gpus_merge_what_leaves_the_windows(merge, state_dtype, monkeypatch):
    """With weights, in rows that merge at different tokens: the sums of PyTorch's merging to the last bit."""
    monkeypatch.setattr(compiled, "is_compiled", lambda *args: False)
    sizes, calls = [40, 14], []
    q, k, v = inputs(sum(sizes))
    masks = [torch.ones(2, size, dtype=torch.bool) for size in sizes]
    masks[0][0, :3] = False
    layers, outputs = [], []
    for name in ("torch", "triton"):
        merging = backends.LEARNING[name].learn

        def counted(*given, merging=merging, name=name):
            calls.append(name)
            return merging(*given)

        monkeypatch.setattr(backends.LEARNING[name], "learn", counted)
        monkeypatch.setattr(backends, "_fastest", lambda x, name=name: [name])
        layers.append(layer_of(merge, state_dtype=state_dtype))
        outputs.append(read(layers[-1], q, k, v, sizes, masks))
    num_merges = len(calls) // 2
    assert num_merges > 4
    assert calls == ["torch"] * num_merges + ["triton"] * num_merges
    assert torch.equal(*outputs)
    for own, other in zip(*(layer.memories for layer in layers), strict=True):
        tensors = tensors_of(other.state)
        assert all(torch.equal(x, tensors[name]) for name, x in tensors_of(own.state).items())

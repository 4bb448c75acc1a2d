"""Calls in graphs of `torch.compile`, export, and the precision of products."""

import pytest
import torch

from ovq.ops import backend_used, ovq_attention
from ovq.ops.call import RowBounds
from tests.ops.common import inputs

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
# The compiler warns of its own doings, and numpy, by which the interpreter computes, of what is not a number.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"
)
OPTIONS = {"num_slots": 4, "chunk_size": 4, "backend": "triton"}


# How rows are given in a graph, `tests/ops/test_operator.py` tests with backends that take less time.
SLOW = [pytest.param(rows, marks=pytest.mark.slow) for rows in ("dense", "padded", "packed")]


@pytest.mark.parametrize("rows", ["checked", "nearest", *SLOW])
def test_a_compiled_call_is_one_whole_graph(rows):
    q, k, v = inputs(1, 9, 2, 1, 4, 3, dtype=torch.float32)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    given = {
        "dense": {},
        "nearest": {"merge": "nearest"},
        "padded": {"attention_mask": mask},
        "packed": {"cu_seqlens": torch.tensor([0, 4, 9])},
        "checked": {"attention_mask": RowBounds(torch.tensor([[0, 4], [4, 5]]))},
    }[rows]
    scale = torch.tensor([1.0, 2.0])

    def call(q, k, v, scale):
        o, _ = ovq_attention(2 * q, k, v, scale=scale, **OPTIONS, **given)
        return o.sin()

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, scale)]
        o = function(*leaves)
        assert backend_used() == "triton"
        results.append((o, *torch.autograd.grad(o.sum(), leaves)))
    for compiled, eager in zip(*results, strict=True):
        assert torch.equal(compiled, eager)


def test_nearest_items_are_found_by_float32_products(monkeypatch):
    """Whatever the process asks for elsewhere: by rougher products other items would be joined."""
    from ovq.ops.backends.triton import merging

    found, nearest_roots = [], merging.nearest_roots

    def looked_at(*args):
        found.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return nearest_roots(*args)

    monkeypatch.setattr(merging, "nearest_roots", looked_at)
    q, k, v = inputs(1, 8, 1, 1, 4, 3, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu"):
            ovq_attention(q, k, v, **OPTIONS, merge="nearest")
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == [("highest", False)]


def test_a_graph_serves_other_lengths_and_is_exported():
    class Read(torch.nn.Module):
        def forward(self, q, k, v):
            return ovq_attention(q, k, v, **OPTIONS)[0]

    short, long = (inputs(1, n, 1, 1, 4, 3, dtype=torch.float32) for n in (6, 11))
    length = torch.export.Dim("length", min=4, max=64)
    program = torch.export.export(Read(), short, dynamic_shapes=[{1: length}] * 3)
    for qkv in (short, long):
        assert torch.equal(program.module()(*qkv), Read()(*qkv))

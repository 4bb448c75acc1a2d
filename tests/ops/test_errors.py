"""Bad input is refused at the front door, with what was expected and what was found."""

import dataclasses
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ovq.ops import OVQState, backend_used, ovq_attention, scheduled_slots
from ovq.ops.backends import BACKENDS, chosen, triton
from ovq.ops.known import Known
from ovq.ops.options import Options
from tests.ops.common import attend, inputs

OPTIONS = {"num_slots": 8, "chunk_size": 4}


def call(q=None, k=None, v=None, **options):
    defaults = inputs(2, 10, 4, 2)
    q, k, v = (
        given if given is not None else default for given, default in zip((q, k, v), defaults, strict=True)
    )
    return ovq_attention(q, k, v, **{**OPTIONS, **options})


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(*shape, dtype=dtype)


FLOATS = {name: zeros(2, 10, 2, 6, dtype=torch.float32) for name in "kv"}
FLOATS |= {"q": zeros(2, 10, 4, 6, dtype=torch.float32)}
FAKE = FakeTensorMode().from_tensor(zeros(2, 10, 4, 6))
NESTED = torch.nested.nested_tensor(list(zeros(2, 10, 2, 5)), layout=torch.jagged)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"q": zeros(2, 10, 6)}, r"q: expected 4 dimensions .* found \(2, 10, 6\)"),
        ({"q": [1.0]}, "q: expected a tensor, found list"),
        ({"k": zeros(2, 9, 2, 6)}, r"found \(2, 10, 4, 6\), \(2, 9, 2, 6\)"),
        ({"k": zeros(2, 10, 2, 7)}, "k: expected head dimension 6 .* found 7"),
        ({"k": zeros(2, 10, 3, 6), "v": zeros(2, 10, 3, 5)}, "divisible by the 3 .* found 4"),
        ({"v": zeros(2, 10, 1, 5)}, r"\(2, 10, 1, 5\)"),
        ({"v": zeros(2, 10, 2, 5, dtype=torch.float32)}, "v: expected torch.float64 .* found torch.float32"),
        ({"q": zeros(2, 10, 4, 6, dtype=torch.int64)}, "q: expected a dtype of .* found torch.int64"),
        ({"k": zeros(2, 10, 2, 6).to_sparse()}, "k: expected a dense tensor .* found torch.sparse_coo"),
        ({"q": zeros(2, 10, 4, 6).to("meta")}, "q: expected a dense tensor with data, found .* on meta"),
        ({"q": FAKE}, "q: expected a dense tensor with data, found a fake one"),
        ({"v": NESTED}, "v: expected a dense tensor with data, found a nested one"),
        ({"k": zeros(2, 10, 0, 6), "v": zeros(2, 10, 0, 5)}, "k: expected at least one head"),
        ({"scale": torch.ones(4).to_sparse()}, "scale: expected a dense tensor .* found torch.sparse_coo"),
        ({"attention_mask": torch.ones(2, 10).to_sparse()}, "attention_mask: expected a dense tensor"),
        ({"attention_mask": torch.ones(2, 10).to("meta")}, "attention_mask: .* with data, found .* on meta"),
        ({"token_weights": zeros(2, 10, 2).to("meta")}, "token_weights: .* with data, found .* on meta"),
        ({"num_slots": 0}, "num_slots: expected an integer of at least 1, found 0"),
        ({"num_slots": 2.5}, "num_slots: .* found 2.5"),
        ({"chunk_size": -1}, "chunk_size: expected an integer of at least 1, found -1"),
        ({"chunk_size": True}, "chunk_size: .* found True"),
        ({"scale": torch.ones(3)}, r"scale: .* \[4\], found \(3,\)"),
        ({"scale": torch.ones(4, dtype=torch.int64)}, "scale: expected a floating dtype"),
        ({"scale": math.nan}, r"scale: expected a finite float or a tensor \[4\], found nan"),
        ({"scale": 10**400}, "scale: expected a finite float or a tensor"),
        ({"scale": 1e39} | FLOATS, r"scale: expected a finite float or a tensor \[4\], found 1e\+39"),
        ({"generator": 5}, "generator: expected a torch.Generator, found 5"),
        ({"scale": "big"}, "scale: .* found 'big'"),
        ({"growth": "fast"}, "growth: expected one of .*plateau.* found 'fast'"),
        ({"init": "zeros"}, "init: expected one of .* found 'zeros'"),
        ({"merge": "none"}, "merge: expected one of .* found 'none'"),
        ({"merge": "neerest"}, r"found 'neerest'; did you mean 'nearest'\?"),
        ({"ablation": {"bias": "norm"}}, r"bias: expected one of .*count\+norm.* found 'norm'"),
        ({"ablation": {"rate": "mean"}}, r"rate: expected 'count' or a number in \(0, 1\], found 'mean'"),
        ({"ablation": {"rate": 0.0}}, "rate: .* found 0.0"),
        ({"ablation": {"rate": 1.5}}, "rate: .* found 1.5"),
        ({"ablation": {"rate": True}}, "rate: .* found True"),
        ({"merge": "ward", "init": "random"}, "init: expected 'novelty' with merge 'ward', found 'random'"),
        ({"merge": "ward", "ablation": {"rate": 0.3}}, "rate: expected 'count' with merge 'ward', found 0.3"),
        ({"merge": "ward-sqrt", "ablation": {"rate": 0.3}}, "rate: expected 'count' with merge 'ward-sqrt'"),
        ({"merge": "nearest", "init": "random"}, "init: expected 'novelty' with merge 'nearest', found 'ran"),
        ({"value_weight": -0.5}, "value_weight: expected a finite number of at least 0, found -0.5"),
        ({"value_weight": math.inf}, "value_weight: .* found inf"),
        ({"value_weight": 10**400}, "value_weight: expected a finite number"),
        ({"value_weight": math.nan}, "value_weight: .* found nan"),
        ({"value_weight": True}, "value_weight: .* found True"),
        ({"value_weight": "half"}, "value_weight: .* found 'half'"),
        ({"backend": "cuda"}, "backend: expected one of .* found 'cuda'"),
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask: .*\[2, 10\].* found \(2, 9\)"),
        (
            {"attention_mask": torch.full((2, 10), 0.5)},
            r"attention_mask: expected 0 and 1 only, found \[0.5\]",
        ),
        (
            {"attention_mask": torch.tensor([[1] * 10, [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]])},
            "contiguous, found a hole in row 1",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 10])},
            "cu_seqlens: expected packed rows in a batch of 1, found a batch of 2",
        ),
        ({"initial_state": {}}, "initial_state: expected an OVQState, found dict"),
    ],
)
def test_bad_arguments(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        call(**arguments)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ([0, 4, 9], r"rise from 0 to 10, found \[0, 4, 9\]"),
        ([1, 10], r"found \[1, 10\]"),
        ([0, 6, 4, 10], r"found \[0, 6, 4, 10\]"),
        ([0], r"shape \[rows \+ 1\], found \(1,\)"),
        ([0.0, 10.0], "int32 or int64 tensor, found torch.float32"),
    ],
)
def test_bad_cu_seqlens(bounds, expected):
    q, k, v = inputs(1, 10)
    with pytest.raises(ValueError, match=expected):
        ovq_attention(q, k, v, cu_seqlens=torch.tensor(bounds), **OPTIONS)
    with pytest.raises(ValueError, match="cu_seqlens: expected a dense tensor with data"):
        ovq_attention(q, k, v, cu_seqlens=torch.tensor([0, 10], device="meta"), **OPTIONS)


def test_mask_and_cu_seqlens_together():
    q, k, v = inputs(1, 10)
    with pytest.raises(ValueError, match="at most one of them"):
        ovq_attention(q, k, v, cu_seqlens=torch.tensor([0, 10]), attention_mask=torch.ones(1, 10), **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_slots": 16}, "num_slots: expected 16, found 8"),
        ({"chunk_size": 5}, "chunk_size: expected 5, found 4"),
    ],
)
def test_a_state_of_other_settings(changes, expected):
    q, k, v = inputs(2, 10)
    _, state = attend(q, k, v, **OPTIONS)
    with pytest.raises(ValueError, match=f"initial_state: {expected}"):
        ovq_attention(q, k, v, initial_state=state, **{**OPTIONS, **changes})


@pytest.mark.parametrize(
    ("sizes", "dtype", "expected"),
    [
        ((3, 10, 2, 1, 6, 5), torch.float64, "rows: expected 3, found 2"),
        ((2, 10, 2, 2, 6, 5), torch.float64, "key/value heads: expected 2, found 1"),
        ((2, 10, 2, 1, 8, 5), torch.float64, "key dimension: expected 8, found 6"),
        ((2, 10, 2, 1, 6, 4), torch.float64, "value dimension: expected 4, found 5"),
        ((2, 10, 2, 1, 6, 5), torch.float32, "dtype of sums: expected torch.float32, found torch.float64"),
    ],
)
def test_a_state_of_other_shapes(sizes, dtype, expected):
    _, state = attend(*inputs(2, 10), **OPTIONS)
    with pytest.raises(ValueError, match=f"initial_state: {expected}"):
        ovq_attention(*inputs(*sizes, dtype=dtype), initial_state=state, **OPTIONS)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("key_sum", lambda x: x[0], r"key_sum: expected a tensor of 4 dimensions, found shape \(1, 4, 6\)"),
        ("value_sum", lambda x: x[:, :, 1:], r"value_sum: expected \[2, 1, 4, 5\] .* found \[2, 1, 3, 5\]"),
        ("value_sum", Tensor.double, "value_sum: .* torch.float32 on cpu, found .* torch.float64"),
        ("count", Tensor.int, "count: .* torch.int64 on cpu, found .* torch.int32"),
        ("pending_keys", lambda x: x[:, :, 1:], "pending_keys: expected .*4, 6.* found .*3, 6"),
        ("pending_values", Tensor.half, "pending_values: .* torch.float32 on cpu, found .* torch.float16"),
        ("pending_values", list, "pending_values: .* found list"),
        ("weight", lambda x: x[..., 1:], r"weight: expected \[2, 1, 4\] .* found \[2, 1, 3\]"),
        ("weight", lambda _: None, "pending_weights: expected none without weight"),
        ("pending_weights", lambda _: None, "pending_weights: .* found NoneType"),
        ("key_sum", lambda _: None, "key_sum: expected a tensor of 4 dimensions, found NoneType"),
        ("key_step", lambda _: torch.zeros(2), "key_step: expected none without sums in int8"),
        ("num_seen", Tensor.int, "num_seen: expected .* torch.int64 on cpu, found .* torch.int32"),
        ("num_seen", lambda x: x[:1], r"num_seen: expected \[2\] .* found \[1\]"),
        ("num_seen", lambda x: x - 100, "num_seen: expected at least 0, found"),
    ],
)
def test_a_state_whose_tensors_do_not_fit_each_other(name, change, expected):
    q, k, v = inputs(2, 10, dtype=torch.float32)
    _, state = attend(q, k, v, token_weights=torch.ones(2, 10, 1), **OPTIONS)
    state = dataclasses.replace(state, **{name: change(getattr(state, name))})
    with pytest.raises(ValueError, match=f"initial_state: {expected}"):
        ovq_attention(q, k, v, initial_state=state, **OPTIONS)


def test_misspelt_option_is_not_swallowed():
    with pytest.raises(TypeError, match="num_slot"):
        call(num_slot=3)


def test_triton_is_refused_rather_than_replaced(monkeypatch):
    q, k, v = inputs(1, 8, dtype=torch.float32)
    monkeypatch.setattr(triton, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"backend: 'triton': expected the package triton .*found none"):
        ovq_attention(q, k, v, backend="triton", **OPTIONS)
    monkeypatch.setattr(triton, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend: 'triton': expected tensors on a CUDA device .*on cpu"):
        ovq_attention(q, k, v, backend="triton", **OPTIONS)


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float64, {}, "expected a dtype of .*found torch.float64"),
        (torch.float32, {"init": "random"}, "expected init 'novelty', found 'random'"),
        (torch.float32, {"merge": "updated"}, "expected merge to be one of .*'nearest'.*, found 'updated'"),
        (torch.float32, {"ablation": {"bias": "count+norm"}}, r"expected bias 'count', found 'count\+norm'"),
        (torch.float32, {"ablation": {"rate": 0.5}}, "expected rate 'count', found 0.5"),
        (torch.float32, {"chunk_size": 5000}, "expected chunk_size of at most 4096, found 5000"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_or_left_to_torch(dtype, options, expected, monkeypatch):
    q, k, v = inputs(1, 8, dtype=dtype)
    monkeypatch.setattr(triton, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=f"backend: 'triton': {expected}"):
        ovq_attention(q, k, v, backend="triton", **{**OPTIONS, **options})
    ovq_attention(q, k, v, **{**OPTIONS, **options})
    assert backend_used() in ("torch", "cpu")


def test_auto_takes_the_kernels_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(triton, "HAS_TRITON", True)
    q, _, v = inputs(1, 8, dtype=torch.bfloat16)
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=q.dtype, shape=q.shape)
    options = {"growth": "plateau", "merge": "existing", "seed": 0, **OPTIONS}
    for x, init, expected in (
        (on_gpu, "novelty", ["triton"]),
        (on_gpu, "random", ["torch"]),
        (q, "novelty", ["cpu", "torch"]),
    ):
        call = SimpleNamespace(q=x, v=v, gates=(), tensors=(), options=Options(init=init, **options))
        assert chosen("auto", call) in expected


def test_every_backend_has_what_its_protocol_says():
    for backend in BACKENDS.values():
        assert isinstance(backend.KNOWN, Known)
        assert list(inspect.signature(backend.missing).parameters) == ["q", "v", "options"]
        assert list(inspect.signature(backend.run).parameters) == ["call"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"batch_size": -1}, "batch_size: expected an integer of at least 0, found -1"),
        ({"num_slots": 0}, "num_slots: expected an integer of at least 1, found 0"),
        ({"key_dim": 0}, "key_dim: expected an integer of at least 1, found 0"),
        ({"dtype": torch.int64}, r"dtype: expected one of \(torch\.float32, .*, found torch\.int64"),
        ({"dtype": torch.float8_e5m2}, r"dtype: expected one of .*, found torch\.float8_e5m2"),
        ({"dtype": "float32"}, "dtype: expected one of .*, found 'float32'"),
    ],
)
def test_an_empty_state_of_impossible_sizes(sizes, expected):
    usual = {
        "batch_size": 1,
        "num_kv_heads": 1,
        "key_dim": 4,
        "value_dim": 4,
        "num_slots": 8,
        "chunk_size": 4,
    }
    with pytest.raises(ValueError, match=expected):
        OVQState.empty(**usual | sizes)


@pytest.mark.parametrize("sizes", [{"num_seen": -1}, {"num_slots": 0}])
def test_a_schedule_of_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="expected num_seen of at least 0 and num_slots of at least 1"):
        scheduled_slots(**{"num_seen": 8, "num_slots": 8} | sizes)


def test_state_methods_refuse_bad_indices():
    state = OVQState.empty(batch_size=2, num_kv_heads=1, key_dim=4, value_dim=4, num_slots=8, chunk_size=4)
    with pytest.raises(ValueError, match=r"indices in 0..1, found \[2\]"):
        state.select([2])
    with pytest.raises(ValueError, match=r"mask of shape \(2,\), found \(3,\)"):
        state.select(torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="n: expected an integer of at least 1, found 0"):
        state.repeat_interleave(0)
    with pytest.raises(ValueError, match=r"n: expected an integer of at least 1, found 1\.5"):
        state.repeat_interleave(1.5)
    with pytest.raises(ValueError, match=r"device: expected a device, found torch.float16"):
        state.to(torch.float16)
    with pytest.raises(ValueError, match="device: expected a device, found 'graphics'"):
        state.to("graphics")
    # No machine has as many.
    with pytest.raises(ValueError, match=r"device: expected one that can be used here, found 'cuda:99': \w"):
        state.to("cuda:99")
    for rows in ("first", None, [[0], [1, 0]]):
        with pytest.raises(ValueError, match="rows: expected integer indices or a boolean mask, found"):
            state.select(rows)
    with pytest.raises(ValueError, match=r"num_slots: .* found 0"):
        state.resize(0)
    with pytest.raises(ValueError, match=r"value_weight: .* found -1"):
        state.resize(4, value_weight=-1)
    with pytest.raises(ValueError, match="at least one state"):
        OVQState.concatenate([])
    other = OVQState.empty(batch_size=2, num_kv_heads=1, key_dim=4, value_dim=4, num_slots=9, chunk_size=4)
    with pytest.raises(ValueError, match="num_slots 8 in all, found 9"):
        OVQState.concatenate([state, other])
    with pytest.raises(ValueError, match="expected each to be an OVQState, found dict"):
        OVQState.concatenate([state, {}])
    with pytest.raises(ValueError, match=r"key_sum: expected .* on cpu in all, found .* on meta"):
        OVQState.concatenate([state, state.to("meta")])

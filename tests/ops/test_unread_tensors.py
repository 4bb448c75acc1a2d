"""Tensors that are not what lies in memory: wrappers and negated ones, which kernels leave to PyTorch."""

import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from ovq.layers.common import ShortConvolution
from ovq.ops import backend_used, ovq_attention, slot_assignments
from tests.ops.common import CPU, attend, inputs

pytestmark = pytest.mark.skipif(not CPU, reason="no compiler")

SIZES = {"num_slots": 8, "chunk_size": 4}
NAMES = ["q", "k", "v", "scale", "token_weights", "log_forget"]
OF_STATE = ["key_sum", "value_sum", "count", "pending_keys", "pending_values", "num_seen", "weight"]


class Wrapper(torch.Tensor):
    """Numbers that lie in another tensor."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype)

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = tree_map(lambda x: x.x if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def negated(x):
    """The numbers of x, as a tensor whose memory holds their opposites."""
    return torch._neg_view(x.neg())


def arguments(length, names, seed=0):
    """A call that goes on from some tokens; with gates if one of them is named."""
    torch.manual_seed(seed)
    q, k, v = inputs(2, 11 + length, 4, 2, dtype=torch.float32)
    gates = {"token_weights": torch.rand(2, 11 + length, 2), "log_forget": -torch.rand(2, 11 + length, 2)}
    has_weights = {"token_weights", "weight"} & {*names}
    own = {name: x for name, x in gates.items() if name in names or (name == "token_weights" and has_weights)}
    tensors = {"q": q, "k": k, "v": v, **own}
    before = attend(**{name: x[:, :11] for name, x in tensors.items()}, **SIZES)[1]
    rest = {name: x[:, 11:] for name, x in tensors.items()}
    return rest | {"scale": torch.linspace(1, 4, 4), "initial_state": before}


def changed(given, name, change):
    if name in NAMES:
        return given | {name: change(given[name])}
    state = given["initial_state"]
    return given | {"initial_state": dataclasses.replace(state, **{name: change(getattr(state, name))})}


# Those of whole numbers are read as such, which wrappers cannot be.
FLOATS = [name for name in NAMES + OF_STATE if name not in ("count", "num_seen")]


# Bounding `log_forget` makes a plain tensor.
@pytest.mark.parametrize("name", [name for name in FLOATS if name != "log_forget"])
@pytest.mark.parametrize("length", [1, 9])
@torch.no_grad()
def test_wrappers_are_read_by_pytorch_not_by_kernels(name, length):
    given = arguments(length, [name])
    expected, _ = attend(**given, **SIZES)
    wrapped = changed(given, name, Wrapper)
    found, _ = attend(**wrapped, **SIZES)
    assert backend_used() == "torch"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"'cpu': expected plain tensors, found Wrapper"):
        attend(**wrapped, backend="cpu", **SIZES)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("length", [1, 9])
@torch.no_grad()
def test_negated_tensors_keep_their_signs(name, length):
    given = arguments(length, [name])
    expected, _ = attend(**given, **SIZES)
    found, _ = attend(**changed(given, name, negated), **SIZES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES[:5])
@pytest.mark.parametrize("change", [negated, Wrapper], ids=["negated", "wrapped"])
@torch.no_grad()
def test_a_prepared_step_leaves_them_too(name, change):
    """After a token read by a kernel, the next one is not checked anew."""
    first, second = (arguments(1, [name], seed) for seed in (0, 1))
    second["initial_state"] = attend(**first, **SIZES)[1]
    assert second["initial_state"]._step is not None
    expected, _ = attend(**second, **SIZES)
    found, _ = attend(**changed(second, name, change), **SIZES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_convolutions_read_a_negated_past():
    conv = ShortConvolution(6, conv_size=3)
    _, state = conv(torch.randn(2, 5, 6))
    for x in (torch.randn(2, 1, 6), torch.randn(2, 4, 6)):
        torch.testing.assert_close(conv(x, state=negated(state)), conv(x, state=state))


def test_slot_assignments_leave_them_too():
    _, k, v = inputs(2, 19, dtype=torch.float32)
    with pytest.raises(ValueError, match="'cpu': expected plain tensors, found Wrapper"):
        slot_assignments(k, v, token_weights=Wrapper(torch.rand(2, 19, 1)), backend="cpu", **SIZES)


@pytest.mark.parametrize("name", OF_STATE[:-1])
def test_a_state_without_data_in_one_part_is_refused(name):
    given = arguments(3, [])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(getattr(given["initial_state"], name))
    state = dataclasses.replace(given["initial_state"], **{name: fake})
    with pytest.raises(ValueError, match="initial_state: tensors with data: expected True, found False"):
        ovq_attention(**given | {"initial_state": state}, **SIZES)

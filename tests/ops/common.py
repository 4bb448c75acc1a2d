"""Inputs and comparisons for the tests of the op."""

import contextlib
import itertools

import pytest
import torch
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

from ovq.ops import OVQState, backend_used, cpu_kernels, ovq_attention
from ovq.ops.ablation import Ablation
from ovq.ops.options import CURRENT_MERGES, INITS
from ovq.ops.state import tensors_of
from ovq.ops.sums import state_dtype

BACKENDS = ("naive", "torch")
# The compiled kernels, where a compiler is found: no float64, running means and log counts alone.
CPU = ("cpu",) if cpu_kernels().startswith("compiled") else ()
# How slots are scored and how they move: the defaults, each other choice alone, and both.
SCORINGS = [
    {},
    *(
        {"ablation": Ablation(**changes)}
        for changes in ({"bias": "count+norm"}, {"rate": 0.3}, {"bias": "count+norm", "rate": 0.7})
    ),
]
# The same, and the rule that merges pairs in the place of routing.
VARIANTS = [*SCORINGS, {"merge": "nearest"}]
# Which keys open slots, and where the others go: what fits together.
RULES = [
    (init, merge) for init in INITS for merge in CURRENT_MERGES if init != "random" or merge != "nearest"
]
# The rules that kernels know.
KERNEL_MERGES = ("existing", "nearest")

either_rule = pytest.mark.parametrize("merge", KERNEL_MERGES)


def with_rules(names, *choices, rules=KERNEL_MERGES):
    """Parametrize by `names` of choices and "merge", without what does not go together."""
    cases = itertools.product(*choices, rules)
    cases = [case for case in cases if "random" not in case or case[-1] != "nearest"]
    # Kernels know no ablations.
    cases = [case for case in cases if "cpu" not in case or not {"random", "updated"} & set(case)]
    return pytest.mark.parametrize((*names, "merge"), cases)


def by_turns(*choices):
    """As few of all combinations as leave any two values together in some: the others take turns."""
    choices = [[*each] for each in choices]
    turns = 1 + sum(sorted(len(each) - 1 for each in choices)[:-2])
    numbered = itertools.product(*map(enumerate, choices))
    return [tuple(x for _, x in each) for each in numbered if sum(i for i, _ in each) % turns == 0]


def takes(backend, dtype, variant):
    """Whether a backend runs calls of this dtype and these of `VARIANTS`."""
    return backend != "cpu" or (dtype != torch.float64 and "ablation" not in variant)


def inputs(batch, length, heads=2, kv_heads=1, key_dim=6, value_dim=5, *, dtype=torch.float64, seed=0):
    """Random queries and keys of unit length, and values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(num_heads, dim):
        return torch.randn(batch, length, num_heads, dim, dtype=torch.float64, generator=generator)

    q, k = (normalize(draw(n, key_dim), dim=-1) for n in (heads, kv_heads))
    return q.to(dtype), k.to(dtype), draw(kv_heads, value_dim).to(dtype)


def attend(q, k, v, **options):
    """`ovq_attention` with the final state."""
    return ovq_attention(q, k, v, output_final_state=True, **options)


def read_in_pieces(tensors, pieces, state=None, **options):
    """Outputs and state of a stream, tensors by name, that is read in pieces of these lengths.

    Each is run by the backend that the options name, if they do.
    """
    outputs, start = [], 0
    for piece in pieces:
        part = {name: x[:, start : start + piece] for name, x in tensors.items()}
        o, state = attend(**part, initial_state=state, **options)
        assert options.get("backend", "auto") in ("auto", backend_used())
        outputs.append(o)
        start += piece
    return torch.cat(outputs, 1), state


def with_gradients(tensors, options, pieces=None):
    """Outputs and state of `read_in_pieces`, and gradients of a loss that involves all of both.

    They are those of the tensors, and of the scale.
    """
    num_tokens, num_heads = tensors["q"].shape[1:3]
    scale = torch.as_tensor(options.get("scale", torch.linspace(1, 4, num_heads)))
    scale = scale.to(state_dtype(tensors["q"].dtype)).expand(num_heads).clone().requires_grad_()
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    o, state = read_in_pieces(leaves, pieces or [num_tokens], **options | {"scale": scale})
    losses = [o.double() * torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o)]
    for name, x in tensors_of(state).items():
        rows = [x]
        if name in ("pending_keys", "pending_values", "pending_weights"):
            # Places without a pending token may hold anything.
            rows = [row[:, :n] for row, n in zip(x, state.num_pending.tolist(), strict=True)]
        losses += [row.double().sin() for row in rows if row.is_floating_point()]
    loss = sum(x.sum() for x in losses)
    grads = torch.autograd.grad(loss, [*leaves.values(), scale], allow_unused=True, materialize_grads=True)
    return o.detach(), state, grads


def decoded(tensors, state, backend, **options):
    """Outputs of token after token, and the state after the last."""
    return read_in_pieces(tensors, [1] * tensors["q"].shape[1], state, backend=backend, **options)


def assert_same_state(actual: OVQState, expected: OVQState, *, tolerance=1e-9):
    """Same counts and tokens, exactly; same sums and pending tokens, to `tolerance`."""
    assert actual.num_seen.tolist() == expected.num_seen.tolist()
    slots = max(actual.count.shape[2], expected.count.shape[2])
    pad = torch.nn.functional.pad
    counts = [pad(s.count, (0, slots - s.count.shape[2])) for s in (actual, expected)]
    assert torch.equal(*counts)
    for name in ("key_sum", "value_sum"):
        a, b = (pad(getattr(s, name), (0, 0, 0, slots - s.count.shape[2])) for s in (actual, expected))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for row, used in enumerate(expected.num_pending.tolist()):
        for name in ("pending_keys", "pending_values"):
            a, b = (getattr(s, name)[row, :, :used] for s in (actual, expected))
            assert torch.equal(a, b)


class _NothingByDefault(TorchFunctionMode):
    """Kernels write float32 on a CPU, and would write beyond the end of what is narrower or elsewhere."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            assert found.dtype != torch.bfloat16, function
            assert not found.is_meta, function
        return found


@contextlib.contextmanager
def other_defaults():
    """In this context tensors are bfloat16 and nowhere, unless it is said what and where they are; there must
    be none such."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with _NothingByDefault(), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)

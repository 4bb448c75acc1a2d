"""A call as one operator of `torch.library`, for `torch.compile` and `torch.export`, with or without a state.

The computation depends on the lengths of the rows and on the number of tokens seen, which a graph does not
know, so all of it is inside `ovq::call`. Graphs pass only tensors. A state is therefore passed as its
tensors, with room for all N slots, and the backward (`ovq::call_backward`) runs the call again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.ops import dispatch
from ovq.ops.ablation import Ablation
from ovq.ops.call import RowBounds
from ovq.ops.checks import check_state, checked_call, row_bounds
from ovq.ops.first_order import refuse_second_order
from ovq.ops.options import Options
from ovq.ops.parts import of_rows, slot_spec
from ovq.ops.state import OVQState, with_capacity

# Names of the differentiable inputs.
_OF_TOKENS = ("q", "k", "v", "scale", "token_weights", "log_forget")
_OF_STATE = (
    "key_sum",
    "value_sum",
    "pending_keys",
    "pending_values",
    "weight",
    "pending_weights",
    "pending_forget",
)
_DIFFERENTIABLE = (*_OF_TOKENS, *_OF_STATE)
# All tensors of a state. The operator returns the outputs, then these tensors of the final state.
_PIECES = (*_OF_STATE, "count", "num_seen")
_NUM_GRADS = 1 + len(_OF_STATE)

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor scale, Tensor? token_weights, Tensor? log_forget, "
    + ", ".join(f"Tensor? {name}" for name in _PIECES)
    + ", Tensor? bounds, int num_slots, int chunk_size, str growth, str merge, str bias, float? rate, "
    "float value_weight, bool wants_state, str backend"
)
# Names of the arguments; `bounds` is the last tensor, and settings follow.
_NAMES = [argument.split()[1] for argument in _INPUTS.split(", ")]
_NUM_TENSORS = _NAMES.index("bounds") + 1
_GRADS = ", ".join(f"Tensor? grad_{name}" for name in ("o", *_OF_STATE))
_LIBRARY = torch.library.Library("ovq", "FRAGMENT")
_LIBRARY.define(f"call({_INPUTS}) -> ({', '.join(['Tensor'] * (1 + len(_PIECES)))})")
_LIBRARY.define(f"call_backward({_GRADS}, {_INPUTS}) -> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})")


def attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    options: Options,
    initial_state: OVQState | None,
    wants_state: bool,
    attention_mask: Tensor | RowBounds | None,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    log_forget: Tensor | None,
    backend: str,
) -> tuple[Tensor, OVQState | None]:
    """`ovq::call` for the arguments of `checked_call`, to be traced into a graph.

    The final state has all N slots allocated.
    """
    bounds = None
    if isinstance(attention_mask, RowBounds):
        bounds = attention_mask.bounds
    elif attention_mask is not None or cu_seqlens is not None:
        bounds = row_bounds(attention_mask, cu_seqlens, q.shape[0], 0, q.shape[1])
    state = initial_state
    if state is not None:
        check_state(state, q.shape[0] if bounds is None else bounds.shape[1], k, v, options)
    o, *after = torch.ops.ovq.call(
        q,
        k,
        v,
        scale,
        token_weights,
        log_forget,
        *([None] * len(_PIECES) if state is None else _pieces(state)),
        bounds,
        options.num_slots,
        options.chunk_size,
        options.growth,
        options.merge,
        options.ablation.bias,
        # Not as a string: a graph that serves several rates knows no digits.
        None if options.ablation.rate == "count" else options.ablation.rate,
        options.value_weight,
        wants_state,
        backend,
    )
    if not wants_state:
        return o, None
    forgets = log_forget is not None or (state is not None and state.pending_forget is not None)
    has_weights = forgets or token_weights is not None or (state is not None and state.weight is not None)
    pieces: dict[str, Any] = dict(zip(_PIECES, after, strict=True))
    if not has_weights:
        del pieces["weight"], pieces["pending_weights"]
    if not forgets:
        del pieces["pending_forget"]
    return o, OVQState(num_slots=options.num_slots, chunk_size=options.chunk_size, **pieces)


def _pieces(state: OVQState) -> list[Tensor | None]:
    return [getattr(state, name) for name in _PIECES]


def _named(arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments of `ovq::call` by name."""
    return dict(zip(_NAMES, arguments, strict=True))


def _run(given: Mapping[str, Any]) -> list[Tensor | None]:
    """Outputs of a call with these arguments, and the tensors of the final state if `wants_state`."""
    sizes = {name: given[name] for name in ("num_slots", "chunk_size")}
    rate = given["rate"]
    options = Options(
        **sizes,
        growth=given["growth"],
        init="novelty",
        merge=given["merge"],
        seed=0,
        ablation=Ablation(bias=given["bias"], rate="count" if rate is None else rate),
        value_weight=given["value_weight"],
    )
    has_state, bounds = given["count"] is not None, given["bounds"]
    call = checked_call(
        **{name: given[name] for name in _OF_TOKENS},
        options=options,
        initial_state=OVQState(**sizes, **{name: given[name] for name in _PIECES}) if has_state else None,
        wants_state=given["wants_state"],
        attention_mask=None if bounds is None else RowBounds(bounds),
    )
    o, state = dispatch.run_of(call, given["backend"])(call)
    if state is None or not call.wants_state:
        return [o]
    return [o, *_pieces(with_capacity(state, options.num_slots))]


def _own(x: Tensor | None, arguments: Sequence[Any], like: Tensor) -> Tensor:
    """x in memory not shared with an argument, as operators must return it; an empty tensor for None.

    For PyTorch no view, as nobody could change one from an operator in place.
    """
    if x is None:
        return like.new_empty(0)
    memory = x.untyped_storage().data_ptr()
    is_shared = any(isinstance(y, Tensor) and y.untyped_storage().data_ptr() == memory for y in arguments)
    x = x.clone(memory_format=torch.contiguous_format) if is_shared else x.contiguous()
    return torch.ops.aten._unsafe_view(x, x.shape)


def _call(*arguments: Any) -> tuple[Tensor, ...]:
    found = _run(_named(arguments))
    missing = [None] * (1 + len(_PIECES) - len(found))
    return tuple(_own(x, arguments, arguments[0]) for x in (*found, *missing))


def _fake_call(*arguments: Any) -> tuple[Tensor, ...]:
    given = _named(arguments)
    q, k, v, bounds = (given[name] for name in ("q", "k", "v", "bounds"))
    o = q.new_empty(*q.shape[:3], v.shape[3])
    if not given["wants_state"]:
        return o, *(q.new_empty(0) for _ in _PIECES)
    spec = slot_spec(
        given["num_slots"],
        num_kv_heads=k.shape[2],
        head_dim=k.shape[3],
        value_dim=v.shape[3],
        chunk_size=given["chunk_size"],
        dtype=q.dtype,
        has_weights=given["token_weights"] is not None or given["weight"] is not None,
        forgets=given["log_forget"] is not None or given["pending_forget"] is not None,
    )
    spec = of_rows(spec, q.shape[0] if bounds is None else bounds.shape[1])
    pieces = []
    for name in _PIECES:
        shape, dtype = spec.get(name, ((0,), q.dtype))
        # Zeros, as that of the meta device is a real one.
        pieces.append(q.new_zeros(shape, dtype=dtype, device="cpu" if name == "num_seen" else q.device))
    return o, *pieces


def _call_backward(*arguments: Any) -> tuple[Tensor, ...]:
    grads, given = arguments[:_NUM_GRADS], _named(arguments[_NUM_GRADS:])
    leaves = {name: x.detach().requires_grad_() for name in _DIFFERENTIABLE if (x := given[name]) is not None}
    # `enable_grad` would not do: compiled autograd runs graphs of gradients without recording their calls.
    with torch.inference_mode(False):
        outputs = _run(given | leaves)
    pairs = [
        (x, grad)
        for x, grad in zip(outputs, grads, strict=False)
        if x is not None and grad is not None and x.requires_grad
    ]
    of_leaves = torch.autograd.grad(
        [x for x, _ in pairs],
        [*leaves.values()],
        [grad for _, grad in pairs],
        materialize_grads=True,
    )
    found = dict(zip(leaves, of_leaves, strict=True))
    return tuple(_own(found.get(name), arguments, given["q"]) for name in _DIFFERENTIABLE)


def _fake_call_backward(*arguments: Any) -> tuple[Tensor, ...]:
    q, *rest = arguments[_NUM_GRADS : _NUM_GRADS + len(_DIFFERENTIABLE)]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, *rest))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.settings = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    arguments = (*ctx.saved_tensors, *ctx.settings)
    found = torch.ops.ovq.call_backward(*grads[:_NUM_GRADS], *arguments)
    own = [None if x is None else grad for x, grad in zip(arguments, found, strict=False)]
    return *own, *[None] * (len(arguments) - len(own))


# Not `torch.library.custom_op`: autograd records nothing inside one, but `ovq::call_backward` needs a graph.
for _name, _function, _fake in (
    ("call", _call, _fake_call),
    ("call_backward", _call_backward, _fake_call_backward),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ovq::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("ovq::call", _backward, setup_context=_setup_context, lib=_LIBRARY)
# Without a formula, PyTorch would merely warn, and drop second-order terms where it runs graphs as they are.
torch.library.register_autograd("ovq::call_backward", refuse_second_order, lib=_LIBRARY)

"""A call as one operator of `torch.library`, for `torch.compile` and `torch.export`, with or without a state.

The computation depends on the lengths of the rows and on the number of tokens seen, which a graph does not
know, so all of it is inside `ovq::call`. Graphs pass only tensors. A state is therefore passed as its
tensors, with room for all N slots, and the backward (`ovq::call_backward`) runs the call again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.ops import dispatch
from ovq.ops.ablation import Ablation
from ovq.ops.call import RowBounds
from ovq.ops.checks import check_state, checked_call, row_bounds
from ovq.ops.options import Options
from ovq.ops.parts import of_rows, slot_spec
from ovq.ops.state import OVQState, with_capacity

# Names of the differentiable inputs, in the order of the operator.
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
_NUM_DIFFERENTIABLE = len(_OF_TOKENS) + len(_OF_STATE)
# All tensors of a state. The operator returns the outputs, then these tensors of the final state.
_PIECES = (*_OF_STATE, "count", "num_seen")
_NUM_GRADS = 1 + len(_OF_STATE)

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor scale, Tensor? token_weights, Tensor? log_forget, "
    + ", ".join(f"Tensor? {name}" for name in _PIECES)
    + ", Tensor? bounds, int num_slots, int chunk_size, str growth, str merge, str bias, str rate, "
    "float value_weight, bool wants_state, str backend"
)
_GRADS = ", ".join(f"Tensor? grad_{name}" for name in ("o", *_OF_STATE))
_LIBRARY = torch.library.Library("ovq", "FRAGMENT")
_LIBRARY.define(f"call({_INPUTS}) -> ({', '.join(['Tensor'] * (1 + len(_PIECES)))})")
_LIBRARY.define(f"call_backward({_GRADS}, {_INPUTS}) -> ({', '.join(['Tensor'] * _NUM_DIFFERENTIABLE)})")


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
        str(options.ablation.rate),
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


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The arguments of `ovq::call`: differentiable tensors, other tensors of the state, and settings."""

    tensors: tuple[Tensor | None, ...]
    count: Tensor | None
    num_seen: Tensor | None
    bounds: Tensor | None
    options: Options
    wants_state: bool
    backend: str

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> _Inputs:
        count, num_seen, bounds, *rest = arguments[_NUM_DIFFERENTIABLE:]
        num_slots, chunk_size, growth, merge, bias, rate, value_weight, wants_state, backend = rest
        options = Options(
            num_slots=num_slots,
            chunk_size=chunk_size,
            growth=growth,
            init="novelty",
            merge=merge,
            seed=0,
            ablation=Ablation(bias=bias, rate=rate if rate == "count" else float(rate)),
            value_weight=value_weight,
        )
        tensors = tuple(arguments[:_NUM_DIFFERENTIABLE])
        return cls(tensors, count, num_seen, bounds, options, wants_state, backend)

    def run(self) -> list[Tensor | None]:
        """Outputs, and the tensors of the final state if `wants_state`."""
        q, k, v, scale, token_weights, log_forget, *memory = self.tensors
        state = None
        if self.count is not None:
            pieces: dict[str, Any] = dict(zip(_PIECES, (*memory, self.count, self.num_seen), strict=True))
            state = OVQState(num_slots=self.options.num_slots, chunk_size=self.options.chunk_size, **pieces)
        call = checked_call(
            q=q,  # type: ignore[arg-type]  # the first four are there
            k=k,  # type: ignore[arg-type]
            v=v,  # type: ignore[arg-type]
            scale=scale,  # type: ignore[arg-type]
            options=self.options,
            initial_state=state,
            wants_state=self.wants_state,
            attention_mask=None if self.bounds is None else RowBounds(self.bounds),
            token_weights=token_weights,
            log_forget=log_forget,
        )
        o, state = dispatch.run_of(call, self.backend)(call)
        if state is None or not self.wants_state:
            return [o]
        return [o, *_pieces(with_capacity(state, self.options.num_slots))]


def _own(x: Tensor | None, arguments: Sequence[Any], like: Tensor) -> Tensor:
    """x in memory not shared with an argument, as operators must return it; an empty tensor for None."""
    if x is None:
        return like.new_empty(0)
    memory = x.untyped_storage().data_ptr()
    is_shared = any(isinstance(y, Tensor) and y.untyped_storage().data_ptr() == memory for y in arguments)
    return x.clone(memory_format=torch.contiguous_format) if is_shared else x.contiguous()


def _call(*arguments: Any) -> tuple[Tensor, ...]:
    found = _Inputs.of(arguments).run()
    missing = [None] * (1 + len(_PIECES) - len(found))
    return tuple(_own(x, arguments, arguments[0]) for x in (*found, *missing))


def _fake_call(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs.of(arguments)
    q, k, v, _, token_weights, log_forget, *memory = arguments[:_NUM_DIFFERENTIABLE]
    o = q.new_empty(*q.shape[:3], v.shape[3])
    if not inputs.wants_state:
        return o, *(q.new_empty(0) for _ in _PIECES)
    of_state = dict(zip(_OF_STATE, memory, strict=True))
    spec = slot_spec(
        inputs.options.num_slots,
        num_kv_heads=k.shape[2],
        head_dim=k.shape[3],
        value_dim=v.shape[3],
        chunk_size=inputs.options.chunk_size,
        dtype=q.dtype,
        has_weights=token_weights is not None or of_state["weight"] is not None,
        forgets=log_forget is not None or of_state["pending_forget"] is not None,
    )
    spec = of_rows(spec, q.shape[0] if inputs.bounds is None else inputs.bounds.shape[1])
    pieces = []
    for name in _PIECES:
        shape, dtype = spec.get(name, ((0,), q.dtype))
        pieces.append(q.new_empty(shape, dtype=dtype, device="cpu" if name == "num_seen" else q.device))
    return o, *pieces


def _call_backward(*arguments: Any) -> tuple[Tensor, ...]:
    grads, inputs = arguments[:_NUM_GRADS], _Inputs.of(arguments[_NUM_GRADS:])
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs.tensors]
    with torch.enable_grad():
        outputs = dataclasses.replace(inputs, tensors=tuple(leaves)).run()
    pairs = [
        (x, grad)
        for x, grad in zip(outputs, grads, strict=False)
        if x is not None and grad is not None and x.requires_grad
    ]
    found = iter(
        torch.autograd.grad(
            [x for x, _ in pairs],
            [x for x in leaves if x is not None],
            [grad for _, grad in pairs],
            materialize_grads=True,
        )
    )
    return tuple(_own(None if x is None else next(found), arguments, arguments[_NUM_GRADS]) for x in leaves)


def _fake_call_backward(*arguments: Any) -> tuple[Tensor, ...]:
    q, *rest = arguments[_NUM_GRADS : _NUM_GRADS + _NUM_DIFFERENTIABLE]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, *rest))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.others = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    arguments = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
    found = torch.ops.ovq.call_backward(*grads[:_NUM_GRADS], *arguments)
    own = [grad if is_tensor else None for grad, is_tensor in zip(found, ctx.is_tensor, strict=False)]
    return *own, *[None] * (len(arguments) - len(own))


# Not `torch.library.custom_op`: autograd records nothing inside one, but `ovq::call_backward` needs a graph.
for _name, _run, _fake in (
    ("call", _call, _fake_call),
    ("call_backward", _call_backward, _fake_call_backward),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ovq::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("ovq::call", _backward, setup_context=_setup_context, lib=_LIBRARY)

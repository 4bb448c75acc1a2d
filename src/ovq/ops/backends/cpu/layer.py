"""Whole layers, attention and MLP, for one token of each row, in one call of a kernel.

Decoding streams all weights through the caches, which evicts everything else: what runs between two kernels
then costs several times what it costs alone. So all work of Python for a token comes before the call or after
it.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ovq.ops.backends.cpu.decode import PreparedStep, completed
from ovq.ops.backends.cpu.kernels import DTYPES, merge
from ovq.ops.backends.cpu.memory import HeadGroup
from ovq.ops.backends.cpu.mirrors import MIRRORS, Mirror
from ovq.ops.backends.cpu.tokens import call_kernel
from ovq.ops.backends.cpu.weights import Matrix
from ovq.ops.backends.torch.decode import merged_state
from ovq.ops.fading import LEAST_LOG, ended, faded
from ovq.ops.state import OVQState, advanced

_Layer = MIRRORS["Layer"]


class LayerWeights(NamedTuple):
    """The weights of a layer, float32, dense and on the CPU.

    Attributes:
        mixer_norm: `[D]` of the RMS norm before attention.
        qkv: `[(H + 2 Hkv) K, D]`.
        beta: `[H]`, temperatures.
        o: `[D, H K]`.
        mlp_norm: `[D]` of the RMS norm before the MLP.
        gate_up: `[2 I, D]`.
        down: `[D, I]`.
        taps: `[(H + 2 Hkv) K, C]` of the short convolution; None without one.
        output_gate: `[H K, D]` of the output gate, or None. output_norm: `[K]` of its RMS norm, likewise.
    """

    mixer_norm: Tensor
    qkv: Tensor
    beta: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    taps: Tensor | None = None
    output_gate: Tensor | None = None
    output_norm: Tensor | None = None


class TokenMemory(NamedTuple):
    """The attention memory of a layer, for one new token of each row.

    Attributes:
        decode: kernel arguments of exact tokens and slots, without what a layer computes for the new tokens.
        finished: makes the state with the new tokens; to be called after the kernel.
        kept: objects to keep alive until then.
        tensors: tensors that other fields of `Layer` (step.h) point to.
        numbers: more fields of `Layer`.
    """

    decode: Mirror
    finished: Callable[[], Any]
    kept: Sequence[Any]
    tensors: dict[str, Tensor | None]
    numbers: dict[str, Any]


def memory_of_slots(
    state: OVQState,
    step: PreparedStep,
    *,
    gate: Tensor | None,
    forget_gate: tuple[Tensor, Tensor] | None = None,
) -> TokenMemory:
    """The memory of a state after the decode step `step`; its tokens have weights if there is a gate.

    Args:
        step: the step before, which this one repeats.
        gate: `[Hkv, D]` of the merge gate, or None.
        forget_gate: `[Hkv, D]` and `[Hkv]` of the forget gate, or None.
    """
    after = advanced(state)
    decode, kept = step.call_of(after, state.num_seen)
    options, complete = step.options, completed(after)
    tensors: dict[str, Tensor | None] = {"merge_gate": gate}
    if forget_gate is None:
        return TokenMemory(
            decode, lambda: step.leading_to(merged_state(after, complete, options, merge)), kept, tensors, {}
        )
    assert state.pending_forget is not None
    before = state.pending_forget.contiguous()
    now = torch.empty_like(before)
    tensors |= {"forget_gate": forget_gate[0], "forget_bias": forget_gate[1]}
    tensors |= {"forgotten": before, "forgotten_now": now}

    def finished() -> OVQState:
        if not complete:
            return step.leading_to(dataclasses.replace(after, pending_forget=now))
        is_complete = now.new_zeros(len(now), dtype=torch.bool)
        is_complete[complete] = True
        log_fading = now * is_complete[:, None]
        merged = merged_state(faded(after, log_fading), complete, options, merge)
        return step.leading_to(ended(merged, now - log_fading, is_complete, options))

    return TokenMemory(decode, finished, kept, tensors, {"least_log": LEAST_LOG / options.chunk_size})


def memory_of_window(
    keys: Tensor,
    values: Tensor,
    first: Tensor | None,
    finished: Callable[[Tensor, Tensor], Any],
    *,
    num_heads: int,
) -> TokenMemory:
    """The memory of a sliding window.

    Args:
        keys: `[B, Hkv, S, K]` before the new token's own, vectors of a head contiguous. They are copied to a
            buffer that also gets the new one. values: likewise.
        first: `[B, 1]` int64, index of the first of the S + 1 keys that it sees; None for 0.
        finished: makes the state from keys and values `[B, Hkv, S + 1, K]`.
        num_heads: query heads.
    """
    rows, num_kv_heads, num_before, dim = keys.shape
    room = num_before + 1
    new_keys, new_values = (keys.new_empty(rows, num_kv_heads, room, dim) for _ in range(2))
    num_seen = (ctypes.c_int64 * rows)(*[num_before] * rows)
    sizes = (rows, num_kv_heads, num_heads // num_kv_heads, room, 0, dim, dim)
    decode = MIRRORS["Decode"](*sizes, torch.get_num_threads(), DTYPES.index(keys.dtype))
    decode.point(pending_keys=new_keys, pending_values=new_values, first_read=first)
    decode.num_seen = ctypes.addressof(num_seen)
    numbers = {"keys_before": keys.data_ptr(), "values_before": values.data_ptr(), "num_before": num_before}
    for name, x in (("key", keys), ("value", values)):
        numbers[f"{name}_row"], numbers[f"{name}_head"] = x.stride()[:2]
    kept = (num_seen, keys, values)
    return TokenMemory(decode, lambda: finished(new_keys, new_values), kept, {}, numbers)


class LayerStep(NamedTuple):
    """A layer as an argument of the kernel, for one token of each row.

    Attributes:
        call: sizes and addresses.
        memory: its attention memory.
        conv_state: `[B, (H + 2 Hkv) K, C - 1]` last convolution inputs once the kernel has run, or None.
        weights: those of the layer.
    """

    call: Mirror
    memory: TokenMemory
    conv_state: Tensor | None
    weights: LayerWeights


def layer_to_run(
    weights: LayerWeights,
    eps: tuple[float, float, float],
    memory: TokenMemory,
    past: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
) -> LayerStep:
    """A layer with its memory, as an argument of the kernel.

    Args:
        weights: those of the layer.
        eps: of both norms, and of that of the output gate (any number without one).
        memory: its attention memory, which gets the new tokens.
        past: `[B, (H + 2 Hkv) K, C - 1]` last inputs of the convolution; None without one.
        tables: `[1, K / 2]` cosines and sines that rotate queries and keys; None for no rotation.
    """
    width, inner = weights.down.shape
    sizes = {"width": width, "inner": inner, "num_tokens": 1}
    norms = {"mixer_eps": eps[0], "mlp_eps": eps[1], "head_eps": eps[2]}
    call = MIRRORS["Layer"](**sizes, **norms, memory=memory.decode, **memory.numbers)
    qkv, gate_up, o, down = (
        Matrix(x, "float32", (x.shape[0], x.shape[1]))
        for x in (weights.qkv, weights.gate_up, weights.o, weights.down)
    )
    num_queries = weights.o.shape[1]
    places = 0, num_queries, (num_queries + len(weights.qkv)) // 2
    call.q, call.k, call.v = map(qkv.call, places)
    call.gate, call.up = (gate_up.call(first) for first in (0, inner))
    call.o, call.down = o.call(), down.call()
    call.point(mixer_norm=weights.mixer_norm, beta=weights.beta, mlp_norm=weights.mlp_norm)
    if weights.output_gate is not None:
        call.output_gate = Matrix(weights.output_gate, "float32", (num_queries, width)).call()
        call.point(output_norm=weights.output_norm)
    cos, sin = tables or (None, None)
    call.point(cos=cos, sin=sin, **memory.tensors)
    conv_state = None
    if past is not None and weights.taps is not None:
        past = past.contiguous()
        conv_state = torch.empty_like(past)
        call.num_taps = past.shape[2] + 1
        call.point(taps=weights.taps, past=past, last=conv_state)
    return LayerStep(call, memory, conv_state, weights)


class HeadsLayer(NamedTuple):
    """A layer of a converted model (`ovq.convert`), without its memory. Norms are float32.

    Attributes:
        q: `[H K, D]`. k: `[Hkv K, D]`. v: likewise. o: `[D, H K]`.
        gate: `[I, D]`. up: likewise. down: `[D, I]`.
        mixer_norm: `[D]` of the RMS norm before attention. mlp_norm: of that before the MLP.
        q_norm: `[K]` of the RMS norm of each query, or None. k_norm: of each key, or None.
        eps: of the norms before attention and the MLP, and of those of heads.
        head_dim: K.
        score_scale: factor of scores.
    """

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    mixer_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: tuple[float, float, float]
    head_dim: int
    score_scale: float


class HeadsStep:
    """Layers of a converted model, run on a few tokens of each row at a time; `HeadGroup`s are their memory.

    Args:
        groups: those of each layer; the calls, and callers between them, change these in place.
        key_factors: `[Hkv, K]` of each layer, by which keys are multiplied and queries divided, or None.
        num_rows: rows B.
        most: maximum number of tokens of all rows in a call.
        is_rough: whether quantized weights are multiplied with int8 inputs, see `Matrix.call`.

    Attributes:
        cos: `[most, K]` cosines of the next tokens' angles, of which the kernel reads the first half; to be
            filled in, row by row. sin: sines.
    """

    def __init__(
        self,
        layers: Sequence[HeadsLayer],
        groups: Sequence[Sequence[HeadGroup]],
        key_factors: Sequence[Tensor | None],
        num_rows: int,
        most: int,
        *,
        is_rough: bool = False,
    ) -> None:
        dim = layers[0].head_dim
        with torch.inference_mode(False):  # A later call may be outside of it.
            self.cos, self.sin = torch.empty(2, most, dim, dtype=torch.float32, device="cpu")
        self._num_tokens = 0
        self._calls = (_Layer * len(layers))()
        self._kept: list[Any] = [layers, key_factors]
        for call, layer, own, factors in zip(self._calls, layers, groups, key_factors, strict=True):
            array = (HeadGroup * len(own))(*own)
            self._kept += [own, array]
            call.width, call.inner = layer.down.shape
            call.mixer_eps, call.mlp_eps, call.head_eps = layer.eps
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                setattr(call, name, getattr(layer, name).call(is_rough=is_rough))
            norms = {name: getattr(layer, name) for name in ("mixer_norm", "mlp_norm", "q_norm", "k_norm")}
            call.point(**norms, cos=self.cos, sin=self.sin, key_factors=factors)
            num_kv_heads, group_size = layer.k.shape[0] // dim, layer.q.shape[0] // layer.k.shape[0]
            sizes = {"num_rows": num_rows, "num_kv_heads": num_kv_heads, "group_size": group_size}
            call.memory, call.angle_row = MIRRORS["Decode"](**sizes, key_dim=dim, value_dim=dim), dim
            call.num_groups, call.groups = len(own), ctypes.addressof(array)
            call.score_scale = layer.score_scale

    def run(self, x: Tensor) -> Tensor:
        """Outputs `[B, T, D]` of the layers for float32 inputs; their memory has the tokens afterwards.

        Raises:
            MemoryError: no memory for the kernel's scratch.
        """
        self._set_length(x.shape[1])
        done = _run(x, self._calls)
        assert done is not None, "no gates"
        return done

    def run_before(self, after: HeadsStep, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`run(x)` and `after.run(y)` at once, where y are the tokens that follow x: y runs one layer behind.

        The groups of `after` count tokens as they are after x. Either both x and y have more than `FEW_ROWS`
        tokens, or neither.
        """
        calls: list[Mirror] = []
        for step, tokens in ((self, x), (after, y)):
            step._set_length(tokens.shape[1])
            calls += step._calls
        done = _run(torch.cat([x.flatten(0, 1), y.flatten(0, 1)]), (_Layer * len(calls))(*calls), num_lanes=2)
        assert done is not None, "no gates"
        first, second = done.split([x.shape[0] * x.shape[1], y.shape[0] * y.shape[1]])
        return first.view_as(x), second.view_as(y)

    def _set_length(self, num_tokens: int) -> None:
        """Set the number of tokens of each row."""
        if num_tokens != self._num_tokens:
            self._num_tokens = num_tokens
            for call in self._calls:
                call.num_tokens = num_tokens


def run_layers(x: Tensor, layers: Sequence[LayerStep]) -> Tensor | None:
    """One token per row through consecutive layers, without a gradient.

    Args:
        x: `[B, 1, D]` float32, at most `FEW_TOKENS` rows.
        layers: the layers, all of width D.

    Returns:
        `[B, 1, D]`; None if the gates give an invalid weight, as where `x` is not finite.
    """
    return _run(x, (_Layer * len(layers))(*[layer.call for layer in layers]))


# Outcomes of the kernel other than 0.
_INVALID_WEIGHT, _OUT_OF_MEMORY = 1, 2


def _run(x: Tensor, calls: ctypes.Array[Mirror], num_lanes: int = 1) -> Tensor | None:
    y = x.clone(memory_format=torch.contiguous_format)
    num, place = len(calls), ctypes.addressof(calls)
    size = num_lanes * call_kernel("ovq_layers_scratch", num, place)
    scratch = x.new_empty(size, dtype=torch.uint8)
    outcome = call_kernel(
        "ovq_layers_step", torch.get_num_threads(), num // num_lanes, num_lanes, place, scratch, y
    )
    if outcome == _OUT_OF_MEMORY:
        raise MemoryError("ovq_layers_step: no memory for the kernel's scratch")
    return None if outcome == _INVALID_WEIGHT else y

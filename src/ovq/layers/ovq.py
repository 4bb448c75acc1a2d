"""OVQ attention as a layer: linear time, constant memory, exact within a chunk (arXiv 2602.03922)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ovq.fields import ConfigField
from ovq.layers import defaults
from ovq.layers.cache import LayerCache
from ovq.layers.gates import ForgetGate, MergeGate
from ovq.layers.heads import AttentionMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import SlotMemory, check_num_seen
from ovq.layers.products import is_plain
from ovq.ops import OVQState, SlotAssignments, ovq_attention, slot_assignments
from ovq.ops.ablation import NAMES, Ablation, with_earlier_names
from ovq.ops.backends.cpu.layer import TokenMemory, memory_of_slots
from ovq.ops.backends.cpu.tokens import can_run
from ovq.ops.narrow import check_state_dtype
from ovq.ops.options import Options, check_sizes, current_merge, default_growth, options_of, weighing_chunk
from ovq.ops.parts import StateSpec, check_tensors, of_rows, slot_spec
from ovq.ops.schedule import scheduled_slots
from ovq.ops.serialization import check_state_tensors
from ovq.ops.state import SLOT_TENSORS

#: Options of the op that define the update rule of the dictionary; the layer and the config use these names.
LEARNING_OPTIONS = ("growth", "init", "merge", "ablation", "value_weight")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RecordedCall:
    """A call of the op by a layer, see `OVQAttention.recording`.

    Attributes:
        q: `[B, T, H, K]` queries. k: `[B, T, Hkv, K]` keys. v: `[B, T, Hkv, V]` values.
        scale: `[H]`.
        options: the other arguments of `ovq_attention`, including the initial state.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor
    options: Mapping[str, Any]

    def assignments(self) -> SlotAssignments:
        """Slots of the tokens of the call."""
        return slot_assignments(self.k, self.v, **self.options)


class OVQAttention(AttentionMixer):
    """Attention over a dictionary of at most `num_slots` slots, learned online, and over the current chunk.

    The first eight arguments may be positional, so the signature repeats those of `AttentionMixer`.

    Args:
        num_slots: N, the maximum number of slots per key/value head.
        chunk_size: C, tokens that are read exactly before they are merged; part of the model.
        growth: schedule of the number of slots: `"plateau"`, `"linear"` or `"immediate"`; None for the
            default of `merge`.
        init: which keys open slots: `"novelty"` or `"random"`.
        merge: update rule of the dictionary: `"existing"`, `"updated"` or `"nearest"`, as in
            `ovq.ops.ovq_attention`. `"ward"` and `"ward-sqrt"` of earlier versions run as `"nearest"`.
        ablation: changes for an ablation, as in `ovq.ops.ovq_attention`.
        value_weight: weight of values relative to keys in distances of rules that merge pairs.
        merge_gate: whether to learn the weight of each token, see `ovq.layers.gates.MergeGate`.
        forget_gate: whether to learn forgetting, see `ovq.layers.gates.ForgetGate`.
        state_dtype: format of the sums of slots, as in `OVQState.to_state_dtype`; other formats than
            `"float32"` are for inference.
        backend: as in `ovq.ops.ovq_attention`.
        kwargs: like all other arguments, those of `AttentionMixer`; also `bias` and `rate` of version 0.2,
            now part of `ablation`.

    Raises:
        ValueError: if sizes are inconsistent, or (on the first call) the op refuses an option.

    Example:
        >>> layer = OVQAttention(32, num_heads=2, num_slots=16, chunk_size=8)
        >>> o, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> o.shape, cache.layers[0].state.num_seen.tolist()
        (torch.Size([1, 20, 32]), [20])
    """

    forward_options = frozenset({"generator"})
    config_fields = (
        AttentionMixer.config_fields
        | {
            name: name
            for name in (
                *("num_slots", "chunk_size", "logn_length", "merge_gate", "forget_gate"),
                *LEARNING_OPTIONS,
            )
        }
        | {
            "state_dtype": ConfigField(
                str, "float32", "format of the slots: float32; at inference bfloat16 or int8"
            )
        }
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_slots: int = defaults.NUM_SLOTS,
        chunk_size: int = defaults.CHUNK_SIZE,
        conv_size: int = defaults.CONV_SIZE,
        layer_idx: int | None = None,
        *,
        growth: str | None = defaults.GROWTH,
        init: str = defaults.INIT,
        merge: str = defaults.MERGE,
        ablation: Ablation | Mapping[str, Any] | None = None,
        value_weight: float = defaults.VALUE_WEIGHT,
        merge_gate: bool = defaults.MERGE_GATE,
        forget_gate: bool = defaults.FORGET_GATE,
        state_dtype: str = "float32",
        backend: str = "auto",
        **kwargs: Any,
    ):
        earlier_names = {name: kwargs.pop(name) for name in NAMES if name in kwargs}
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            conv_size=conv_size,
            layer_idx=layer_idx,
            **kwargs,
        )
        check_sizes(1, chunk_size=chunk_size)
        self.chunk_size = chunk_size
        self.growth, self.init, self.merge, self.backend = growth, init, current_merge(merge), backend
        self.ablation = with_earlier_names(ablation, earlier_names, OVQAttention)
        self.value_weight = value_weight
        self.set_num_slots(num_slots)
        self.merge_gate = MergeGate(hidden_size, self.num_kv_heads) if merge_gate else None
        self.forget_gate = ForgetGate(hidden_size, self.num_kv_heads) if forget_gate else None
        self.set_state_dtype(state_dtype)
        self._record: list[RecordedCall] | None = None

    def set_num_slots(self, num_slots: int) -> None:
        """Set the maximum number of slots per head; cached states are resized on next use.

        With more slots at test time than in training, a trained layer remembers more. A state with too many
        slots is shrunk, see `OVQState.resize`.
        """
        check_sizes(1, num_slots=num_slots)
        self.num_slots = num_slots

    def set_state_dtype(self, state_dtype: str) -> None:
        """Set the format of the sums of slots; cached states are converted on next use.

        Raises:
            ValueError: if there is no such format.
        """
        check_state_dtype(state_dtype)
        self.state_dtype = state_dtype

    def extra_repr(self) -> str:
        """The settings of the dictionary, printed with the layer."""
        shown = self._sizes | self.learning | {"ablation": self.ablation.changes}
        return ", ".join(f"{option}={value!r}" for option, value in shown.items())

    def set_merge(self, merge: str, *, growth: str | None = None, value_weight: float | None = None) -> None:
        """Change the update rule of the dictionary; cached states continue with their slots.

        Without `growth`, the schedule is the default of `merge`; without `value_weight`, it stays.

        Raises:
            ValueError: if the op would refuse the settings, such as `"nearest"` with `init="random"`; nothing
                changes then.
        """
        merge = current_merge(merge)
        changes: dict[str, Any] = {
            "merge": merge,
            "growth": default_growth(merge) if growth is None else growth,
        }
        if value_weight is not None:
            changes["value_weight"] = value_weight
        Options(**self._sizes, seed=0, **self.learning | changes)
        for name, value in changes.items():
            setattr(self, name, value)

    @property
    def learning(self) -> dict[str, Any]:
        """Values of the `LEARNING_OPTIONS`, the update rule of the dictionary."""
        return {option: getattr(self, option) for option in LEARNING_OPTIONS}

    @property
    def _sizes(self) -> dict[str, Any]:
        """Sizes of the memory."""
        return {"num_slots": self.num_slots, "chunk_size": self.chunk_size}

    def mix(
        self,
        channels: Tensor,
        hidden_states: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        **options: Any,
    ) -> Tensor:
        """See `Mixer.mix`; the option `generator` seeds `init="random"`."""
        state = None if cache is None else cache.state
        q, k, v, scale = self.heads(channels, layout, None if state is None else state.num_seen)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if state is None and self.state_dtype != "float32":
            state = OVQState.empty(
                batch_size=q.shape[0] if layout.bounds is None else layout.bounds.bounds.shape[1],
                num_kv_heads=self.num_kv_heads,
                key_dim=self.head_dim,
                value_dim=self.head_dim,
                dtype=k.dtype,
                device=k.device,
                **self._sizes,
            )
        if state is not None:
            if state.num_slots != self.num_slots:
                state = state.resize(self.num_slots, value_weight=self.value_weight)
            state = state.to_state_dtype(self.state_dtype)
        options = {
            "initial_state": state,
            "attention_mask": layout.bounds,
            "generator": options.get("generator"),
            **self._sizes,
            **self.learning,
        }
        if self.merge_gate is not None:
            options["token_weights"] = self.merge_gate(hidden_states)
        if self.forget_gate is not None:
            options["log_forget"] = self.forget_gate(hidden_states)
        if self._record is not None:
            self._record.append(RecordedCall(q=q, k=k, v=v, scale=scale, options=options))
        o, state = ovq_attention(
            q,
            k,
            v,
            scale=scale,
            output_final_state=cache is not None,
            **options,
            backend=self.backend,
        )
        if cache is not None:
            cache.set_state(state, layout.num_new)
        return o.flatten(2)

    def token_memory(self, layout: SequenceLayout, cache: LayerCache) -> TokenMemory | None:
        """See `AttentionMixer.token_memory`: for a decode step that can reuse the previous prepared step."""
        state, gate, forget_gate = cache.state, self.merge_gate, self.forget_gate
        if not is_plain(self, OVQAttention) or self._record is not None:
            return None
        step = None if layout.bounds is not None or state is None else state._step
        if step is None or step.dtype != torch.float32 or self.backend not in ("auto", step.backend):
            return None
        if step.shapes[0][2] != self.num_heads or step.options.state_dtype != self.state_dtype:
            return None
        if (forget_gate is None) != (state.pending_forget is None):
            return None
        if (gate is None and forget_gate is None) != (state.weight is None):
            return None
        for each, kind in ((gate, MergeGate), (forget_gate, ForgetGate)):
            if each is None:
                continue
            weights = list(each.parameters())
            if not (is_plain(each, kind) and can_run(*weights) and all(x.is_contiguous() for x in weights)):
                return None
        options = options_of(**self._sizes, **self.learning, seed=0)
        if forget_gate is not None:
            options = weighing_chunk(options)
        if not step.continues(state, options):
            return None
        return memory_of_slots(
            state,
            step,
            gate=None if gate is None else gate.weight,
            forget_gate=None if forget_gate is None else (forget_gate.weight, forget_gate.bias),
        )

    @contextmanager
    def recording(self) -> Iterator[list[RecordedCall]]:
        """Record all calls of the op within this context in a list, to inspect the memory.

        Example:
            >>> layer = OVQAttention(32, num_heads=2, num_slots=16, chunk_size=8)
            >>> with layer.recording() as calls:
            ...     _ = layer(torch.randn(1, 20, 32))
            >>> len(calls), calls[0].assignments().slots.shape
            (1, torch.Size([1, 2, 20]))
        """
        calls: list[RecordedCall] = []
        before, self._record = self._record, calls
        try:
            yield calls
        finally:
            self._record = before

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Mixer.check_config`."""
        check_state_dtype(config.state_dtype)

    @classmethod
    def memory_of(cls, settings: Any, *, rope_theta: float | None = None) -> SlotMemory:
        """See `Mixer.memory_of`."""
        return SlotMemory(num_slots=settings.num_slots, chunk_size=settings.chunk_size, rope_theta=rope_theta)

    def num_open(self, num_tokens: int) -> int:
        """Number of slots in use per head after `num_tokens` tokens of a row."""
        merged = num_tokens // self.chunk_size * self.chunk_size
        if not merged:
            return 0
        # From an empty state on, no schedule opens more slots than a chunk has tokens, so the last chunk
        # decides. A loop over all chunks would be slow: a file may claim any number of tokens.
        growth = default_growth(self.merge) if self.growth is None else self.growth
        return scheduled_slots(merged, num_slots=self.num_slots, growth=growth)

    def memory_spec(self, num_tokens: int, dtype: torch.dtype) -> StateSpec:
        """Specification of the `OVQState`: sums, counts, pending buffers and the number of tokens."""
        return slot_spec(
            self.num_open(num_tokens),
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            chunk_size=self.chunk_size,
            dtype=dtype,
            has_weights=self.merge_gate is not None or self.forget_gate is not None,
            forgets=self.forget_gate is not None,
            state_dtype=self.state_dtype,
        )

    def check_state(
        self, where: str, tensors: Mapping[str, Tensor], *, num_tokens: int, dtype: torch.dtype
    ) -> None:
        """See `Mixer.check_state`."""
        check_state_tensors(where, tensors, **self._sizes)
        spec = self.state_spec(num_tokens, dtype)
        # After a resize in mid-stream, the number of slots may differ from the schedule.
        for name in SLOT_TENSORS:
            spec.pop(name, None)
        check_tensors(where, tensors, of_rows(spec, 1))
        check_num_seen(where, tensors, num_tokens)

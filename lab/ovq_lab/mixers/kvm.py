"""Key-Value Means (Goldstein, Singhal, Cheah 2026, arXiv 2605.09877): slots and a window in one softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.fields import ConfigField
from ovq.layers import defaults
from ovq.layers.cache import LayerCache
from ovq.layers.common import OwnWeights, apply_rotary, rotary_tables, without_autocast
from ovq.layers.constant import for_autograd, sum_dtype
from ovq.layers.heads import HeadsMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec
from ovq.ops.parts import of_rows
from ovq.ops.uncompiled import uncompiled
from ovq_lab.mixers.kvm_slots import Slots
from ovq_lab.mixers.kvm_state import (
    KVM_CHUNK_SIZE,
    KVM_GROWTH,
    KVM_GROWTHS,
    SLOT_TENSORS,
    WINDOW_TENSORS,
    KVMMemory,
    KVMSchedule,
)
from ovq_lab.mixers.norms import WideLayerNorm

WINDOW_CHUNKS = 2
SINKS = 1
NORM_LEAK = True


class KVMAttention(HeadsMixer, OwnWeights):
    """Softmax attention over slots and over the last chunks of tokens, each with a temperature per head.

    The window is the current chunk and the `kvm_window_chunks - 1` before it. When a chunk leaves it, the
    keys least similar to the slots open slots of their own, as far as the schedule has room; all others are
    added to the most similar slot, multiplied by a gate computed from the token. A slot's key is the
    layer-normalised sum of its keys; its value is the sum of its values, rescaled to the length of the first.
    The first `kvm_rope_dim` components of queries and keys are rotated by position; keys in slots have zeros
    there.

    The rule is that of the authors' code (github.com/SmerkyG/KVM-paper, `model/kvm_mixer.py`); their token
    shift and their residual of values are left out, as no mixer of this backbone has them.

    Args:
        num_slots: N, the largest number of slots per key/value head.
        kvm_chunk_size: C, tokens that leave the window together. None: 256, or N if that is less.
        kvm_window_chunks: chunks in the window, the current one included.
        kvm_growth: schedule of the number of slots, as in `KVMSchedule`.
        kvm_sinks: first slots that no token is ever added to.
        kvm_rope_dim: components of a head that are rotated. None: half of them.
        kvm_norm_leak: whether the layer norm of keys in slots may fill the components that were set to zero,
            as it does in the authors' code. With False they are set to zero again after the norm.
        rope_theta: base of the rotary frequencies.
        args: those of `HeadsMixer`.
        kwargs: likewise.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> layer = KVMAttention(32, num_heads=2, num_slots=12, kvm_chunk_size=4)
        >>> _, _, cache = layer(torch.randn(1, 22, 32), use_cache=True)
        >>> cache.layers[0].state["key_sum"].shape, cache.layers[0].state["keys"].shape
        (torch.Size([1, 2, 7, 16]), torch.Size([1, 2, 6, 16]))
    """

    supports_rope = False
    runs_in_groups = True
    config_fields = HeadsMixer.config_fields | {
        "rope_theta": "rope_theta",
        "num_slots": "num_slots",
        "kvm_chunk_size": ConfigField(
            int | None,
            None,
            f"tokens that leave the window together; None: {KVM_CHUNK_SIZE}, or `num_slots` if that is less",
        ),
        "kvm_window_chunks": ConfigField(
            int, WINDOW_CHUNKS, "chunks in the window, the current one included", at_least=1
        ),
        "kvm_growth": ConfigField(str, KVM_GROWTH, f"schedule of the slots: {', '.join(KVM_GROWTHS)}"),
        "kvm_sinks": ConfigField(int, SINKS, "first slots that no token is ever added to"),
        "kvm_rope_dim": ConfigField(
            int | None, None, "components of a head that are rotated by position; None: half of them"
        ),
        "kvm_norm_leak": ConfigField(
            bool, NORM_LEAK, "whether the norm of keys in slots may fill the components that were zeroed"
        ),
    }

    def __init__(
        self,
        *args: Any,
        num_slots: int = defaults.NUM_SLOTS,
        kvm_chunk_size: int | None = None,
        kvm_window_chunks: int = WINDOW_CHUNKS,
        kvm_growth: str = KVM_GROWTH,
        kvm_sinks: int = SINKS,
        kvm_rope_dim: int | None = None,
        kvm_norm_leak: bool = NORM_LEAK,
        rope_theta: float = defaults.ROPE_THETA,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.num_slots, self.kvm_chunk_size, self.kvm_growth = num_slots, kvm_chunk_size, kvm_growth
        self.kvm_window_chunks, self.kvm_sinks = kvm_window_chunks, kvm_sinks
        self.kvm_norm_leak = kvm_norm_leak
        self.schedule = KVMSchedule.of(self)
        self.rope_theta, self.rope_dim = rope_theta, checked_rope_dim(self.head_dim, kvm_rope_dim)
        self.q_norm, self.k_norm, self.state_norm = (WideLayerNorm(self.head_dim) for _ in range(3))
        self.gate_proj = nn.Linear(self.hidden_size, self.num_kv_heads, bias=False)
        self.window_temperature = nn.Parameter(torch.ones(self.num_heads))
        self.state_temperature = nn.Parameter(torch.ones(self.num_heads))

    def reset_parameters(self) -> None:
        """Set the temperatures to 1."""
        nn.init.ones_(self.window_temperature)
        nn.init.ones_(self.state_temperature)

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Mixer.check_config`."""
        KVMSchedule.of(config)
        checked_rope_dim(config.head_dim, config.kvm_rope_dim)

    @classmethod
    def equal_sizes(cls, config: Any) -> dict[str, int]:
        """Chunks half as long as the OVQ layer's, so that a window of two has as many tokens as its chunk."""
        return {"kvm_chunk_size": min(max(1 + config.kvm_sinks, config.chunk_size // 2), config.num_slots)}

    @classmethod
    def memory_of(cls, settings: Any, *, rope_theta: float | None = None) -> KVMMemory:
        """See `Mixer.memory_of`."""
        return KVMMemory(schedule=KVMSchedule.of(settings))

    def memory_spec(self, num_tokens: int, dtype: torch.dtype) -> StateSpec:
        """Sums of the slots; keys, values and gates of the window; number of tokens read."""
        slots = (self.num_kv_heads, self.schedule.num_open(num_tokens))
        window = (self.num_kv_heads, self.schedule.num_kept(num_tokens))
        wide = sum_dtype(dtype)
        return {
            "key_sum": ((*slots, self.head_dim), wide),
            "value_sum": ((*slots, self.head_dim), wide),
            "value_length": ((*slots, 1), wide),
            "keys": ((*window, self.head_dim), dtype),
            "values": ((*window, self.head_dim), dtype),
            "gate": ((*window, 1), wide),
            "num_seen": ((), torch.int64),
        }

    def mix(
        self,
        channels: Tensor,
        hidden_states: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        **options: Any,
    ) -> Tensor:
        """See `Mixer.mix`."""
        rows = layout.rows()
        q, k, v = self.split_heads(channels)
        # Keys are rounded before anything is computed from them, as the window keeps them rounded.
        q, k = self.q_norm(q), self.k_norm(k).to(v.dtype)
        gate = 1 + F.elu(self.gate_proj(hidden_states).to(sum_dtype(v.dtype)))
        q, k, v, gate = (rows.take(x).transpose(1, 2) for x in (q, k, v, gate[..., None]))
        lengths = [q.shape[2]] * len(q) if layout.bounds is None else layout.bounds.bounds[1].tolist()
        with without_autocast(q):
            before = self._state_before(cache, k)
            o, state = self._attend(q, {"keys": k, "values": v, "gate": gate}, before, lengths)
        if cache is not None:
            cache.set_state(state, layout.num_new)
        return rows.put(o.transpose(1, 2)).flatten(2)

    def _state_before(self, cache: LayerCache | None, k: Tensor) -> dict[str, Tensor]:
        """The state that a call starts from: the cached one, or an empty one."""
        state: dict[str, Tensor] | None = None if cache is None else cache.state
        num_seen = [0] * len(k) if state is None else state["num_seen"].tolist()
        specs = [self.memory_spec(num_tokens, k.dtype) for num_tokens in num_seen or [0]]
        spec = of_rows({name: max(each[name] for each in specs) for name in specs[0]}, len(k))
        if state is None:
            return {
                name: torch.zeros(shape, dtype=dtype, device="cpu" if name == "num_seen" else k.device)
                for name, (shape, dtype) in spec.items()
            }
        for name, (shape, dtype) in spec.items():
            found = state[name]
            if found.shape != shape or found.dtype != dtype:
                raise ValueError(
                    f"expected {name} of shape {list(shape)} in {dtype} in {self.memory.kind}, "
                    f"found {list(found.shape)} in {found.dtype}"
                )
        return for_autograd(state)

    # Not compiled: control flow depends on the numbers of tokens.
    @uncompiled
    def _attend(
        self, q: Tensor, new: dict[str, Tensor], before: dict[str, Tensor], lengths: list[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend chunk by chunk; when a chunk begins, the chunk that leaves the window enters the slots.

        Args:
            q: `[R, H, T, K]`, normalised.
            new: tensors of the new tokens `[R, Hkv, T, *]`, named as in `WINDOW_TENSORS`.
            before: the state before them.
            lengths: number of real tokens among the T, per row.

        Returns:
            `[R, H, T, V]` in the dtype of the values, and the state after the new tokens.
        """
        schedule, seen = self.schedule, before["num_seen"].tolist()
        if not seen:
            return q.new_zeros(*q.shape[:3], self.head_dim, dtype=new["values"].dtype), before
        kept = [schedule.num_kept(n) for n in seen]
        ends = [n + length for n, length in zip(kept, lengths, strict=True)]
        # Column 0 is the first token of each row's window, where a chunk begins in every row.
        tokens = {name: joined(before[name], new[name], kept) for name in WINDOW_TENSORS}
        first, end = min(kept), tokens["keys"].shape[2]
        offsets = [n - first for n in kept]
        left = [schedule.num_left(n) for n in seen]
        keys = self._rotated(tokens["keys"], left)
        aligned = joined(q[:, :, :0], q, offsets)
        q_slots, q_window = self._scaled(aligned, [n + first for n in left], keys.dtype)
        slots = Slots(
            **{name: before[name] for name in SLOT_TENSORS},
            num_open=[schedule.num_open(n) for n in seen],
            num_sinks=self.kvm_sinks,
            normalize=self._normalized,
        )
        outputs = []
        # Columns after which a chunk leaves the window: none while it is not full.
        stops = [*range(schedule.window_size, end, schedule.chunk_size), end]
        # Split, because the gradient of a slice is as large as all tokens together.
        chunks = {name: x.split(schedule.chunk_size, 2) for name, x in tokens.items()}
        sizes = [max(0, stop - max(first, start)) for start, stop in zip([0, *stops], stops, strict=False)]
        queries = zip(q_slots.split(sizes, 2), q_window.split(sizes, 2), strict=True)
        rotated = keys.split(schedule.chunk_size, 2)
        for i, (of_slots, of_window) in enumerate(queries):
            if i:
                leaving = {name: x[i - 1] for name, x in chunks.items()}
                slots = self._updated(slots, leaving, stops[i - 1], seen, ends)
            if sizes[i]:
                window = slice(i, i + schedule.window_chunks)
                k, v = (torch.cat(x[window], dim=2) for x in (rotated, chunks["values"]))
                outputs.append(slots.read(of_slots, of_window, k, v))
        o = cut(torch.cat(outputs, dim=2), offsets, [q.shape[2]] * len(offsets))
        # Before there are slots, weights that only slots use get a zero gradient instead of None: distributed
        # training waits for the gradient of every weight.
        for x in (q_slots, tokens["gate"], self._normalized(tokens["keys"][:, :, :0])):
            o = o + x[:, :, :0].sum().to(o.dtype)
        num_seen = [n + length for n, length in zip(seen, lengths, strict=True)]
        now_kept = [schedule.num_kept(n) for n in num_seen]
        starts = [e - n for e, n in zip(ends, now_kept, strict=True)]
        state = {name: getattr(slots, name) for name in SLOT_TENSORS}
        state |= {name: cut(x, starts, now_kept) for name, x in tokens.items()}
        return o, state | {"num_seen": torch.tensor(num_seen)}

    def _updated(
        self, slots: Slots, leaving: dict[str, Tensor], start: int, seen: list[int], ends: list[int]
    ) -> Slots:
        """The slots for queries from column `start` on, with the chunk that has left the window then."""
        schedule = self.schedule
        k, v, gate = (leaving[name] for name in WINDOW_TENSORS)
        is_active = [start < end for end in ends]
        num_open = [
            schedule.num_open(schedule.num_left(n) + start + 1) if active else num
            for n, active, num in zip(seen, is_active, slots.num_open, strict=True)
        ]
        k, v = self._normalized(self._without_rotated(k)), v.to(gate.dtype)
        return slots.updated(k, v, gate, num_open=num_open, is_active=is_active)

    def _normalized(self, x: Tensor) -> Tensor:
        """Layer-normalised slot keys `[..., K]`; `x` are keys without rotated components or sums of keys."""
        x = self.state_norm(x)
        return x if self.kvm_norm_leak else self._without_rotated(x)

    def _without_rotated(self, x: Tensor) -> Tensor:
        """`x` with zeros in the rotated components."""
        return F.pad(x[..., self.rope_dim :], (self.rope_dim, 0))

    def _rotated(self, x: Tensor, starts: list[int]) -> Tensor:
        """`x [R, h, T, K]` with rotary embedding; `starts` has the position of each row's first column.

        Positions count from the first token of the row: with `kvm_norm_leak`, slot keys are not zero in
        rotated components, so their scores depend on the position of the query.
        """
        wide = x.to(sum_dtype(x.dtype))
        starts = starts[:1] if len(set(starts)) == 1 else starts
        columns = torch.arange(x.shape[2], device=x.device)
        tables = [
            rotary_tables(start + columns, self.rope_dim, theta=self.rope_theta, like=wide)
            for start in starts
        ]
        cos, sin = (torch.stack(each) for each in zip(*tables, strict=True))
        rotated = apply_rotary(wide[..., : self.rope_dim], cos, sin)
        return torch.cat([rotated, wide[..., self.rope_dim :]], dim=-1).to(x.dtype)

    def _scaled(self, q: Tensor, starts: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotated queries for slots and for tokens, times their temperatures and `1 / sqrt(K)`."""
        q = self._rotated(q, starts) * self.head_dim**-0.5
        slots, window = (
            t.to(q.dtype)[:, None, None] for t in (self.state_temperature, self.window_temperature)
        )
        return (q * slots).to(dtype), (q * window).to(dtype)


def joined(past: Tensor, new: Tensor, num_past: list[int]) -> Tensor:
    """Append the new tokens `[R, h, T, D]` of each row to the first `num_past` of its past `[R, h, P, D]`.

    Returns:
        `[R, h, max(num_past) + T, D]`; columns after a row's last token have arbitrary finite values.

    Example:
        >>> past, new = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[4, 5], [6, 7]])
        >>> joined(past[:, None, :, None], new[:, None, :, None], [2, 1])[:, 0, :, 0]
        tensor([[1, 2, 4, 5],
                [3, 6, 7, 7]])
    """
    both = torch.cat([past, new], dim=2)
    if set(num_past) == {past.shape[2]}:
        return both
    column = torch.arange(max(num_past) + new.shape[2], device=new.device)
    num = torch.tensor(num_past, device=new.device)[:, None]
    source = torch.where(column < num, column, column - num + past.shape[2]).clamp(max=both.shape[2] - 1)
    return both.gather(2, source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))


def cut(x: Tensor, starts: list[int], lengths: list[int]) -> Tensor:
    """Copy `lengths` columns from `starts` on of each row of `x [R, h, L, D]`; pad with zeros.

    Example:
        >>> cut(torch.arange(8).view(2, 1, 4, 1), [2, 1], [2, 1])[:, 0, :, 0]
        tensor([[2, 3],
                [5, 0]])
    """
    longest = max(lengths)
    if min(lengths) == longest and min(starts) == max(starts):
        return x[:, :, starts[0] : starts[0] + longest].clone()
    column = torch.arange(longest, device=x.device)
    start, length = (torch.tensor(n, device=x.device)[:, None] for n in (starts, lengths))
    source = (start + column).clamp(max=x.shape[2] - 1)[:, None, :, None]
    taken = x.gather(2, source.expand(-1, x.shape[1], -1, x.shape[3]))
    return taken.masked_fill((column >= length)[:, None, :, None], 0)


def checked_rope_dim(head_dim: int, rope_dim: int | None) -> int:
    """Number of rotated components, by default half of the head. Raises ValueError for an impossible number.

    Example:
        >>> checked_rope_dim(128, None), checked_rope_dim(6, None)
        (64, 2)
    """
    if rope_dim is None:
        return 2 * (head_dim // 4)
    if rope_dim % 2 or not 0 <= rope_dim < head_dim:
        raise ValueError(
            f"kvm_rope_dim: expected an even number from 0 to below head_dim={head_dim}, found {rope_dim}"
        )
    return rope_dim

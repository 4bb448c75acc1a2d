"""`LayerMemory`: what one OVQ layer kept of a text and what its queries read, from a recorded call of the op.

The dictionary is carried from chunk to chunk by `slot_assignments`, so it is the one that the layer had,
whatever the rule that keeps it. The weights of the queries are computed here once more, in float32 and by the
formula of `docs/method/math.md` (1), because the op never forms them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovq.layers.ovq import RecordedCall
from ovq.ops import OVQState, slot_assignments
from ovq.ops.fading import LEAST_LOG
from ovq.ops.sums import log_mass, log_token_weights

# Less than this share of a vector's squared length is rounding.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerMemory:
    """What one OVQ layer kept of a text of T tokens, and what its queries read.

    A head here is one of the H query heads or of the Hkv key/value heads; query head h reads the dictionary
    of key/value head `h // (H // Hkv)`. A token in no slot is *pending*: it is kept exactly.

    Attributes:
        layer: Number of the layer in the model.
        num_slots: Largest number of slots per key/value head.
        chunk_size: Tokens per chunk.
        slots: `[Hkv, T]` int32 slot of each token right after its own chunk, -1 for pending ones.
        moves: `[X, 4]` int32 rows of chunk, head, slot and the slot that it was merged into at that chunk's
            end. Only rules that merge pairs have any.
        final_slots: `[Hkv, T]` int32 slot of each token at the end of the text, -1 for pending ones.
        kept: `[Hkv, T]` float32 share of each token's value that its slot still gives at the end: 1 -
            |v - D|^2 / |v - m|^2, where D is the mean of its slot and m the mean of all values of the head.
            It is 1 for a token that is kept exactly, and 0 where the slot is no better than m, or worse.
        entries: `[H, T, k]` int32 what each query reads most, the most first: a slot, or -1 - j for token j
            of its own chunk.
        weights: `[H, T, k]` float32 the weights of those; 0 where there are fewer than k.
        shares: `[H, T, 3]` float32 weight of each query on all exact tokens, on all slots of one token, and
            on all slots of several.

    Example:
        >>> from ovq.layers import OVQAttention
        >>> layer = OVQAttention(32, num_heads=2, num_slots=16, chunk_size=8, layer_idx=0)
        >>> with layer.recording() as calls:
        ...     _ = layer(torch.randn(1, 20, 32))
        >>> memory = layer_memory(calls[0], layer=0, num_reads=4)
        >>> memory.slots.shape, memory.entries.shape, memory.num_chunks
        ((2, 20), (2, 20, 4), 2)
        >>> bool(np.allclose(memory.shares.sum(-1), 1)), memory.final_slots[0, -1]
        (True, np.int32(-1))
    """

    layer: int
    num_slots: int
    chunk_size: int
    slots: np.ndarray
    moves: np.ndarray
    final_slots: np.ndarray
    kept: np.ndarray
    entries: np.ndarray
    weights: np.ndarray
    shares: np.ndarray

    @property
    def num_heads(self) -> int:
        """H, query heads."""
        return self.entries.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Hkv, key/value heads."""
        return self.slots.shape[0]

    @property
    def num_tokens(self) -> int:
        """T, tokens of the text."""
        return self.slots.shape[1]

    @property
    def num_chunks(self) -> int:
        """Complete chunks of the text: those that were merged."""
        return self.num_tokens // self.chunk_size

    def kv_head(self, head: int) -> int:
        """The key/value head whose dictionary a query head reads."""
        return head // (self.num_heads // self.num_kv_heads)

    def counts(self) -> np.ndarray:
        """`[Hkv, T]` how many tokens share the slot of each token at the end; 0 for pending ones."""
        found = np.zeros_like(self.final_slots)
        for of_head, slots in zip(found, self.final_slots, strict=True):
            is_merged = slots >= 0
            of_head[is_merged] = np.bincount(slots[is_merged], minlength=1)[slots[is_merged]]
        return found


@torch.no_grad()
def layer_memory(
    call: RecordedCall, *, layer: int, num_reads: int, progress: Callable[[int], None] | None = None
) -> LayerMemory:
    """Recount what a layer kept and read in one call, chunk by chunk.

    Args:
        call: A call of one row without padding that begins a text, see `OVQAttention.recording`.
        layer: Number of the layer.
        num_reads: k, how many of the weights of each query to keep.
        progress: Called with the number of tokens done, after each chunk.

    Raises:
        ValueError: If the call has several rows or padding, or continues a state, or `num_reads` is below 1.
    """
    _check(call, num_reads)
    options = dict(call.options)
    bias = options["ablation"].bias
    token_weights, log_forget = options.pop("token_weights", None), options.pop("log_forget", None)
    # Without a row of its own, the call has no padding, and so no mask is needed.
    for name in ("attention_mask", "initial_state"):
        options.pop(name)
    size, num_tokens = options["chunk_size"], call.k.shape[1]
    places = np.full((call.k.shape[2], num_tokens), -1, dtype=np.int32)
    first_places, moves, reads = places.copy(), [np.zeros((0, 4), dtype=np.int32)], []
    state: OVQState | None = None
    for start in range(0, num_tokens, size):
        chunk = slice(start, min(start + size, num_tokens))
        q, k, v = call.q[:, chunk], call.k[:, chunk], call.v[:, chunk]
        weights, logs = (None if x is None else x[:, chunk] for x in (token_weights, log_forget))
        of_tokens = None if logs is None else read_with(weights, logs, size)
        read = read_weights(q[0], k[0], state, scale=call.scale, bias=bias, log_weights=of_tokens)
        reads.append(_reads(read, state, num_reads))
        step = slot_assignments(k, v, initial_state=state, token_weights=weights, log_forget=logs, **options)
        if state is not None:
            to = step.earlier_slots[0].cpu().numpy().astype(np.int32)
            moves.append(_moves(to, start // size))
            before = places[:, :start]
            places[:, :start] = np.take_along_axis(to, before, 1)
        new = step.slots[0].cpu().numpy()
        places[:, chunk] = first_places[:, chunk] = new
        state = step.state
        if progress is not None:
            progress(chunk.stop)
    assert state is not None
    entries, on_entries, shares = (np.concatenate(parts, 1) for parts in zip(*reads, strict=True))
    return LayerMemory(
        layer=layer,
        num_slots=options["num_slots"],
        chunk_size=size,
        slots=first_places,
        moves=np.concatenate(moves),
        final_slots=places,
        kept=_kept(call.v[0], state, places),
        entries=entries,
        weights=on_entries,
        shares=shares,
    )


@torch.no_grad()
def read_with(token_weights: Tensor | None, log_forget: Tensor, chunk_size: int) -> Tensor:
    """The logs `[t, Hkv]` of the weights with which the tokens of a chunk are read where tokens forget.

    Args:
        token_weights: `[1, t, Hkv]` of the chunk's first t tokens; None for 1.
        log_forget: `[1, t, Hkv]`.
        chunk_size: C.

    Example:
        >>> read_with(None, torch.tensor([[[-1.0], [-0.5]]]), 4)
        tensor([[1.0000],
                [1.5000]])
    """
    logs = -log_forget[0].float().clamp(min=LEAST_LOG / chunk_size).cumsum(0)
    return logs if token_weights is None else logs + log_token_weights(token_weights[0].float())


def read_weights(
    q: Tensor,
    k: Tensor,
    state: OVQState | None,
    *,
    scale: Tensor,
    bias: str,
    log_weights: Tensor | None = None,
) -> Tensor:
    """The weights of the queries of one chunk, in float32: one softmax over the slots and the chunk so far.

    Args:
        q: `[t, H, K]` queries of the chunk's first t tokens. k: `[t, Hkv, K]` their keys.
        state: The row's state when the chunk begins; None for an empty one.
        scale: `[H]`.
        bias: `"count"` or `"count+norm"`, as in `ovq_attention`.
        log_weights: `[t, Hkv]` logs of the weights of the tokens; None for 0.

    Returns:
        `[H, t, n + t]` weights on the n slots in use, then on the t tokens; zero on later tokens.

    Example:
        >>> x = torch.eye(2)[:, None]
        >>> read_weights(x, x, None, scale=torch.tensor([0.0]), bias="count")
        tensor([[[1.0000, 0.0000],
                 [0.5000, 0.5000]]])
    """
    num_tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    keys, log_count = k.float().transpose(0, 1), k.new_zeros(k.shape[1], num_tokens, dtype=torch.float32)
    if log_weights is not None:
        log_count = log_weights.float().T
    num_open = 0 if state is None else int(state.num_open[0])
    if state is not None:
        keys = torch.cat([state.keys[0, :, :num_open].float(), keys], 1)
        # A token of the chunk is a slot of count 1, whose log is 0.
        log_count = torch.cat([log_mass(state.mass[0, :, :num_open], torch.float32), log_count], 1)
    keys, log_count = keys.repeat_interleave(group, 0), log_count.repeat_interleave(group, 0)
    wide_scale = scale.float()[:, None, None]
    scores = wide_scale * (q.float().transpose(0, 1) @ keys.mT) + log_count[:, None]
    if bias == "count+norm":
        scores = scores - wide_scale * keys.square().sum(-1)[:, None] / 2
    is_later = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -num_tokens:].masked_fill_(is_later, -torch.inf)
    return scores.softmax(-1)


def _check(call: RecordedCall, num_reads: int) -> None:
    """Raise ValueError unless a call can be recounted."""
    if call.k.shape[0] != 1:
        raise ValueError(f"expected a call of one row, found {call.k.shape[0]}")
    if call.options["initial_state"] is not None:
        raise ValueError("expected a call that begins a text, found one that continues a state")
    if call.options["attention_mask"] is not None:
        raise ValueError("expected a call without padding, found one with a mask")
    if num_reads < 1:
        raise ValueError(f"num_reads: expected at least 1, found {num_reads}")


def _moves(to: np.ndarray, chunk: int) -> np.ndarray:
    """The rows of `LayerMemory.moves` of one chunk, from where it put each slot, `[Hkv, M]`."""
    head, slot = np.nonzero((to >= 0) & (to != np.arange(to.shape[1])))
    return np.stack([np.full_like(head, chunk), head, slot, to[head, slot]], 1).astype(np.int32)


def _reads(weights: Tensor, state: OVQState | None, num_reads: int) -> tuple[np.ndarray, ...]:
    """Entries, weights and shares of the queries of one chunk, as in `LayerMemory`, from `[H, t, n + t]`."""
    num_heads, num_tokens, num_sources = weights.shape
    num_open = num_sources - num_tokens
    top, place = weights.topk(min(num_reads, num_sources), -1)
    entries = torch.where(place < num_open, place, num_open - 1 - place)
    missing = (0, num_reads - top.shape[-1])
    shares: list[Any] = [weights[..., num_open:].sum(-1)]
    if state is None:
        shares += [torch.zeros_like(shares[0])] * 2
    else:
        is_single = state.count[0, :, :num_open] == 1
        is_single = is_single.repeat_interleave(num_heads // len(is_single), 0)[:, None]
        on_slots = weights[..., :num_open]
        shares += [(on_slots * is_one).sum(-1) for is_one in (is_single, ~is_single)]
    return (
        torch.nn.functional.pad(entries, missing).to(torch.int32).cpu().numpy(),
        torch.nn.functional.pad(top, missing).cpu().numpy(),
        torch.stack(shares, -1).cpu().numpy(),
    )


def _kept(v: Tensor, state: OVQState, places: np.ndarray) -> np.ndarray:
    """See `LayerMemory.kept`: values `[T, Hkv, V]`, the state at the end, and where tokens are then."""
    values = v.double().transpose(0, 1)
    slots = torch.from_numpy(places).to(v.device, torch.int64)
    means = values
    if state.count.shape[2]:
        of_slot = slots.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1])
        means = state.values[0].double().gather(1, of_slot)
    lost = (values - means).square().sum(-1).masked_fill(slots < 0, 0)
    # What is lost of a slot's only token is the rounding of its sum.
    is_single = slots < 0
    if state.count.shape[2]:
        # Of a token of weight 0 its slot keeps nothing.
        is_single = ((state.count[0] == 1) & (state.mass[0] > 0)).gather(1, slots.clamp(min=0))
    lost = lost.masked_fill(is_single, 0)
    spread = (values - values.mean(1, keepdim=True)).square().sum(-1)
    # Where all values are equal, nothing can be lost but by rounding.
    rounding = _ROUNDING * values.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    lost = lost.masked_fill(lost <= rounding, 0)
    share = 1 - lost / spread.clamp(min=rounding)
    return share.clamp(0, 1).float().cpu().numpy()

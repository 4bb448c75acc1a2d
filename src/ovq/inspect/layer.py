"""`layer_memory`: what an OVQ layer kept of a text and what its queries read, from a recorded call of the op.

The dictionary is carried from chunk to chunk by `slot_assignments`, so it equals the layer's, whatever the
update rule. The attention weights are computed again here, in float32 and by the formula of
`docs/method/math.md` (1), because the op never forms them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ovq.inspect.memory import LayerMemory, Reads, kept_share, moves_of, reads_of
from ovq.layers.ovq import RecordedCall
from ovq.ops import OVQState, slot_assignments
from ovq.ops.fading import LEAST_LOG
from ovq.ops.sums import log_mass, log_token_weights


@torch.no_grad()
def layer_memory(
    call: RecordedCall, *, layer: int, num_reads: int, progress: Callable[[int], None] | None = None
) -> LayerMemory:
    """Reconstruct what a layer kept and read in one call, chunk by chunk.

    Args:
        call: A call of one row without padding that begins a text, see `OVQAttention.recording`.
        layer: Index of the layer.
        num_reads: k, number of largest attention weights to keep per query.
        progress: Called with the number of tokens done, after each chunk.

    Raises:
        ValueError: If the call has several rows or padding, or continues a state, or `num_reads` is below 1.

    Example:
        >>> from ovq.layers import OVQAttention
        >>> layer = OVQAttention(32, num_heads=2, num_slots=16, chunk_size=8, layer_idx=0)
        >>> with layer.recording() as calls:
        ...     _ = layer(torch.randn(1, 20, 32))
        >>> memory = layer_memory(calls[0], layer=0, num_reads=4)
        >>> memory.slots.shape, memory.entries.shape, memory.num_chunks(0)
        ((2, 20), (2, 20, 4), 2)
        >>> bool(np.allclose(memory.shares.sum(-1), 1)), int(memory.final_slots[0, -1])
        (True, -1)
    """
    options = dict(call.options)
    if call.k.shape[0] != 1:
        raise ValueError(f"expected a call of one row, found {call.k.shape[0]}")
    # Layers with narrow slots begin with an empty state.
    empty: OVQState | None = options.pop("initial_state")
    if empty is not None and bool(empty.num_seen.any()):
        raise ValueError("expected a call that begins a text, found one that continues a state")
    if options.pop("attention_mask") is not None:
        raise ValueError("expected a call without padding, found one with a mask")
    bias = options["ablation"].bias
    token_weights, log_forget = options.pop("token_weights", None), options.pop("log_forget", None)
    size, num_tokens = options["chunk_size"], call.k.shape[1]
    places = np.full((call.k.shape[2], num_tokens), -1, dtype=np.int32)
    first_places, moves, reads = places.copy(), [np.zeros((0, 4), dtype=np.int32)], list[Reads]()
    state: OVQState | None = None
    for start in range(0, num_tokens, size):
        chunk = slice(start, min(start + size, num_tokens))
        q, k, v = call.q[:, chunk], call.k[:, chunk], call.v[:, chunk]
        weights, logs = (None if x is None else x[:, chunk] for x in (token_weights, log_forget))
        of_tokens = None if logs is None else read_with(weights, logs, size)
        read = read_weights(q[0], k[0], state, scale=call.scale, bias=bias, log_weights=of_tokens)
        positions = torch.arange(start, chunk.stop, device=read.device)
        is_single = None if state is None else state.count[0, :, : int(state.num_open[0])] == 1
        reads.append(reads_of(read, positions, num_reads, is_single=is_single))
        before_chunk = empty if state is None else state
        step = slot_assignments(
            k, v, initial_state=before_chunk, token_weights=weights, log_forget=logs, **options
        )
        if state is not None:
            to = step.earlier_slots[0].cpu().numpy().astype(np.int32)
            moves.append(moves_of(to, start // size))
            before = places[:, :start]
            places[:, :start] = np.take_along_axis(to, before, 1)
        new = step.slots[0].cpu().numpy()
        places[:, chunk] = first_places[:, chunk] = new
        state = step.state
        if progress is not None:
            progress(chunk.stop)
    assert state is not None
    num_kv_heads = call.k.shape[2]
    # A slot keeps nothing of a token of weight 0.
    is_single = (state.count[0] == 1) & (state.mass[0] > 0)
    return LayerMemory(
        layer=layer,
        num_slots=(options["num_slots"],) * num_kv_heads,
        num_exact=(size,) * num_kv_heads,
        num_sinks=0,
        chunk_size=size,
        slots=first_places,
        moves=np.concatenate(moves),
        final_slots=places,
        kept=kept_share(call.v[0].transpose(0, 1), state.values[0], is_single, places),
        **Reads.joined(reads)._asdict(),
    )


@torch.no_grad()
def read_with(token_weights: Tensor | None, log_forget: Tensor, chunk_size: int) -> Tensor:
    """Logs `[t, Hkv]` of the weights (29) with which queries read the tokens of their own chunk.

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
    """Attention weights of the queries of one chunk, in float32: softmax over the slots and the chunk so far.

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

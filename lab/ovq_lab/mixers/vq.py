"""VQ-attention (Transformer-VQ, Lingle 2023, arXiv 2309.16354): keys are replaced by learned slots."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ovq.fields import ConfigField, is_finite
from ovq.layers import defaults
from ovq.layers.cache import LayerCache
from ovq.layers.common import OwnWeights, without_autocast
from ovq.layers.constant import ConstantStateMixer, sum_dtype
from ovq.layers.heads import AttentionMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec
from ovq.ops.serialization import check_counts
from ovq.ops.uncompiled import uncompiled

VQ_DECAY = 0.99
COMMITMENT_WEIGHT = 0.1

# A slot whose count is below the first share of the average is dead; it restarts with the second share of it.
DEAD_SHARE, RESTART_SHARE = 0.03, 0.1


@dataclass(frozen=True, eq=False)
class DictionaryStep:
    """The slots that one training step reads.

    Attributes:
        key_sum: `[Hkv, N, K]`.
        count: `[Hkv, N]`.
    """

    key_sum: Tensor
    count: Tensor

    @property
    def means(self) -> Tensor:
        """The slots `[Hkv, N, K]` in float32 (float64 if they are kept in float64)."""
        wide = sum_dtype(self.key_sum.dtype)
        return self.key_sum.to(wide) / self.count.to(wide)[..., None]


class StaticDictionary(OwnWeights):
    """N slots per head, each the moving average of the keys nearest to it; they change only in training.

    The slots are buffers: no optimizer sees them, and they do not count as parameters. A training step reads
    the slots computed by the previous step, and computes those of the next. So the layer may run again in the
    backward pass of its step, as gradient checkpointing requires.

    `requires_grad_(False)` freezes the slots; `requires_grad_(True)` has them learned even if the layer
    around them is frozen.

    A slot that is assigned hardly any keys is dead [ours]: it restarts at a key of the batch, drawn by
    PyTorch's global generator with probability proportional to the key's squared distance from its own slot.
    """

    #: Whether slots are learned in training; None: if the projection of the keys is trained.
    is_learned: bool | None = None
    key_sum: Tensor
    count: Tensor
    next_key_sum: Tensor
    next_count: Tensor

    def __init__(self, num_heads: int, *, num_slots: int, head_dim: int, decay: float):
        super().__init__()
        self.decay = decay
        for prefix in ("", "next_"):
            self.register_buffer(f"{prefix}key_sum", torch.empty(num_heads, num_slots, head_dim))
            self.register_buffer(f"{prefix}count", torch.empty(num_heads, num_slots))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw slots of length about 1, with counts so small that the first step outweighs them."""
        weight = 1e-3
        nn.init.normal_(self.key_sum, std=weight * self.key_sum.shape[-1] ** -0.5)
        nn.init.constant_(self.count, weight)
        nn.init.zeros_(self.next_key_sum)
        nn.init.zeros_(self.next_count)

    def requires_grad_(self, requires_grad: bool = True) -> StaticDictionary:
        """Set whether the slots are learned; they have no gradient in either case."""
        self.is_learned = requires_grad
        return super().requires_grad_(requires_grad)

    @property
    def means(self) -> Tensor:
        """The slots `[Hkv, N, K]` in float32 (float64 if they are kept in float64)."""
        return DictionaryStep(self.key_sum, self.count).means

    def forward(
        self, k: Tensor, mask: Tensor | None = None, step: DictionaryStep | None = None
    ) -> tuple[Tensor, Tensor]:
        """The slots, and the index of the slot nearest to each key.

        Args:
            k: `[R, Hkv, T, K]`.
            mask: `[R, T]`, True for keys of real tokens; None if all are.
            step: the training step that learns from these keys; None to learn nothing.

        Returns:
            `[Hkv, N, K]` in the dtype of `k`, and `[R, Hkv, T]` int64.
        """
        means = (self.means if step is None else step.means).to(k.dtype)
        slots = self.nearest(k, means)
        if step is not None:
            self.learn(k, slots, mask, step)
        return means, slots

    @staticmethod
    @torch.no_grad()
    def nearest(k: Tensor, means: Tensor) -> Tensor:
        """The slot nearest to each key, `[R, Hkv, T]` int64; `k` `[R, Hkv, T, K]`, `means` `[Hkv, N, K]`."""
        half = means.square().sum(-1)[:, None] / 2
        # Of all tokens at once, their products with the slots would be the largest tensor of a call.
        parts = k.split(1024, 2)
        return torch.cat([(part @ means.transpose(-1, -2) - half).argmax(-1) for part in parts], 2)

    @torch.no_grad()
    @uncompiled
    def begin_step(self) -> DictionaryStep:
        """Begin a training step: adopt what the last step has learned."""
        if self.key_sum.is_meta:
            raise ValueError("expected the slots of a 'vq' layer in memory in training, found them offloaded")
        # New tensors, because graphs may still hold the old ones.
        if not _is_in_backward() and bool((self.next_count > 0).any()):
            self.key_sum, self.count = self.next_key_sum, self.next_count
        return DictionaryStep(self.key_sum, self.count)

    @torch.no_grad()
    @uncompiled
    def learn(self, k: Tensor, slots: Tensor, mask: Tensor | None, step: DictionaryStep) -> None:
        """Compute the slots of the next step; does nothing in a backward pass, as the forward has done it.

        Args:
            k: `[R, Hkv, T, K]` keys of this step.
            slots: `[R, Hkv, T]` the slots they are assigned to.
            step: the slots that the keys were compared with.
        """
        if _is_in_backward():
            return
        means = step.means
        num_heads, num_slots, _ = means.shape
        k, slots = k.transpose(0, 1).flatten(1, 2), slots.transpose(0, 1).flatten(1)
        if mask is not None:
            k, slots = k[:, mask.flatten()], slots[:, mask.flatten()]
        place = slots.unsqueeze(-1).expand_as(k)
        seen_sum = torch.zeros_like(means).scatter_add_(1, place, k)
        seen_count = torch.zeros_like(means[..., 0]).scatter_add_(1, slots, torch.ones_like(k[..., 0]))
        key_sum = torch.lerp(seen_sum, step.key_sum.to(k.dtype), self.decay)
        count = torch.lerp(seen_count, step.count.to(k.dtype), self.decay)

        average = count.mean(-1, keepdim=True)
        is_dead = count < DEAD_SHARE * average
        if bool(is_dead.any()) and k.shape[1]:
            distance = (k - means.gather(1, place)).square().sum(-1) + 1e-9
            drawn = torch.multinomial(distance, num_slots, replacement=True)
            keys = k[torch.arange(num_heads, device=k.device)[:, None], drawn]
            restart = (RESTART_SHARE * average).expand_as(count)
            count = torch.where(is_dead, restart, count)
            key_sum = torch.where(is_dead[..., None], keys * restart[..., None], key_sum)
        self.next_key_sum = key_sum.to(step.key_sum.dtype)
        self.next_count = count.to(step.count.dtype)


def _is_in_backward() -> bool:
    """Whether autograd is in its backward pass: a layer that runs then is recomputed by checkpointing."""
    return torch._C._current_graph_task_id() != -1


class VQAttention(ConstantStateMixer, AttentionMixer):
    """Softmax attention with every key replaced by the nearest of N slots, which do not depend on the text.

    `o_t = sum_{j<=t} softmax_j(scale q_t.D[z_j]) v_j`, where `z_j` is the slot nearest to key j. This is
    computed exactly, in O(T (N + C)) time: tokens of one slot share one weight, so their count and the mean
    of their values suffice. Tokens of the current and the previous chunk are read one by one. This gives the
    same output, and lets the gradient pass straight through to their keys; keys of older chunks get no
    gradient, as in the paper. The paper's relative positions (which act only within these two chunks), its
    gate and its activation of the values are left out: no mixer of this backbone has them, and only the
    memory is to differ.

    Args:
        num_slots: N, slots per key/value head.
        chunk_size: C, tokens per chunk; it affects which keys get a gradient, but not the output.
        vq_decay: decay per training step of the moving averages that make the slots.
        commitment_weight: factor on the loss that draws keys to their slots,
            `mean over tokens and heads of |k - D[z]|^2`.
        args: those of `AttentionMixer`.
        kwargs: those of `AttentionMixer`.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> layer, losses = VQAttention(32, num_heads=2, num_slots=16, chunk_size=8), []
        >>> o, _, cache = layer(torch.randn(1, 20, 32), use_cache=True, auxiliary_losses=losses)
        >>> cache.layers[0].state["count"].sum(-1).tolist(), len(losses)
        ([[20, 20]], 1)
    """

    forward_options = frozenset({"auxiliary_losses", "step"})
    config_fields = AttentionMixer.config_fields | {
        "num_slots": "num_slots",
        "chunk_size": "chunk_size",
        "vq_decay": ConfigField(
            float, VQ_DECAY, "decay per training step of the moving averages that make the slots"
        ),
        "commitment_weight": ConfigField(
            float, COMMITMENT_WEIGHT, "factor on the loss that draws keys to their slots", at_least=0
        ),
    }
    state_kind = "counts and sums of values of static slots"
    supports_logn = False
    # Its dictionary sees all tokens of a call at once; only reading is by rows.
    runs_in_groups = False
    trained_on_whole_batches = (
        "its dictionary is a moving average over all tokens of a training step, wherever they are"
    )

    def __init__(
        self,
        *args: Any,
        num_slots: int = defaults.NUM_SLOTS,
        chunk_size: int = defaults.CHUNK_SIZE,
        vq_decay: float = VQ_DECAY,
        commitment_weight: float = COMMITMENT_WEIGHT,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_vq(num_slots, chunk_size, vq_decay, commitment_weight)
        self.num_slots, self.chunk_size, self.commitment_weight = num_slots, chunk_size, commitment_weight
        self.dictionary = StaticDictionary(
            self.num_kv_heads, num_slots=num_slots, head_dim=self.head_dim, decay=vq_decay
        )

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Mixer.check_config`."""
        check_vq(config.num_slots, config.chunk_size, config.vq_decay, config.commitment_weight)

    def begin_step(self) -> DictionaryStep | None:
        """The slots that a training step reads and updates; None if nothing is learned.

        Slots are learned if the projection of the keys is trained. In a frozen layer they stay fixed, so that
        an adapter (LoRA) and its base model are all that has to be saved. `dictionary.requires_grad_()` or
        peft's `modules_to_save=["dictionary"]` overrides this.
        """
        is_learned = self.dictionary.is_learned
        if is_learned is None:
            # peft wraps the dictionary and trains a copy.
            is_wrapped = not isinstance(self.dictionary, StaticDictionary)
            is_learned = is_wrapped or self.qkv_proj.weight.requires_grad
        return self.dictionary.begin_step() if self.training and is_learned else None

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """The number of tokens of each slot, and the sum of their values."""
        shape = (self.num_kv_heads, self.num_slots)
        return {
            "count": (shape, torch.int64),
            "value_sum": ((*shape, self.head_dim), sum_dtype(dtype)),
        }

    def check_state(
        self, where: str, tensors: Mapping[str, Tensor], *, num_tokens: int, dtype: torch.dtype
    ) -> None:
        """See `Mixer.check_state`; counts must add up, as every token is in one slot."""
        super().check_state(where, tensors, num_tokens=num_tokens, dtype=dtype)
        check_counts(where, tensors["count"], total=num_tokens)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        auxiliary_losses: MutableSequence[Tensor] | None = None,
        step: DictionaryStep | None = None,
    ) -> Tensor:
        """See `AttentionMixer.attend`. The commitment loss is appended to `auxiliary_losses` (list or deque);
        `step` is the result of `begin_step`, which is called here if it is None."""
        step = self.begin_step() if step is None else step
        q = q * scale[:, None]
        with without_autocast(q):
            means, slots = self.dictionary(k.transpose(1, 2), layout.new_mask, step)
            slots = slots.transpose(1, 2)
            nearest = means[torch.arange(self.num_kv_heads, device=k.device), slots]
            if auxiliary_losses is not None:
                auxiliary_losses.append(self.commitment_weight * _mean_distance(k, nearest, layout.new_mask))
            straight = k + (nearest - k).detach()
            read, tokens = functools.partial(self._read, means=means, cache=cache), (q, straight, v, slots)
            return layout.in_groups(read, *tokens) if cache is None else read(*tokens, layout)

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        layout: SequenceLayout,
        *,
        means: Tensor,
        cache: LayerCache | None,
    ) -> Tensor:
        """`attend` with k and their slots `[B, T, Hkv]` of the `means` given."""
        rows = layout.rows()
        q, k, wide_v, slots = (rows.take(x).transpose(1, 2) for x in (q, k, v.to(q.dtype), slots))
        before = self.state_before(cache, q.shape[0], v)
        o, count, value_sum = vq_read(
            q, k, wide_v, slots, means, **before, is_token=rows.mask, chunk_size=self.chunk_size
        )
        if cache is not None:
            cache.set_state({"count": count, "value_sum": value_sum}, layout.num_new)
        return rows.put(o.transpose(1, 2)).to(v.dtype)


def vq_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    means: Tensor,
    *,
    count: Tensor,
    value_sum: Tensor,
    is_token: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over slots for older chunks, and over single tokens for the current and the previous chunk.

    Args:
        q: `[R, H, T, K]`, scaled.
        k: `[R, Hkv, T, K]`, equal to the slots of the tokens, with a straight-through gradient to the keys.
        v: `[R, Hkv, T, V]`.
        slots: `[R, Hkv, T]` int64.
        means: `[Hkv, N, K]`.
        count: `[R, Hkv, N]` number of earlier tokens in each slot.
        value_sum: `[R, Hkv, N, V]` sum of their values.
        is_token: `[R, T]` bool, False for positions that are not counted, whose v is 0. None: all are tokens.
        chunk_size: C.

    Returns:
        `[R, H, T, V]`, and `count` and `value_sum` including these tokens.
    """
    counted = torch.ones_like(slots) if is_token is None else is_token[:, None].expand_as(slots).long()
    # Split, because the gradient of a slice is as large as all tokens together.
    chunks = [x.split(chunk_size, -2) for x in (q.unflatten(1, (k.shape[1], -1)), k, v)]
    chunks += [x.split(chunk_size, -1) for x in (slots, counted)]
    outputs = []
    last_k, *last = (x[:, :, :0] for x in (k, v, slots, counted))
    for queries, own_k, *own in zip(*chunks, strict=True):
        recent_k, recent_v = torch.cat([last_k, own_k], 2), torch.cat([last[0], own[0]], 2)
        to_slots = queries.flatten(2, 3) @ means.transpose(-1, -2) + count.to(q.dtype).log()[:, :, None]
        place = torch.arange(recent_k.shape[2], device=q.device)
        is_later = (place > place[last_k.shape[2] :, None]).repeat(queries.shape[2], 1)
        to_tokens = queries.flatten(2, 3) @ recent_k.transpose(-1, -2)
        weights = torch.cat([to_slots, to_tokens.masked_fill(is_later, -torch.inf)], dim=-1).softmax(-1)
        from_slots, from_tokens = weights.split([means.shape[1], to_tokens.shape[-1]], dim=-1)
        value_means = value_sum / count.clamp(min=1).to(value_sum.dtype)[..., None]
        o = from_slots @ value_means + from_tokens @ recent_v
        outputs.append(o.unflatten(2, (queries.shape[2], -1)))
        count, value_sum = _merged(count, value_sum, *last)
        last_k, last = own_k, own
    count, value_sum = _merged(count, value_sum, *last)
    return torch.cat(outputs, dim=3).flatten(1, 2), count, value_sum


def _merged(
    count: Tensor, value_sum: Tensor, v: Tensor, slots: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Counts and sums including the tokens of a chunk."""
    value_sum = value_sum.scatter_add(2, slots[..., None].expand_as(v), v)
    return count.scatter_add(2, slots, counted), value_sum


def _mean_distance(k: Tensor, nearest: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared distance of keys from their slots, over tokens and heads."""
    distance = (k - nearest.detach()).square().sum(-1)
    if mask is None:
        return distance.mean()
    return distance.masked_fill(~mask[..., None], 0).sum() / (mask.sum() * k.shape[2]).clamp(min=1)


def check_vq(num_slots: int, chunk_size: int, vq_decay: float, commitment_weight: float) -> None:
    """Raise ValueError if a setting of VQ-attention is out of range."""
    for name, value in (("num_slots", num_slots), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    if not 0 <= vq_decay < 1:
        raise ValueError(f"vq_decay: expected a number in [0, 1), found {vq_decay}")
    if not is_finite(commitment_weight):
        raise ValueError(f"commitment_weight: expected a finite number, found {commitment_weight}")
    if commitment_weight < 0:
        raise ValueError(f"commitment_weight: expected at least 0, found {commitment_weight}")

"""The reference backend: OVQ attention in plain loops over rows, heads and tokens.

Read it beside the algorithm (`docs/method/math.md`); every other backend is tested against it. It puts
clarity before speed, works in any floating-point dtype and is differentiated by ordinary autograd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ovq.ops.call import Call
from ovq.ops.fading import LEAST_WEIGHT
from ovq.ops.known import Known
from ovq.ops.naive_pairs import cheapest_clusters, lowest, nearest_clusters, points
from ovq.ops.narrow import STATE_DTYPES, rounded_
from ovq.ops.options import NO_COSINE, NO_WEIGHT, TIE, TINY, Options
from ovq.ops.precision import full_precision, rounded
from ovq.ops.random_init import random_priority
from ovq.ops.schedule import grown_slots
from ovq.ops.state import OVQState
from ovq.ops.sums import DTYPES, divisor, log_mass, log_token_weights, state_dtype, without_trace

KNOWN = Known(
    dtypes=DTYPES,
    growth=("plateau", "linear", "immediate"),
    init=("novelty", "random"),
    merge=("existing", "updated", "ward", "ward-sqrt", "nearest"),
    bias=("count", "count+norm"),
    rate=("count", "number"),
    gates=("token_weights", "log_forget"),
    state_dtype=STATE_DTYPES,
)


@dataclasses.dataclass
class _Head:
    """The dictionary of one key/value head: the sums, count and weight of each slot.

    `weight` is None if tokens have no weights; the weight of a slot is then its count.
    """

    key_sum: list[Tensor]
    value_sum: list[Tensor]
    count: list[int]
    weight: list[Tensor] | None

    @property
    def mass(self) -> Tensor:
        """Mass of each slot: its total weight, or its count if tokens have no weights."""
        if self.weight is None:
            return torch.tensor(self.count, dtype=self.key_sum[0].dtype, device=self.key_sum[0].device)
        return torch.stack(self.weight)

    def means(self, sums: list[Tensor]) -> Tensor:
        """Means of the slots; 0 for a slot whose tokens all have weight 0."""
        return torch.stack(sums) / divisor(self.mass, sums[0].dtype)[:, None]

    def open_slots(self, num: int, key: Tensor, value: Tensor) -> None:
        self.key_sum += [torch.zeros_like(key)] * num
        self.value_sum += [torch.zeros_like(value)] * num
        self.count += [0] * num
        if self.weight is not None:
            self.weight += [torch.zeros_like(key[0])] * num

    def merge_into(self, slot: int, key: Tensor, value: Tensor, weight: Tensor, rate: float | str) -> None:
        for sums, x in ((self.key_sum, key), (self.value_sum, value)):
            if self.weight is not None:
                sums[slot] = sums[slot] + weight * without_trace(x, weight)
            elif isinstance(rate, str) or not self.count[slot]:
                sums[slot] = sums[slot] + x
            else:
                mean = sums[slot].double() / self.count[slot]
                # Not `mean + rate * (x - mean)`, which loses a small x at a rate of 1.
                sums[slot] = ((1 - rate) * mean + rate * x.double()) * (self.count[slot] + 1)
        self.count[slot] += 1
        if self.weight is not None:
            self.weight[slot] = self.weight[slot] + weight

    def fade(self, factors: Tensor, options: Options) -> None:
        """Multiply the sums and weight of each slot by its factor."""
        assert self.weight is not None
        for name in ("key_sum", "value_sum", "weight"):
            setattr(self, name, [x * factor for x, factor in zip(getattr(self, name), factors, strict=True)])
        # Means in a narrow format do not fade.
        self.round_sums(options)

    def bound_weights(self, options: Options) -> None:
        """Free slots that have faded to almost nothing, or keep them there if the rule frees no slots."""
        mass = self.mass.detach()
        least = torch.zeros_like(mass) if options.merges_pairs else LEAST_WEIGHT / divisor(mass, mass.dtype)
        self.fade(torch.where((mass > 0) & (mass < LEAST_WEIGHT), least, 1), options)

    def round_sums(self, options: Options) -> None:
        """Round the sums to what their format can hold; with forgetting it holds means."""
        if options.state_dtype == "float32" or not self.count:
            return
        for name in ("key_sum", "value_sum"):
            sums = torch.stack(getattr(self, name))
            rounded_(sums, options.state_dtype, self.mass if options.weighs_chunk else None)
            setattr(self, name, list(sums))


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A complete chunk: keys `[C, K]`, values `[C, V]` and weights `[C]` of its tokens.

    `num_seen` is the number of tokens of the row up to the end of the chunk.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor
    num_seen: int


def missing(q: Tensor, v: Tensor, options: Options) -> str | None:
    """None: this backend runs on every device."""
    return None


def run(call: Call) -> tuple[Tensor, OVQState | None]:
    """Run a call row by row; outputs at padding are zero."""
    weights = call.token_weights
    if weights is None:
        weights = torch.ones(call.k.shape[:3], dtype=call.state.key_sum.dtype, device=call.k.device)
    logs = torch.zeros_like(weights) if call.log_forget is None else call.log_forget
    tensors = (call.q, call.k, call.v, weights, logs)
    q, k, v, weights, logs = (x.reshape(-1, *x.shape[2:]) for x in tensors)
    group = call.q.shape[2] // call.k.shape[2]
    pieces, states, end = [], [], 0
    for r, (start, length) in enumerate(zip(call.rows.starts, call.rows.lengths, strict=True)):
        part, before = slice(start, start + length), call.state.select([r])
        found = []
        with full_precision(call.q.device):
            for h in range(call.k.shape[2]):
                queries = slice(h * group, (h + 1) * group)
                tokens = q[part, queries], k[part, h], v[part, h], weights[part, h], logs[part, h]
                found.append(_naive_head(*tokens, call.scale[queries], before, h, call.options))
        outputs, heads, pendings = zip(*found, strict=True)
        o = torch.cat(outputs, dim=1).to(call.q.dtype)
        pieces += [o.new_zeros(max(0, start - end), *o.shape[1:]), o]
        end = max(end, start + length)
        states.append(_packed_state(heads, pendings, before, length))
    pieces.append(call.q.new_zeros(call.num_tokens - end, call.q.shape[2], call.v.shape[3]))
    o = torch.cat(pieces).view(*call.q.shape[:3], call.v.shape[3])
    return o, OVQState.concatenate(states) if call.wants_state and states else call.state


def _naive_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    log_forget: Tensor,
    scale: Tensor,
    state: OVQState,
    h: int,
    options: Options,
) -> tuple[Tensor, _Head, tuple[Tensor, ...]]:
    """Outputs, dictionary and pending tokens of a row's key/value head h and its query heads: q `[T, G, K]`,
    k `[T, K]`, v `[T, V]`, weights and log_forget `[T]` (ignored unless the state has weights, or forgets),
    scale `[G]`."""
    wide = state_dtype(k.dtype)
    num_pending = int(state.num_pending[0])
    num_merged = int(state.num_merged[0])
    slots = int(state.num_open[0])
    head = _Head(
        key_sum=list(state.key_sum[0, h, :slots]),
        value_sum=list(state.value_sum[0, h, :slots]),
        count=state.count[0, h, :slots].tolist(),
        weight=None if state.weight is None else list(state.weight[0, h, :slots]),
    )
    # Pending tokens come first: the new tokens continue their chunk.
    k = torch.cat([state.pending_keys[0, h, :num_pending], k])
    v = torch.cat([state.pending_values[0, h, :num_pending], v])
    if state.pending_weights is not None:
        weights = torch.cat([state.pending_weights[0, h, :num_pending], weights])
    else:
        weights = weights.new_ones(len(k))
    # Sum of `log_forget` since the start of the chunk.
    forgotten = log_forget.new_zeros(()) if state.pending_forget is None else state.pending_forget[0, h]
    outputs: list[Tensor] = []
    size, end = options.chunk_size, 0
    for start in range(0, len(k), size):
        chunk_k, chunk_v = k[start : start + size].to(wide), v[start : start + size].to(wide)
        if options.weighs_chunk:
            logs = log_forget[max(0, start - num_pending) : start + size - num_pending]
            since = torch.cat([forgotten[None], logs]).cumsum(0)
            forgotten = since[-1]
            # What is forgotten divides the weights of later tokens, until the chunk is complete.
            first, stop = start + len(chunk_k) - len(logs), start + len(chunk_k)
            faded = weights[first:stop] * (-since[1:]).exp().to(wide)
            weights = torch.cat([weights[:first], faded, weights[stop:]])
            if len(chunk_k) == size:
                factor = forgotten.exp().to(wide)
                head.fade(factor.expand(len(head.count)), options)
                weights = torch.cat([weights[:start], weights[start:stop] * factor, weights[stop:]])
                forgotten = torch.zeros_like(forgotten)
        for j in range(len(chunk_k)):
            if start + j >= num_pending:
                query = q[start + j - num_pending].to(wide)
                so_far = slice(start, start + j + 1)
                seen = chunk_k[: j + 1], chunk_v[: j + 1], weights[so_far]
                outputs.append(_read(query, scale, head, *seen, options))
        if len(chunk_k) == size:
            end = start + size
            chunk = _Chunk(chunk_k, chunk_v, weights[start:end], num_merged + end)
            learn = _learn_by_pairs if options.merges_pairs else _learn
            learn(chunk, head, h, options)
            head.round_sums(options)
            if options.weighs_chunk:
                head.bound_weights(options)
    o = torch.stack(outputs) if outputs else q.new_zeros(*q.shape[:2], v.shape[-1])
    return o, head, (k[end:], v[end:], weights[end:], forgotten)


def _read(
    q: Tensor,
    scale: Tensor,
    head: _Head,
    chunk_k: Tensor,
    chunk_v: Tensor,
    weights: Tensor,
    options: Options,
) -> Tensor:
    """Outputs `[G, V]` of one token: attention to the slots (biased by log mass) and its chunk so far."""
    # A chunk token acts as a slot of count 1 (bias log 1 = 0), unless it is read with its weight.
    keys, values, bias = chunk_k, chunk_v, torch.zeros(len(chunk_k), dtype=q.dtype, device=q.device)
    if options.weighs_chunk:
        bias = log_token_weights(weights)
    if head.count:
        keys = torch.cat([head.means(head.key_sum), chunk_k])
        values = torch.cat([head.means(head.value_sum), chunk_v])
        bias = torch.cat([log_mass(head.mass, q.dtype), bias])
    scores = scale[:, None] * (q @ keys.T) + bias
    if options.ablation.bias == "count+norm":
        scores = scores - scale[:, None] * keys.square().sum(-1) / 2
    return scores.softmax(-1) @ values


@torch.no_grad()
def _scores(keys: Tensor, means: Tensor) -> Tensor:
    """Routing scores `[C, n]`: float64 dot products, exact enough that all backends choose the same slots."""
    return (keys.double()[:, None] * means.double()[None]).sum(-1)


def _learn(chunk: _Chunk, head: _Head, h: int, options: Options) -> None:
    """Open slots with the most novel keys of a complete chunk and merge the other keys into slots."""
    wanted = grown_slots(len(head.count), chunk.num_seen, **options.schedule)
    chunk_k, chunk_v, weights = chunk.keys, chunk.values, chunk.weights.detach()
    rest = list(range(options.chunk_size))
    if not head.count:  # First chunk: its first key with non-zero weight opens slot 0.
        first = next((j for j in rest if weights[j] > 0), 0)
        head.open_slots(1, chunk_k[0], chunk_v[0])
        head.merge_into(0, chunk_k[first], chunk_v[first], chunk.weights[first], options.ablation.rate)
        rest.remove(first)
    existing = len(head.count)
    means = head.means(head.key_sum).detach()
    # Slots of weight 0 attract no key.
    is_empty = head.mass.detach() <= 0
    scores = _scores(chunk_k, means).masked_fill(is_empty, -torch.inf)
    opening = _openers(scores, chunk, means, rest, wanted - existing, h, options)
    head.open_slots(len(opening), chunk_k[0], chunk_v[0])
    if options.merge == "updated":
        means = torch.cat([means, *(chunk_k[j].detach()[None] for j in opening)])
        is_empty = torch.cat([is_empty, *((weights[j] <= 0)[None] for j in opening)])
        scores = _scores(chunk_k, means).masked_fill(is_empty, -torch.inf)
    opened = {j: existing + i for i, j in enumerate(opening)}
    slots = {j: opened[j] if j in opened else _nearest(scores[j], chunk_k[j], means, is_empty) for j in rest}
    # In order of position. At a constant rate the opening keys come first: their slots start from them.
    for j in rest if options.ablation.rate == "count" else sorted(rest, key=lambda j: j not in opened):
        head.merge_into(slots[j], chunk_k[j], chunk_v[j], chunk.weights[j], options.ablation.rate)
    if options.ablation.rate != "count":
        # Constant-rate steps run in float64; between chunks the sums are kept in their usual dtype.
        head.key_sum = [rounded(s.double(), chunk_k.dtype) for s in head.key_sum]
        head.value_sum = [rounded(s.double(), chunk_v.dtype) for s in head.value_sum]


def _learn_by_pairs(chunk: _Chunk, head: _Head, h: int, options: Options) -> None:
    """Merge pairs of items (slots and tokens of a complete chunk) until they fit into the dictionary."""
    existing, size = len(head.count), options.chunk_size
    wanted = grown_slots(existing, chunk.num_seen, **options.schedule)
    # Items: first the slots, then the tokens.
    keys, values, weights = chunk.keys, chunk.values, chunk.weights
    count = head.count + [1] * size
    key_sum, value_sum = [*head.key_sum, *keys], [*head.value_sum, *values]
    mass = torch.tensor(count, dtype=keys.dtype, device=keys.device)
    if head.weight is not None:
        mass = torch.cat([head.mass, weights]) if existing else weights
        keys, values = without_trace(keys, weights), without_trace(values, weights)
        for j in range(size):
            for sums, x in ((key_sum, keys), (value_sum, values)):
                sums[existing + j] = weights[j] * x[j]

    def means(sums: list[Tensor], tokens: Tensor) -> Tensor:
        return torch.cat([head.means(sums), tokens]) if existing else tokens

    key_means, value_means = means(head.key_sum, keys), means(head.value_sum, values)
    x = points(key_means, value_means, mass, options)
    if options.merge == "nearest":
        # Movers: the tokens, up to C slots in rotation, and all items of zero mass.
        in_turn = {(chunk.num_seen - size + i) % existing for i in range(min(size, existing))}
        movers = [i for i, m in enumerate(mass) if i >= existing or i in in_turn or m <= 0]
        clusters = nearest_clusters(x, mass, movers, existing + size - wanted, options.mass_power)
    else:
        clusters = cheapest_clusters(x, mass, existing + size - wanted, options)
    # A cluster stays in its lowest slot. A cluster without slots takes a freed slot, else a new one.
    kept = {cluster[0] for cluster in clusters}
    free = [i for i in range(wanted) if i >= existing or i not in kept]
    head.open_slots(wanted - existing, chunk.keys[0], chunk.values[0])
    for cluster in clusters:
        slot = cluster[0] if cluster[0] < existing else free.pop(0)
        head.key_sum[slot] = sum((key_sum[i] for i in cluster[1:]), key_sum[cluster[0]])
        head.value_sum[slot] = sum((value_sum[i] for i in cluster[1:]), value_sum[cluster[0]])
        head.count[slot] = sum(count[i] for i in cluster)
        if head.weight is not None:
            head.weight[slot] = sum((mass[i] for i in cluster[1:]), mass[cluster[0]])


def _nearest(scores: Tensor, key: Tensor, means: Tensor, is_empty: Tensor) -> int:
    """Slot with the largest dot product (ties: lowest index); slot 0 for a non-finite key."""
    best = scores.max()
    if not torch.isfinite(best):
        return 0
    tie = TIE * key.double().norm() * means[~is_empty].double().norm(dim=-1).max()
    return int((scores >= best - tie).nonzero()[0])


def _openers(
    scores: Tensor,
    chunk: _Chunk,
    means: Tensor,
    candidates: list[int],
    num: int,
    h: int,
    options: Options,
) -> list[int]:
    """Positions of the `num` candidates that open slots, ascending: the most novel keys, or random ones."""
    if options.init == "random":
        random = random_priority(options.seed, h, chunk.num_seen, options.chunk_size)
        priority = random.masked_fill((chunk.weights <= 0).cpu(), options.chunk_size).tolist()
    else:
        key_norms, mean_norms = (x.double().norm(dim=-1).clamp(min=TINY) for x in (chunk.keys, means))
        cosines = (scores / key_norms[:, None] / mean_norms).amax(-1)
        cosines = cosines.masked_fill(~cosines.isfinite(), NO_COSINE)
        priority = cosines.masked_fill(chunk.weights <= 0, NO_WEIGHT).tolist()
    return lowest(priority, candidates, num)


def _packed_state(
    heads: Sequence[_Head], pendings: Sequence[tuple[Tensor, ...]], before: OVQState, num_new: int
) -> OVQState:
    """The heads of a row as an `OVQState` of batch size 1."""

    def stacked(parts: list[list[Tensor]], like: Tensor) -> Tensor:
        rows = [torch.stack(part) if part else like.new_zeros(0, *like.shape[3:]) for part in parts]
        return torch.stack(rows)[None]

    def padded(parts: list[Tensor]) -> Tensor:
        missing = before.chunk_size - len(parts[0])
        return torch.nn.functional.pad(torch.stack(parts), (0, 0) * (parts[0].dim() - 1) + (0, missing))[None]

    keys, values, weights, forgotten = ([pending[i] for pending in pendings] for i in range(4))
    weight = before.weight
    if weight is not None:
        weight = stacked([head.weight or [] for head in heads], weight)
    return dataclasses.replace(
        before,
        key_sum=stacked([head.key_sum for head in heads], before.key_sum),
        value_sum=stacked([head.value_sum for head in heads], before.value_sum),
        count=torch.tensor([[head.count for head in heads]], device=before.count.device).to(torch.int64),
        pending_keys=padded(keys),
        pending_values=padded(values),
        num_seen=before.num_seen + num_new,
        weight=weight,
        pending_weights=None if weight is None else padded(weights),
        pending_forget=None if before.pending_forget is None else torch.stack(forgotten)[None],
    )

"""`HeadMemory`: how the key/value heads of a layer that have equal budgets use their `OVQState`.

A head keeps the first `num_sinks` and the last tokens exactly, and slots for all tokens in between. When the
rows for exact tokens are full, the oldest `chunk_size` tokens after the sinks are merged into the slots, by
the rules of `ovq.ops`. One softmax goes over exact tokens and slots. A slot of c tokens gets log c added to
its score, so attention is exact as long as every slot holds one token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.config import Budget
from ovq.convert.pieces import in_pieces
from ovq.convert.reach import Reach
from ovq.convert.reading import Observer, read
from ovq.convert.use import token_weights, use_from
from ovq.ops import OVQState
from ovq.ops.backends import learn
from ovq.ops.backends.cpu.memory import HeadGroup
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.learned import Merging
from ovq.ops.backends.plan import Plan
from ovq.ops.narrow import STEPS, narrowed
from ovq.ops.options import ORDINARY
from ovq.ops.parts import of_rows, slot_spec
from ovq.ops.state import pending_in, tensors_of
from ovq.ops.sums import added_up
from ovq.ops.transforms import have_tangents

# Each re-positioning lowers the count of a slot by count // 8, so counts below 8 stay.
_FORGOTTEN = 8


class HeadMemory:
    """Reads and updates, in place, the `OVQState` of B rows of h key/value heads with equal budgets.

    Args:
        budget: sizes and settings.
        state: the state, which this memory owns from here on.
        use: `[h, K + V + 1]` float32 coefficients of the token weights in merges, see `use.py`; None for
            weights of 1. Those in the state are the same until the first re-positioning.

    Attributes:
        filled: per row, number of exact tokens: `state.num_pending` as Python numbers.
        num_merged: per row, `state.num_merged`, likewise.
        observer: is told what is read and where tokens go; None for no observer. Compiled kernels do not
            support one, so they do not run then.
    """

    observer: Observer | None = None

    def __init__(self, budget: Budget, state: OVQState, use: Tensor | None = None) -> None:
        self.budget, self._has_graph = budget, False
        self._given_use = None if use is None else use.to(state.count.device)
        self.hold(state)

    def hold(self, state: OVQState) -> None:
        """Hold another state from here on."""
        self.state, self.num_merged = state, state.num_merged.tolist()
        self.filled = (state.num_seen - state.num_merged).tolist()

    @classmethod
    def empty(
        cls, budget: Budget, k: Tensor, v: Tensor, use: Tensor | None = None, num_tokens: int | None = None
    ) -> HeadMemory:
        """The memory of rows without tokens.

        Args:
            budget, use: as above.
            k: `[B, h, *, K]` tensor that gives sizes, dtype and device. v: `[B, h, *, V]`, likewise.
            num_tokens: most tokens that a row will read, which may need fewer slots; None for no bound.
        """
        places, num_slots = budget.num_exact, budget.num_slots
        # Without slots nothing is merged.
        use = use.to(k.device) if use is not None and num_slots else None
        if num_tokens is not None:
            # One place more, as full ones are merged.
            places = min(places, max(num_tokens + 1, budget.num_sinks))
            num_slots = budget.num_open(budget.num_merged(num_tokens))
        spec = slot_spec(
            num_slots,
            num_kv_heads=k.shape[1],
            head_dim=k.shape[3],
            value_dim=v.shape[3],
            chunk_size=budget.chunk_size,
            dtype=k.dtype,
            has_weights=use is not None,
            state_dtype=budget.state_dtype,
            num_sinks=budget.num_sinks,
            window=places - budget.num_sinks,
        )
        tensors: dict[str, Any] = {
            name: torch.zeros(shape, dtype=dtype, device="cpu" if name == "num_seen" else k.device)
            for name, (shape, dtype) in of_rows(spec, len(k)).items()
        }
        # Under autocast, keys with rotary positions are wider than values.
        tensors["pending_values"] = tensors["pending_values"].to(v.dtype)
        if use is not None:
            tensors["token_use"] = use.repeat(len(k), 1, 1)
        return cls(budget, OVQState(**tensors, **budget.sizes), use)

    def with_state(self, state: OVQState) -> HeadMemory:
        """A memory with the budget and observer of this one, and another state."""
        other = copy.copy(self)
        other.hold(state)
        return other

    def clone(self) -> HeadMemory:
        """A copy that shares nothing with this memory."""
        other = self.with_state(self.state.clone())
        other._has_graph = False
        return other

    def to(self, device: torch.device | str) -> HeadMemory:
        """The memory on another device."""
        other = self.with_state(self.state.to(device, non_blocking=True))
        other._given_use = None if self._given_use is None else self._given_use.to(device)
        return other

    def _put_sums(self, name: str, sums: Tensor, index: Tensor) -> None:
        """Replace the rows `index` of sums by `sums` in the wide dtype, rounded to the format."""
        for part, rows in zip((name, STEPS[name]), narrowed(sums, self.budget.state_dtype), strict=True):
            if rows is not None:
                self._put(part, rows, index)

    def _rows(self, name: str, index: Tensor) -> Tensor:
        """The rows `index` of a tensor."""
        return getattr(self.state, name)[index]

    def _put(self, name: str, rows: Tensor, index: Tensor) -> None:
        """Replace the rows `index` of a tensor."""
        if len(index) == len(tensor := getattr(self.state, name)):
            setattr(self.state, name, rows)
        elif torch.is_inference_mode_enabled():
            # When rows of a large batch merge at different times, copying the others would dominate.
            tensor.index_copy_(0, index, rows)
        else:
            # A new tensor, because autograd may have saved the old one.
            setattr(self.state, name, tensor.index_copy(0, index, rows))

    def kernel_tensors(self) -> dict[str, Tensor]:
        """The tensors that kernels read and write, by name."""
        tensors = tensors_of(self.state)
        return {name: x for name, x in tensors.items() if name not in ("sink_keys", "num_seen")}

    def group(self, lengths: Sequence[int], schedule: Sequence[Sequence[int]], **given: Any) -> HeadGroup:
        """Kernel arguments for reading `lengths` tokens per row; `given` as in `HeadGroup.of`."""
        budget = self.budget
        return HeadGroup.of(
            self.kernel_tensors(),
            num_sinks=budget.num_sinks,
            chunk_size=budget.chunk_size,
            options=budget.options if budget.num_slots else None,
            filled=self.filled,
            num_merged=self.num_merged,
            lengths=lengths,
            schedule=schedule,
            heads=budget.heads,
            **given,
        )

    def schedule(self, lengths: Sequence[int]) -> list[list[int]]:
        """Number of slots in use, per row: now, and after each merge while reading `lengths` tokens."""
        size = self.budget.chunk_size
        return [
            [self.budget.num_open(num + more) for more in range(0, self._num_merging(row, num_new) + 1, size)]
            for row, (num, num_new) in enumerate(zip(self.num_merged, lengths, strict=True))
        ]

    def count_tokens(self, lengths: Sequence[int], num_seen: Tensor | None = None) -> None:
        """Count `lengths` new tokens per row; `num_seen` is the state's after them, where it is known."""
        if num_seen is None:
            num_seen = self.state.num_seen + torch.tensor(lengths, device="cpu")
        self.state.num_seen = num_seen
        for row, num_new in enumerate(lengths):
            num_merged = self._num_merging(row, num_new)
            self.filled[row] += num_new - num_merged
            self.num_merged[row] += num_merged

    def _num_merging(self, row: int, num_new: int) -> int:
        """Number of tokens that are merged while a row reads `num_new`; those merged before do not matter."""
        return self.budget.num_merged(self.filled[row] + num_new)

    def own_(self) -> None:
        """Copy tensors that autograd may have saved, so that they can be changed in place."""
        if self._has_graph:
            self.state = self.state.detach().clone()
            self._has_graph = False

    def _own_all_(self) -> None:
        """What `own_` does, and copy what inference mode has made where PyTorch writes outside of it."""
        if not torch.is_inference_mode_enabled():
            # `num_seen` is never written to.
            tensors = tensors_of(self.state).items()
            self._has_graph |= any(x.is_inference() for name, x in tensors if name != "num_seen")
        self.own_()

    def put_back_(self, before: HeadMemory) -> None:
        """Restore the content of the copy `before`, in place, as kernels hold pointers to the tensors."""
        self._own_all_()
        for name, x in tensors_of(before.state).items():
            if name != "num_seen":
                getattr(self.state, name).copy_(x)
        self.state.num_seen = before.state.num_seen
        self.hold(self.state)

    def drop_(self, num_tokens: int) -> None:
        """Remove the last tokens of each row, which must be later than its last merge."""
        self._own_all_()
        for row, filled in enumerate(self.filled):
            for pending in (self.state.pending_keys, self.state.pending_values):
                pending[row, :, filled - num_tokens : filled] = 0
            self.filled[row] = filled - num_tokens
        self.state.num_seen = self.state.num_seen - num_tokens

    def num_read(self, row: int) -> int:
        """Tokens that a row has read."""
        return self.filled[row] + self.num_merged[row]

    def reposition_(self, rows: list[int], reach: Reach, ratio: Tensor | None = None) -> None:
        """Rotate the keys of sinks and slots further than `reach.limit` from the last token to that distance.

        The counts of such slots drop by count // 8, and their weights are halved.

        Args:
            rows: rows for which `reach.is_reposition_due` holds now.
            ratio: `[h, R]`, see `Reach.turned`.
        """
        state, wide = self.state, self.state.wide
        index = torch.tensor(rows, device=state.count.device)
        num_read = [self.num_read(row) for row in rows]
        ratio = None if ratio is None else ratio[:, None]
        # [R, 1, 1]: the earliest position within the limit.
        nearest = torch.tensor(num_read, device=index.device)[:, None, None] - reach.limit
        count, positions = (self._rows(name, index) for name in ("count", "position_sum"))
        is_far = count * nearest > positions
        by = torch.where(is_far, nearest - positions.double() / count.clamp(min=1), 0)
        if bool(is_far.any()):
            # Far slots lose counts each time; otherwise the growing past would outweigh what is near.
            left = torch.where(is_far, count - count // _FORGOTTEN, count)
            if state.weight is None:
                share = left.to(wide) / count.clamp(min=1)
            else:
                # Small slots too: tokens of high use keep slots of their own and would fill the dictionary.
                share = torch.ones_like(left, dtype=wide).masked_fill(is_far, 0.5)
                self._put("weight", self._rows("weight", index) * share, index)
            keys, values = state.wide_sums("key_sum")[index], state.wide_sums("value_sum")[index]
            self._put_sums("key_sum", reach.turned(keys, by, ratio) * share[..., None], index)
            self._put_sums("value_sum", values * share[..., None], index)
            self._put("position_sum", torch.where(is_far, left * nearest, positions), index)
            self._put("count", left, index)
        if self._given_use is not None:
            self._put("token_use", use_from(self._given_use, nearest[:, :, 0], reach, ratio), index)
        if not (num_sinks := self.budget.num_sinks):
            return
        first = torch.tensor([num == reach.first_reposition for num in num_read], device=index.device)
        pending = state.pending_keys[index]
        sinks = torch.where(
            first[:, None, None, None], pending[:, :, :num_sinks], self._rows("sink_keys", index)
        )
        by = (nearest - torch.arange(num_sinks, device=index.device)).clamp(min=0)
        turned = reach.turned(sinks.to(wide), by.expand(sinks.shape[:3]), ratio)
        self._put("sink_keys", sinks, index)
        pending = torch.cat([turned.to(pending.dtype), pending[:, :, num_sinks:]], 2)
        self._put("pending_keys", pending, index)

    def attend(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        *,
        temperature: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor | None:
        """Attention outputs `[B, h * G, T, V]` of new tokens, which are stored; None without queries.

        Args:
            q: `[B, h * G, T, K]` queries, scaled; or None. k: `[B, h, T, K]`. v: `[B, h, T, V]`.
            lengths: number of real tokens per row, which come first; the outputs of others are 0.
            temperature: `[h * G]` factor of the scores of slots with several tokens. bias: `[h * G]` summand
                of these scores.
        """
        has_graph = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, temperature, bias)
        )
        if (has_graph or have_tangents(q, k, v)) and self.budget.state_dtype != "float32":
            raise ValueError(
                "gradients: expected slots in float32 (state_dtype), or torch.no_grad() and no tangents, "
                f"found {self.budget.state_dtype}"
            )
        if not has_graph:
            self._own_all_()
        budget = self.budget

        def until_merge(row: int, done: int) -> int:
            return budget.chunk_size if done else budget.num_exact - self.filled[row]

        def read_piece(now: Sequence[int], k: Tensor, v: Tensor, q: Tensor | None = None) -> Tensor | None:
            self._store(k, v, now, has_graph)
            num_open = max(map(budget.num_open, self.num_merged))
            settings: Any = {"temperature": temperature, "bias": bias, "observer": self.observer}
            o = None if q is None else read(q, self.state, self.filled, num_open, **settings)
            if full := [b for b, f in enumerate(self.filled) if f + now[b] == budget.num_exact]:
                self._merge(full)
            self.count_tokens(now)
            return o

        return in_pieces(read_piece, lengths, until_merge, k, v, q)

    def _store(self, k: Tensor, v: Tensor, now: Sequence[int], has_graph: bool) -> None:
        """Keep the first `now` tokens of each row exactly."""
        state = self.state
        if has_graph:
            # What autograd has saved must not change.
            state.pending_keys, state.pending_values = (x.clone() for x in pending_in(state)[:2])
            self._has_graph = True
        pairs = [*zip(self.filled, now, strict=True)]
        places: tuple[Any, ...] = ..., slice(pairs[0][0], sum(pairs[0])), slice(None)
        if len({*pairs}) > 1:
            triples = [(b, filled + i, i) for b, (filled, num) in enumerate(pairs) for i in range(num)]
            rows, place, step = torch.tensor(triples, device=k.device).T
            places = rows, slice(None), place
            # After a cast of the model, a memory keeps its dtypes, of which autocast leaves two.
            k = k[rows, :, step].to(state.pending_keys.dtype)
            v = v[rows, :, step].to(state.pending_values.dtype)
        state.pending_keys[places], state.pending_values[places] = k, v

    def _merge(self, rows: list[int]) -> None:
        """Merge the oldest tokens of full `rows` and move the others up.

        Gradients still reach the tokens that stay exact.
        """
        budget, state = self.budget, self.state
        index = torch.tensor(rows, device=state.count.device)
        first, size = budget.num_sinks, budget.chunk_size
        keys, values = state.pending_keys[index], state.pending_values[index]
        if budget.num_slots:
            self._merge_into_slots(rows, index, keys[:, :, first:], values[:, :, first : first + size])
        elif self.observer is not None:
            self.observer.on_merge(None)
        kept = slice(first, budget.num_exact - size)
        moved = []
        for pending, x in ((state.pending_keys, keys), (state.pending_values, values)):
            # Autograd may have saved it.
            pending = pending.clone() if torch.is_grad_enabled() else pending
            pending[index, :, kept] = x[:, :, first + size :]
            pending[index, :, kept.stop :] = 0
            moved.append(pending)
        state.pending_keys, state.pending_values = moved

    def _merge_into_slots(self, rows: list[int], index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Merge the first C keys of full windows `[R, h, W, K]`, with their values `[R, h, C, V]`.

        Gradients of the sums reach the tokens and the previous sums, but not the choice of pairs.
        """
        self._find_units(index, keys)
        state, wide, keys = self.state, self.state.wide, keys[:, :, : self.budget.chunk_size]
        weights = None
        if state.token_use is not None:
            weights = token_weights(keys, values, state.token_use[index]).to(wide)
        unit = self._rows("key_unit", index)[..., None, None]
        keys = keys.to(wide) / unit.where(unit > 0, 1)
        values = values.to(wide)
        # Copies, because the update is in place.
        held = Dictionary(
            state.wide_sums("key_sum")[index],
            state.wide_sums("value_sum")[index],
            state.count[index],
            None if weights is None else self._rows("weight", index),
        )
        has_graph = torch.is_grad_enabled() and any(
            x.requires_grad for x in (keys, values, held.key_sum, held.value_sum)
        )
        with torch.no_grad():
            after = held.clone() if has_graph else held
            num_merged = [self.num_merged[b] for b in rows]
            # The same plan as for a chunk of `ovq_attention`.
            plan = Plan.of_chunks(
                opened=[self.budget.num_open(n) for n in num_merged],
                num_merged=num_merged,
                num_kv_heads=keys.shape[1],
                options=self.budget.options,
            )
            of_tokens = None if weights is None else weights.transpose(1, 2)[..., None]
            chunk = Merging(keys.transpose(1, 2), values.transpose(1, 2), after, plan, of_tokens)
            # [R, h, N + C]: the slot that each of the N old slots and C tokens goes to.
            homes = learn(chunk).homes(after.count.shape[2])
            if self.observer is not None:
                self.observer.on_merge(homes)
            first = torch.tensor(num_merged, device=homes.device)[:, None, None] + self.budget.num_sinks
            new = (first + torch.arange(keys.shape[2], device=homes.device)).expand(-1, keys.shape[1], -1)
            positions = torch.cat([self._rows("position_sum", index), new], 2)
            self._put("position_sum", added_up(positions, homes, after.count.shape[2]), index)
            self._put("count", after.count, index)
            if after.weight is not None:
                self._put("weight", after.weight, index)
        for name, tokens in (("key_sum", keys), ("value_sum", values)):
            sums = getattr(after, name)
            if has_graph:
                tokens = tokens if weights is None else tokens * weights[..., None]
                sums = added_up(torch.cat([getattr(held, name), tokens], 2), homes, sums.shape[2])
            self._put_sums(name, sums, index)

    @torch.no_grad()
    def _find_units(self, index: Tensor, keys: Tensor) -> None:
        """Set `key_unit` from keys `[R, h, W, K]` for rows whose merged keys all were as good as zero."""
        wide = self.state.wide
        length = keys.to(wide).square().sum(-1).mean(-1).sqrt()
        # Multiplying by a power of 2 does not round.
        found = torch.exp2(length.clamp(min=ORDINARY[0]).log2().round()).where(length >= ORDINARY[0], 0)
        unit = self._rows("key_unit", index)
        self._put("key_unit", torch.where(unit == 0, found, unit), index)

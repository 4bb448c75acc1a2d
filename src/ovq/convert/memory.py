"""`HeadMemory`: the memory of the key/value heads of a layer that have equal budgets.

A head keeps the first `num_sinks` and the last tokens exactly, and slots for all tokens in between. When the
rows for exact tokens are full, the oldest `chunk_size` tokens after the sinks are merged into the slots, by
the rules of `ovq.ops`. One softmax goes over exact tokens and slots. A slot of c tokens gets log c added to
its score, so attention is exact as long as every slot holds one token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.config import Budget
from ovq.convert.pieces import in_pieces
from ovq.convert.reach import Reach
from ovq.convert.reading import Exact, Observer, Slots, read
from ovq.convert.use import token_weights, use_from
from ovq.ops.backends import learn
from ovq.ops.backends.cpu.memory import HeadGroup
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.learned import Merging
from ovq.ops.backends.plan import Plan
from ovq.ops.narrow import narrowed, widened
from ovq.ops.options import ORDINARY
from ovq.ops.sums import added_up, divisor, state_dtype

# Each re-positioning lowers the count of a slot by count // 8, so counts below 8 stay.
_FORGOTTEN = 8

_TENSORS = (
    *("recent_keys", "recent_values", "key_sum", "value_sum", "count", "position_sum"),
    *("key_unit", "sink_keys"),
)


class HeadMemory:
    """Memory of B rows for a group of h key/value heads. `attend` changes it in place.

    Args:
        budget: sizes and settings.
        k: `[B, h, *, K]` tensor that gives sizes, dtype and device. v: `[B, h, *, V]`, likewise.
        use: `[h, K + V + 1]` float32 coefficients of the token weights in merges, see `use.py`; None for
            weights of 1.
        num_tokens: most tokens that a row will read, which may need fewer slots; None for no bound.

    Attributes:
        recent_keys: `[B, h, S + W, K]` keys of the first S tokens, then of the last, in the model's dtype;
            row b uses the first `filled[b]` places. recent_values: `[B, h, S + W, V]`.
        key_sum: `[B, h, N, K]` sum of the keys in each slot, in units of `key_unit`, in the format of the
            budget (float64 instead of float32 for float64 models). value_sum: `[B, h, N, V]` sum of the
            values. `sums` returns both in the wide dtype.
        key_step: `[B, h, N]` bfloat16, the quantization scale of `key_sum`; only for int8. value_step:
            likewise.
        count: `[B, h, N]` number of tokens in each slot, reduced by each re-positioning.
        position_sum: `[B, h, N]` int64 sum of the tokens' positions; re-positioned slots use the positions
            that they were moved to.
        sink_keys: `[B, h, S, K]` original keys of the first S tokens, saved when those in `recent_keys` are
            first re-positioned; 0 until then.
        weight: `[B, h, N]` sum of the token weights in each slot, with which `key_sum` and `value_sum` are
            weighted; only with `use`.
        use: `[B, h, K + V + 1]` coefficients for the next tokens; as given until the first re-positioning.
        key_unit: `[B, h]` root-mean-square length of keys, as a power of 2, by which keys are divided before
            merging; 0 until the first merge of keys that are not as good as zero.
        filled: per row, number of exact tokens.
        num_merged: per row, number of tokens merged into the slots (dropped if there are no slots).
        observer: is told what is read and where tokens go; None for no observer. Compiled kernels do not
            support one, so they do not run then.
    """

    observer: Observer | None = None

    def __init__(
        self, budget: Budget, k: Tensor, v: Tensor, use: Tensor | None = None, num_tokens: int | None = None
    ) -> None:
        self.budget = budget
        # Without slots nothing is merged.
        self._given_use = use.to(k.device) if use is not None and budget.num_slots else None
        self._names = _TENSORS if self._given_use is None else (*_TENSORS, "weight", "use")
        if budget.state_dtype == "int8":
            self._names = (*self._names, "key_step", "value_step")
        batch, heads = k.shape[:2]
        num_exact, num_slots = budget.num_exact, budget.num_slots
        if num_tokens is not None:
            # One place more, as full ones are merged.
            num_exact = min(num_exact, max(num_tokens + 1, budget.num_sinks))
            num_slots = budget.num_open(budget.num_merges(num_tokens) * budget.chunk_size)
        self.wide = wide = state_dtype(k.dtype)
        for name, x in (("key", k), ("value", v)):
            setattr(self, f"recent_{name}s", x.new_zeros(batch, heads, num_exact, x.shape[3]))
            self._put_sums(f"{name}_sum", x.new_zeros(batch, heads, num_slots, x.shape[3], dtype=wide))
        self.count = k.new_zeros(batch, heads, num_slots, dtype=torch.int64)
        self.position_sum = torch.zeros_like(self.count)
        self.key_unit = k.new_zeros(batch, heads, dtype=wide)
        self.use: Tensor | None = None
        if self._given_use is not None:
            self.weight = torch.zeros_like(self.count, dtype=wide)
            self.use = self._given_use.repeat(batch, 1, 1)
        self.sink_keys = torch.zeros_like(self.recent_keys[:, :, : budget.num_sinks])
        self.filled = [0] * batch
        self.num_merged = [0] * batch
        self._has_graph = False

    recent_keys: Tensor
    recent_values: Tensor
    key_sum: Tensor
    value_sum: Tensor
    weight: Tensor

    def sums(self, name: str) -> Tensor:
        """`key_sum` or `value_sum`, by `name`, in the wide dtype."""
        scales = getattr(self, name.replace("sum", "step")) if self.budget.state_dtype == "int8" else None
        return widened(getattr(self, name), scales, self.wide)

    def _put_sums(self, name: str, sums: Tensor, index: Tensor | None = None) -> None:
        """Replace sums, or their rows `index`, by `sums` in the wide dtype, rounded to the format."""
        numbers, scales = narrowed(sums, self.budget.state_dtype)
        self._put(name, numbers, index)
        if scales is not None:
            self._put(name.replace("sum", "step"), scales, index)

    def _put(self, name: str, rows: Tensor, index: Tensor | None) -> None:
        """Replace a tensor, or its rows `index`."""
        if index is None or len(index) == len(tensor := getattr(self, name)):
            setattr(self, name, rows)
        elif torch.is_inference_mode_enabled():
            # When rows of a large batch merge at different times, copying the others would dominate.
            tensor.index_copy_(0, index, rows)
        else:
            # A new tensor, because autograd may have saved the old one.
            setattr(self, name, tensor.index_copy(0, index, rows))

    @property
    def _divisor(self) -> Tensor:
        """Divisor of the sums `[B, h, N, 1]`: counts, or weights with `use`."""
        return divisor(self.count if self.use is None else self.weight, self.wide)[..., None]

    @property
    def slot_keys(self) -> Tensor:
        """`[B, h, N, K]` mean key of each slot; 0 where there is none."""
        return self.sums("key_sum") / self._divisor * self.key_unit[..., None, None]

    @property
    def slot_values(self) -> Tensor:
        """`[B, h, N, V]` mean value of each slot; 0 where there is none."""
        return self.sums("value_sum") / self._divisor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, with `filled` and `num_merged` as tensors `[B]`."""
        found = {name: getattr(self, name) for name in self._names}
        for name in ("filled", "num_merged"):
            found[name] = torch.tensor(getattr(self, name), device="cpu")
        return found

    def kernel_tensors(self) -> dict[str, Tensor]:
        """The tensors that kernels read and write, by name."""
        return {name: getattr(self, name) for name in self._names if name != "sink_keys"}

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
            [self.budget.num_open(num_merged + i * size) for i in range(self._num_merges(row, num_new) + 1)]
            for row, (num_merged, num_new) in enumerate(zip(self.num_merged, lengths, strict=True))
        ]

    def count_tokens(self, lengths: Sequence[int]) -> None:
        """Update `filled` and `num_merged` after a kernel has read `lengths` tokens per row."""
        for row, num_new in enumerate(lengths):
            num_merged = self._num_merges(row, num_new) * self.budget.chunk_size
            self.filled[row] += num_new - num_merged
            self.num_merged[row] += num_merged

    def _num_merges(self, row: int, num_new: int) -> int:
        return self.budget.num_merges(self.filled[row] + num_new)

    @staticmethod
    def restored(
        budget: Budget, tensors: Mapping[str, Tensor], device: torch.device | str | None, use: Tensor | None
    ) -> HeadMemory:
        """The memory with these `tensors()`, `budget` and `use`, on `device` (None: where they are)."""
        k, v = (tensors[name].to(device) for name in ("recent_keys", "recent_values"))
        memory = HeadMemory(budget, k, v, use)
        for name in memory._names:
            setattr(memory, name, tensors[name].to(device).contiguous())
        memory.filled, memory.num_merged = (tensors[name].tolist() for name in ("filled", "num_merged"))
        return memory

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> HeadMemory:
        """A copy with `function` applied to all tensors."""
        other = copy.copy(self)
        for name in self._names:
            setattr(other, name, function(getattr(self, name)))
        other.filled, other.num_merged = list(self.filled), list(self.num_merged)
        return other

    def clone(self) -> HeadMemory:
        """A copy that shares nothing with this memory."""
        other = self._mapped(Tensor.clone)
        other._has_graph = False
        return other

    @staticmethod
    def joined(parts: Sequence[HeadMemory]) -> HeadMemory:
        """One memory with the rows of several of equal budgets, in order; the parts do not change."""
        other = copy.copy(parts[0])
        for name in other._names:
            setattr(other, name, torch.cat([getattr(part, name) for part in parts]))
        for name in ("filled", "num_merged"):
            setattr(other, name, [number for part in parts for number in getattr(part, name)])
        other._has_graph = False
        return other

    def selected(self, rows: Tensor) -> HeadMemory:
        """A copy of the given rows, in the given order; repeats are allowed."""
        other = self._mapped(lambda t: t.index_select(0, rows.to(t.device)))
        index = rows.tolist()
        other.filled, other.num_merged = ([x[i] for i in index] for x in (self.filled, self.num_merged))
        return other

    def to(self, device: torch.device | str) -> HeadMemory:
        """The memory on another device."""
        other = self._mapped(lambda t: t.to(device, non_blocking=True))
        other._given_use = None if self._given_use is None else self._given_use.to(device)
        return other

    def detached(self) -> HeadMemory:
        """The memory without its autograd graph."""
        return self._mapped(Tensor.detach)

    def own_(self) -> None:
        """Copy tensors that autograd may have saved, so that they can be changed in place."""
        if self._has_graph:
            for name in self._names:
                setattr(self, name, getattr(self, name).detach().clone())
            self._has_graph = False

    def _own_all_(self) -> None:
        """What `own_` does, and copy what inference mode has made where PyTorch writes outside of it."""
        if not torch.is_inference_mode_enabled():
            self._has_graph |= any(getattr(self, name).is_inference() for name in self._names)
        self.own_()

    def put_back_(self, before: HeadMemory) -> None:
        """Restore the content of the copy `before`, in place, as kernels hold pointers to the tensors."""
        self._own_all_()
        tensors = self.tensors()
        for name, tensor in before.tensors().items():
            tensors[name].copy_(tensor)
        self.filled, self.num_merged = list(before.filled), list(before.num_merged)

    def drop_(self, num_tokens: int) -> None:
        """Remove the last tokens of each row, which must be later than its last merge."""
        self._own_all_()
        for row, filled in enumerate(self.filled):
            for recent in (self.recent_keys, self.recent_values):
                recent[row, :, filled - num_tokens : filled] = 0
            self.filled[row] = filled - num_tokens

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
        index = torch.tensor(rows, device=self.count.device)
        num_read = [self.num_read(row) for row in rows]
        ratio = None if ratio is None else ratio[:, None]
        # [R, 1, 1]: the earliest position within the limit.
        nearest = torch.tensor(num_read, device=index.device)[:, None, None] - reach.limit
        count, positions = self.count[index], self.position_sum[index]
        is_far = count * nearest > positions
        by = torch.where(is_far, nearest - positions.double() / count.clamp(min=1), 0)
        if bool(is_far.any()):
            # Far slots lose counts each time; otherwise the growing past would outweigh what is near.
            left = torch.where(is_far, count - count // _FORGOTTEN, count)
            if self.use is None:
                share = left.to(self.wide) / count.clamp(min=1)
            else:
                # Small slots too: tokens of high use keep slots of their own and would fill the dictionary.
                share = torch.ones_like(left, dtype=self.wide).masked_fill(is_far, 0.5)
                self._put("weight", self.weight[index] * share, index)
            keys, values = self.sums("key_sum")[index], self.sums("value_sum")[index]
            self._put_sums("key_sum", reach.turned(keys, by, ratio) * share[..., None], index)
            self._put_sums("value_sum", values * share[..., None], index)
            self._put("position_sum", torch.where(is_far, left * nearest, positions), index)
            self._put("count", left, index)
        if self._given_use is not None:
            self._put("use", use_from(self._given_use, nearest[:, :, 0], reach, ratio), index)
        if not (num_sinks := self.budget.num_sinks):
            return
        first = torch.tensor([num == reach.first_reposition for num in num_read], device=index.device)
        recent = self.recent_keys[index]
        sinks = torch.where(first[:, None, None, None], recent[:, :, :num_sinks], self.sink_keys[index])
        by = (nearest - torch.arange(num_sinks, device=index.device)).clamp(min=0)
        turned = reach.turned(sinks.to(self.wide), by.expand(sinks.shape[:3]), ratio)
        self._put("sink_keys", sinks, index)
        recent = torch.cat([turned.to(recent.dtype), recent[:, :, num_sinks:]], 2)
        self._put("recent_keys", recent, index)

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
        if has_graph and self.budget.state_dtype != "float32":
            raise ValueError(
                "gradients: expected slots in float32 (state_dtype) or torch.no_grad(), found "
                f"{self.budget.state_dtype}"
            )
        if not has_graph:
            self._own_all_()
        budget = self.budget

        def until_merge(row: int, done: int) -> int:
            return budget.chunk_size if done else budget.num_exact - self.filled[row]

        def read_piece(now: Sequence[int], k: Tensor, v: Tensor, q: Tensor | None = None) -> Tensor | None:
            self._store(k, v, now, has_graph)
            o = None if q is None else self._read(q, temperature, bias).to(q.dtype)
            self.filled = [f + n for f, n in zip(self.filled, now, strict=True)]
            if full := [b for b, f in enumerate(self.filled) if f == budget.num_exact]:
                self._merge(full)
            return o

        return in_pieces(read_piece, lengths, until_merge, k, v, q)

    def _store(self, k: Tensor, v: Tensor, now: Sequence[int], has_graph: bool) -> None:
        """Keep the first `now` tokens of each row exactly."""
        if has_graph:
            # What autograd has saved must not change.
            self.recent_keys, self.recent_values = self.recent_keys.clone(), self.recent_values.clone()
            self._has_graph = True
        pairs = [*zip(self.filled, now, strict=True)]
        places: tuple[Any, ...] = ..., slice(pairs[0][0], sum(pairs[0])), slice(None)
        if len({*pairs}) > 1:
            triples = [(b, filled + i, i) for b, (filled, num) in enumerate(pairs) for i in range(num)]
            rows, place, step = torch.tensor(triples, device=k.device).T
            places = rows, slice(None), place
            # After a cast of the model, a memory keeps its dtype.
            k, v = (x[rows, :, step].to(self.recent_keys.dtype) for x in (k, v))
        self.recent_keys[places], self.recent_values[places] = k, v

    def _read(self, q: Tensor, temperature: Tensor | None, bias: Tensor | None) -> Tensor:
        """Outputs `[B, h * G, n, V]` of queries; the first belongs to exact token number `filled`."""
        num_open = max(map(self.budget.num_open, self.num_merged))
        slots = None
        if num_open:
            slots = Slots(*(x[:, :, :num_open] for x in (self.slot_keys, self.slot_values, self.count)))
        exact = Exact(self.recent_keys, self.recent_values, self.filled)
        return read(q, exact, slots, temperature=temperature, bias=bias, observer=self.observer)

    def _merge(self, rows: list[int]) -> None:
        """Merge the oldest tokens of full `rows` and move the others up.

        Gradients still reach the tokens that stay exact.
        """
        budget = self.budget
        index = torch.tensor(rows, device=self.count.device)
        first, size = budget.num_sinks, budget.chunk_size
        keys, values = self.recent_keys[index], self.recent_values[index]
        if budget.num_slots:
            self._merge_into_slots(rows, index, keys[:, :, first:], values[:, :, first : first + size])
        elif self.observer is not None:
            self.observer.on_merge(None)
        kept = slice(first, budget.num_exact - size)
        moved = []
        for recent, x in ((self.recent_keys, keys), (self.recent_values, values)):
            # Autograd may have saved it.
            recent = recent.clone() if torch.is_grad_enabled() else recent
            recent[index, :, kept] = x[:, :, first + size :]
            recent[index, :, kept.stop :] = 0
            moved.append(recent)
        self.recent_keys, self.recent_values = moved
        for b in rows:
            self.filled[b] -= size
            self.num_merged[b] += size

    def _merge_into_slots(self, rows: list[int], index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Merge the first C keys of full windows `[R, h, W, K]`, with their values `[R, h, C, V]`.

        Gradients of the sums reach the tokens and the previous sums, but not the choice of pairs.
        """
        self._find_units(index, keys)
        keys = keys[:, :, : self.budget.chunk_size]
        weights = None if self.use is None else token_weights(keys, values, self.use[index]).to(self.wide)
        unit = self.key_unit[index][..., None, None]
        keys = keys.to(self.wide) / unit.where(unit > 0, 1)
        values = values.to(self.wide)
        # Copies, because the update is in place.
        held = Dictionary(
            self.sums("key_sum")[index],
            self.sums("value_sum")[index],
            self.count[index],
            None if weights is None else self.weight[index],
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
            positions = torch.cat([self.position_sum[index], new], 2)
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
        wide = self.wide
        length = keys.to(wide).square().sum(-1).mean(-1).sqrt()
        # Multiplying by a power of 2 does not round.
        found = torch.exp2(length.clamp(min=ORDINARY[0]).log2().round()).where(length >= ORDINARY[0], 0)
        unit = self.key_unit[index]
        self._put("key_unit", torch.where(unit == 0, found, unit), index)

"""One call of `ovq_attention` and its gradients, against `naive` on each row alone, from its first token.

The reference knows no padding, no packing and no state: it reads the tokens of a row, those that the state
has seen and the new ones, in one call. So `naive` is checked as well; its routing by a recount in NumPy.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor

from ovq.ops import OVQState, ovq_attention
from ovq.ops.ablation import Ablation
from ovq.ops.options import LEAST_READ
from ovq.ops.schedule import GROWTHS
from ovq.ops.sums import state_dtype
from tests.fuzz.backends import BACKENDS, Backend
from tests.fuzz.compare import assert_close, assert_state, bound_of
from tests.fuzz.options import OpProgram, drawn_options
from tests.fuzz.program import Impossible
from tests.fuzz.tensors import LOGS, ORDERS, SHARP, SHARP_LOGS, WEIGHTS, normalized, numbers, stored
from tests.ops.recount import recount, recount_by_edges

#: Tokens unlike the others: whether it is their key or value (1 or 2 of q, k, v), and what that is times.
SPECIAL = {
    "zero key": (1, 0.0),
    "tiny key": (1, 1e-3),
    "huge key": (1, 1e3),
    "faint key": (1, 1e-20),
    "vast key": (1, 1e20),
    "nan key": (1, torch.nan),
    "inf key": (1, torch.inf),
    "huge value": (2, 1e3),
    "nan value": (2, torch.nan),
    "inf value": (2, torch.inf),
}
#: Rows of which one may be so much longer than the others that they run in groups, at least.
MANY = 5
PADDINGS = {"zeros": 0.0, "noise": 3.0, "nan": torch.nan}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class OpCall(OpProgram):
    """A call of the op.

    Attributes:
        rows: of each row the tokens that its state has seen, the padding on its left, and its new tokens.
        tail: columns of padding that all rows have on their right.
        layout: "dense" (no mask), "mask" or "packed".
        mask_dtype: of the mask.
        padding: what stands where there is no token, one of `PADDINGS`.
        has_state: whether a state is passed though no row has seen a token.
        wants_state: whether the final one is asked for.
        has_gradients: whether gradients are compared.
        scale: "none", "float", "tensor" or "sharp".
        orders: of q, k and v in memory, of `ORDERS`.
        num_keys: how many keys there are to choose from; 0 for no bound.
        special: tokens unlike the others, each (what, row, token of the row): what is one of `SPECIAL`, or
            "same key" for that of the token before it.
    """

    kind = "op"

    rows: tuple[tuple[int, int, int], ...] = ((0, 0, 1),)
    tail: int = 0
    layout: str = "dense"
    mask_dtype: str = "int64"
    padding: str = "zeros"
    has_state: bool = False
    wants_state: bool = True
    has_gradients: bool = False
    scale: str = "none"
    orders: tuple[str, ...] = ("plain", "plain", "plain")
    num_keys: int = 0
    special: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def draw(cls, rng: Random, backend: Backend) -> OpCall:
        """A call that `backend` can run."""
        chunk_size = rng.choice([1, 2, 3] if backend.is_slow else [1, 2, 3, 4, 4, 5, 8])
        layout = rng.choice(["dense", "mask", "mask", "packed"])
        rows = _drawn_rows(rng, layout, chunk_size, longest=4 if backend.is_slow else 10)
        orders = ORDERS if layout == "dense" and len(set(rows)) == 1 else ORDERS[:-1]
        options = drawn_options(rng, ["count", "count", "count", 0.01, 0.3, 1.0])
        forgets = options["rate"] == "count" and rng.random() < 0.3
        has_weights = options["rate"] == "count" and rng.random() < (0.6 if forgets else 0.3)
        forgetting = rng.choice(list(LOGS)) if forgets else "none"
        is_sharp = forgetting in SHARP_LOGS and rng.random() < (0.4 if has_weights else 0.1)
        return cls(
            seed=rng.randrange(10**6),
            rows=rows,
            tail=rng.choice([0, 0, 1, 2]) if layout == "mask" else 0,
            layout=layout,
            mask_dtype=rng.choice(["int64", "bool", "float32"]),
            padding=rng.choice(list(PADDINGS)),
            has_state=rng.random() < 0.5,
            # Only rows that leave no state run in groups of similar lengths.
            wants_state=rng.random() < (0.85 if len(rows) < MANY else 0.4),
            has_gradients=rng.random() < (0.1 if backend.is_slow else 0.25),
            dtype=rng.choice(backend.dtypes),
            num_kv_heads=rng.choice([1, 1, 2]),
            group=rng.choice([1, 1, 2, 3]),
            key_dim=rng.choice([1, 2, 3, 5, 8]),
            value_dim=rng.choice([1, 2, 3, 5, 8]),
            num_slots=rng.choice([1, 2, 3, 5, 8, 13, 40]),
            chunk_size=chunk_size,
            growth=rng.choice(GROWTHS),
            weights=rng.choice(list(WEIGHTS)) if has_weights else "none",
            forgetting=forgetting,
            scale="sharp" if is_sharp else rng.choice(["none", "float", "tensor"]),
            orders=tuple(rng.choice(["plain", rng.choice(orders)]) for _ in "qkv"),
            num_keys=rng.choice([0, 0, 0, 1, 3]),
            special=_drawn_special(rng, rows, options["rate"], has_weights or forgets)
            if rng.random() < 0.4
            else (),
            **backend.known(options),
        )

    def check(self, name: str) -> None:
        """Outputs, state and gradients are those of each row alone; the initial state is as it was."""
        self._refuse_impossible()
        backend, tokens = BACKENDS[name], _Tokens(self)
        expected = [self._alone(tokens, r) for r in range(len(self.rows))]
        initial = self._initial_state(tokens)
        kept = None if initial is None else initial.clone()
        with backend.running():
            outputs, after = self._call(tokens, initial, backend.op)
            states = None if after is None else [after.select([r]) for r in range(len(self.rows))]
            grads = tokens.gradients(outputs, states)
        bound = tokens.bound()
        for r, (o, (o_ref, state_ref)) in enumerate(zip(outputs, expected, strict=True)):
            assert_close(o, o_ref, bound, f"outputs of row {r}", spoilt=tokens.spoilt(r))
            if states is not None:
                assert_state(states[r], state_ref, f"state of row {r}", size=tokens.size())
            if initial is not None:
                assert_state(initial.select([r]), kept.select([r]), f"initial state of row {r}")
        self._recount(tokens, [state for _, state in expected])
        # Gradients of scores that differ by more than 1 have nothing to be compared with, and neither have
        # those of tiny weights, small differences of large numbers divided by these weights, in 16 bits, of
        # large scores, and where tokens forget.
        is_rough = self.dtype in ("bfloat16", "float16") or self.scale == "sharp" or self.forgetting != "none"
        is_lost = bound >= 1 or (self.weights == "tiny" and is_rough)
        if grads and tokens.are_finite() and not is_lost:
            outputs, states = zip(*expected, strict=True)
            references = tokens.gradients(outputs, states if self.wants_state else None)
            largest = max([1.0, *(float(g.abs().max()) for g in references if g.numel())])
            bound = tokens.bound(of_gradients=True) * largest
            for i, (grad, reference) in enumerate(zip(grads, references, strict=True)):
                assert_close(grad, reference, bound, f"gradient {i}")

    @functools.cached_property
    def options(self) -> dict:
        """Arguments of the op that are no tensors."""
        names = ("num_slots", "chunk_size", "growth", "init", "merge", "value_weight")
        ablation = Ablation(bias=self.bias, rate=self.rate)
        seed = torch.Generator().manual_seed(self.seed)
        return {name: getattr(self, name) for name in names} | {"ablation": ablation, "generator": seed}

    def _refuse_impossible(self) -> None:
        sizes = (self.num_kv_heads, self.group, self.key_dim, self.value_dim, self.num_slots, self.chunk_size)
        is_masked = self.layout == "mask"
        is_right = (
            min(sizes) > 0
            and len(self.rows) > 0
            and {len(row) for row in self.rows} == {3}
            and (is_masked or self.tail == 0)
            and (is_masked or all(left == 0 for _, left, _ in self.rows))
            and (self.layout != "dense" or len({new for _, _, new in self.rows}) == 1)
            and (self.weights == self.forgetting == "none" or self.rate == "count")
            and (self.scale != "sharp" or self.forgetting in SHARP_LOGS)
            and len(self.orders) == 3
            and ("rows" not in self.orders or (self.layout == "dense" and len(set(self.rows)) == 1))
            and {len(token) for token in self.special} <= {3}
            and all(r < len(self.rows) for _, r, _ in self.special)
            and all(t < self.rows[r][0] + self.rows[r][2] for _, r, t in self.special)
        )
        if not is_right:
            raise Impossible

    def _alone(self, tokens: _Tokens, r: int) -> tuple[Tensor, OVQState]:
        """Outputs `[n, H, V]` of row r's new tokens, and its last state: `naive`, one call."""
        o, state = ovq_attention(
            *(x[None] for x in tokens.rows[r]),
            **{name: x[r][None] for name, x in tokens.gates.items()},
            scale=tokens.scale,
            output_final_state=True,
            backend="naive",
            **self.options,
        )
        return o[0, self.rows[r][0] :], state

    def _initial_state(self, tokens: _Tokens) -> OVQState | None:
        if not self.has_state and not any(seen for seen, _, _ in self.rows):
            return None
        options = {**self.options, "scale": tokens.scale, "output_final_state": True, "backend": "naive"}
        states = []
        for r, (seen, _, _) in enumerate(self.rows):
            row = [x[None, :seen] for x in tokens.rows[r]]
            gates = {name: x[r][None, :seen] for name, x in tokens.gates.items()}
            states.append(ovq_attention(*row, **gates, **options)[1])
        return OVQState.concatenate(states)

    def _call(
        self, tokens: _Tokens, initial: OVQState | None, backend: str
    ) -> tuple[list[Tensor], OVQState | None]:
        """Outputs `[n, H, V]` of each row's new tokens, and the final state if it is asked for."""
        lengths = [new for _, _, new in self.rows]
        rows = list(zip(*tokens.rows, strict=True))
        q, k, v = (stored(self._laid_out(rows[i]), self.orders[i]) for i in range(3))
        mask = self._mask(q.shape[1])
        o, state = ovq_attention(
            q,
            k,
            v,
            **{name: self._laid_out(x) for name, x in tokens.gates.items()},
            scale=tokens.given_scale,
            initial_state=initial,
            output_final_state=self.wants_state,
            backend=backend,
            attention_mask=mask,
            cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]) if self.layout == "packed" else None,
            **self.options,
        )
        assert (state is not None) == self.wants_state
        if self.layout == "packed":
            return list(o[0].split(lengths)), state
        if mask is not None:
            padding = o[mask == 0]
            assert not padding.count_nonzero(), "padding: expected zeros, found other numbers"
        outputs = [x[left : left + new] for x, (_, left, new) in zip(o, self.rows, strict=True)]
        return outputs, state

    def _laid_out(self, tokens: Sequence[Tensor]) -> Tensor:
        """New queries, keys, values or weights of all rows as the op gets them, `[B, T, heads, ...]`."""
        rows = [x[seen:] for x, (seen, _, _) in zip(tokens, self.rows, strict=True)]
        if self.layout == "packed":
            return torch.cat(rows)[None]
        width = self.tail + max(left + new for _, left, new in self.rows)
        padded = []
        for x, (_, left, new) in zip(rows, self.rows, strict=True):
            filler = x.new_full((width, *x.shape[1:]), PADDINGS[self.padding])
            padded.append(torch.cat([filler[:left], x, filler[left + new :]]))
        return torch.stack(padded)

    def _mask(self, width: int) -> Tensor | None:
        if self.layout != "mask":
            return None
        column = torch.arange(width)
        rows = [(column >= left) & (column < left + new) for _, left, new in self.rows]
        return torch.stack(rows).to(getattr(torch, self.mask_dtype))

    def _recount(self, tokens: _Tokens, states: Sequence[OVQState]) -> None:
        """Counts of the reference are those of plain NumPy, which knows no other options, and no ties."""
        choices = (self.growth, self.init, self.merge, self.rate)
        if not (self.merge == "nearest" or choices == ("plateau", "novelty", "existing", "count")):
            return
        if self.weights not in ("none", "one") or self.forgetting not in ("none", "nothing"):
            return
        if self.special or self.num_keys or self.dtype != "float64" or self.key_dim < 3:
            return
        for (_, k, v), state in zip(tokens.rows, states, strict=True):
            for head in range(self.num_kv_heads):
                keys, values = k[:, head].detach().numpy(), v[:, head].detach().numpy()
                slots = self._recounted(keys, values)
                assert state.count[0, head].tolist() == [len(members) for members in slots], "recount"

    def _recounted(self, keys: np.ndarray, values: np.ndarray) -> list[list[int]]:
        """Tokens of one head by slot."""
        if self.merge != "nearest":
            return recount(keys, values, self.num_slots, self.chunk_size)
        tokens = (keys, values, self.num_slots, self.chunk_size, self.growth, self.value_weight)
        return recount_by_edges(*tokens)


class _Tokens:
    """The tensors of a call, row by row, and what gradients are taken of.

    Attributes:
        leaves: what gradients are taken of.
        rows: of each row q `[n, H, K]`, k `[n, Hkv, K]` and v `[n, Hkv, V]`, tokens seen before included.
        gates: by name, of each row the weights and logs of its tokens, `[n, Hkv]`, where there are any.
        scale: `[H]`.
        given_scale: the same as it is passed to the op.
    """

    def __init__(self, call: OpCall) -> None:
        self._call = call
        self.leaves: list[Tensor] = []
        # Rows that share memory are one leaf.
        row = functools.cache(self._row)
        self.rows = [
            tuple(row(i, 0 if call.orders[i] == "rows" else r) for i in range(3))
            for r in range(len(call.rows))
        ]
        kinds = {"token_weights": WEIGHTS.get(call.weights), "log_forget": LOGS.get(call.forgetting)}
        self.gates = {
            name: [self._gate(name, kind, r) for r in range(len(call.rows))]
            for name, kind in kinds.items()
            if kind is not None
        }
        num_heads, wide = call.num_kv_heads * call.group, state_dtype(getattr(torch, call.dtype))
        value = {"float": 1.5, "sharp": SHARP}.get(call.scale, call.key_dim**0.5)
        self.scale, self.given_scale = torch.full((num_heads,), value, dtype=wide), None
        if call.scale in ("float", "sharp"):
            self.given_scale = value
        if call.scale == "tensor":
            self.scale = self._leaf(torch.linspace(0.5, 3, num_heads, dtype=wide))
            # Every other number of a tensor: strides are not to be taken for granted.
            self.given_scale = torch.stack((self.scale, self.scale), -1).flatten()[::2]

    def _row(self, i: int, r: int) -> Tensor:
        """Queries, keys or values (i = 0, 1, 2) of row r."""
        call = self._call
        heads = call.num_kv_heads * (call.group if i == 0 else 1)
        has_equal_heads = call.orders[i] == "heads"
        length = call.rows[r][0] + call.rows[r][2]
        shape = (length, 1 if has_equal_heads else heads, call.value_dim if i == 2 else call.key_dim)
        if i == 1 and call.num_keys:
            pool = numbers(call.seed, "pool", shape=(call.num_keys, *shape[1:]))
            x = pool[numbers(call.seed, "choice", r, shape=(length, call.num_keys)).argmax(-1)]
        elif i == 0 and call.scale == "sharp" and not has_equal_heads:
            # Queries ask for their own tokens, so that some scores are as large as can be.
            keys = numbers(call.seed, 1, r, shape=(length, call.num_kv_heads, call.key_dim))
            x = keys.repeat_interleave(call.group, 1)
        else:
            x = numbers(call.seed, i, r, shape=shape)
        x = (x if i == 2 else normalized(x)).to(getattr(torch, call.dtype))
        for what, row, t in call.special:
            if row == r and what == "same key" and i == 1 and t:
                x[t] = x[t - 1]
            elif row == r and SPECIAL.get(what, (None,))[0] == i:
                x[t, 0] *= SPECIAL[what][1]
        return self._leaf(x).expand(length, heads, shape[2])

    def _gate(self, name: str, kind: Callable[[Tensor], Tensor], r: int) -> Tensor:
        call = self._call
        shape = (call.rows[r][0] + call.rows[r][2], call.num_kv_heads)
        x = kind(numbers(call.seed, name, r, shape=shape))
        return self._leaf(x.to(state_dtype(getattr(torch, call.dtype))))

    def _leaf(self, x: Tensor) -> Tensor:
        self.leaves.append(x.requires_grad_(self._call.has_gradients))
        return x

    def are_finite(self) -> bool:
        return all(bool(x.isfinite().all()) for x in self.leaves)

    def spoilt(self, r: int) -> Tensor:
        """`[n, H]` which new tokens of row r have a key or value before them, or one, that is not finite."""
        _, k, v = self.rows[r]
        is_bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
        return (is_bad.cumsum(0) > 0).repeat_interleave(self._call.group, 1)[self._call.rows[r][0] :]

    def size(self) -> float:
        """Of the longest tokens, if a constant rate makes them cancel: 1 + (1e20 - 1e20) is 1 or 0."""
        longest = (x.detach().nan_to_num(0, 0, 0).abs().max() for x in self.leaves if x.numel())
        return 1.0 if self._call.rate == "count" else max([1.0, *(float(x) for x in longest)])

    def bound(self, *, of_gradients: bool = False) -> float:
        """Error allowed in outputs, or in gradients of at most 1."""
        q, k, v = (torch.cat([row[i].flatten(0, 1) for row in self.rows]) for i in range(3))
        # Tokens of weight 0 are read with the least weight where tokens are read with theirs.
        are_least = self._call.forgetting != "none" and self._call.weights == "some zero"
        return bound_of(
            *(q, k, v, self.scale),
            has_norms=self._call.bias != "count",
            added=-math.log(LEAST_READ) if are_least else 0.0,
            shortest=1.0 if of_gradients else 0.0,
        )

    def gradients(self, outputs: Sequence[Tensor], states: Sequence[OVQState] | None) -> list[Tensor]:
        """Gradients of a loss of the outputs and states of all rows; none where none are asked for."""
        if not self._call.has_gradients:
            return []
        loss = sum(_weighted(o) for o in outputs)
        for state in states or ():
            loss = loss + _weighted(state.key_sum) + _weighted(state.value_sum)
            loss = loss if state.weight is None else loss + _weighted(state.weight)
            used = int(state.num_pending)
            loss = loss + _weighted(state.pending_keys[:, :, :used])
            loss = loss + _weighted(state.pending_values[:, :, :used])
        return torch.autograd.grad(loss, self.leaves, allow_unused=True, materialize_grads=True)


def _weighted(x: Tensor) -> Tensor:
    """A sum of `x` with weights that depend on the place in its last three dimensions alone."""
    weights = torch.ones((), dtype=torch.float64)
    for i, n in enumerate(x.shape[-3:]):
        weights = weights[..., None] + (i + 1.3) * torch.arange(n)
    return (x.double() * weights.cos()).sum()


def _drawn_rows(rng: Random, layout: str, chunk_size: int, longest: int) -> tuple[tuple[int, int, int], ...]:
    """Rows as `OpCall` has them: lengths near those of chunks more often than others."""

    def length() -> int:
        edge = rng.choice([0, 1, 1, chunk_size - 1, chunk_size, chunk_size + 1, 2 * chunk_size])
        return min(longest, rng.choice([edge, rng.randrange(longest + 1)]))

    num_rows, has_seen = rng.choice([1, 1, 2, 3]), rng.random() < 0.5
    # One token per row, as in decoding, takes a path of its own.
    new = rng.choice([1, length()])
    rows = []
    for _ in range(num_rows):
        left = rng.choice([0, 0, 1, rng.randrange(longest)]) if layout == "mask" else 0
        rows.append((length() if has_seen else 0, left, new if layout == "dense" else length()))
    if layout != "dense" and rng.random() < 0.1:
        # One row beside many that are shorter than a chunk.
        short = [(length() if has_seen else 0, 0, rng.randrange(chunk_size)) for _ in range(MANY)]
        long = length() if has_seen else 0, 0, max(longest, chunk_size)
        return (*short, long)[:: rng.choice([1, -1])]
    # Batches that share memory between rows need equal ones.
    return (rows[0],) * num_rows if layout == "dense" and rng.random() < 0.3 else tuple(rows)


def _drawn_special(
    rng: Random, rows: Sequence[tuple[int, int, int]], rate: float | str, has_weights: bool
) -> tuple[tuple[str, int, int], ...]:
    # A step of a constant rate from Inf is Inf or NaN, by how it is written; in float16 the longest keys are
    # Inf.
    names = [what for what in SPECIAL if rate == "count" or what not in ("inf key", "inf value", "vast key")]
    # Nothing times Inf is NaN, in a slot that nobody reads.
    names = [what for what in names if not has_weights or what[:3] not in ("nan", "inf")]
    special = []
    for _ in range(rng.randrange(1, 4)):
        r = rng.randrange(len(rows))
        if length := rows[r][0] + rows[r][2]:
            special.append((rng.choice(["same key", *names]), r, rng.randrange(length)))
    return tuple(special)

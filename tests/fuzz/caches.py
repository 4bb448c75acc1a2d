"""Operations on the cache of a model with random mixers, against each row read anew, alone in one pass."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ovq.convert import attach
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.cache import CACHE_KEY, StateCache
from ovq.layers import OVQAttention
from ovq_lab.mixers import MIXERS
from tests.fuzz.backends import BACKENDS, Backend
from tests.fuzz.program import Impossible, Program
from tests.hf.common import of_mixers

MOST = 4
VOCAB_SIZE = 40
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 16}
SIZES |= {"initializer_range": 0.3, "pad_token_id": 0}
#: Mixers that choose slots by a hard argmax. Above another layer in float32, whose outputs are rounded
#: otherwise where tokens are read in parts, they may choose others (`docs/method/guarantees.md`).
ROUTED = ("ovq", "vq", "kvm", "raven")
#: Error allowed in logits.
TOLERANCES = {"float64": 1e-8, "float32": 2e-3}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class CacheProgram(Program):
    """Operations on caches, one after the other.

    Attributes:
        prompts: lengths of the rows it begins with, padded left to the longest.
        cut: where the reading of the prompts is cut in two.
        steps: the operations, each (name, two numbers). Numbers are taken modulo what there is.
        mixers: of the layers.
        dtype: of the model.
        has_rope: whether all mixers that may have rotary embedding have it.
        num_kv_heads, conv_size, num_slots, chunk_size, sliding_window: of the model.
        init, merge, bias, rate: of its "ovq" layers.
        is_converted: whether the model is a converted Llama instead, with as many layers. Half of its heads
            have `num_slots` slots, the others one; windows are of `sliding_window` chunks.
    """

    kind = "caches"

    prompts: tuple[int, ...] = (1,)
    cut: int = 0
    steps: tuple[tuple[str, int, int], ...] = ()
    mixers: tuple[str, ...] = ("ovq",)
    dtype: str = "float64"
    has_rope: bool = False
    num_kv_heads: int = 1
    conv_size: int = 0
    num_slots: int = 1
    chunk_size: int = 1
    sliding_window: int = 2
    merge: str = "existing"
    bias: str = "count"
    rate: float | str = "count"
    is_converted: bool = False

    @classmethod
    def draw(cls, rng: Random, backend: Backend) -> CacheProgram:
        """A program for `backend`."""
        names = [*STEPS, *["read"] * 6]
        # The compiled kernels run float32.
        dtype = "float32" if backend.name == "cpu" and rng.random() < 0.5 else "float64"
        above = [name for name in MIXERS if dtype == "float64" or name not in ROUTED]
        mixers = [rng.choice(["ovq", rng.choice(list(MIXERS))])]
        mixers += [rng.choice([above[0], rng.choice(above)]) for _ in range(rng.randrange(3))]
        merge = rng.choice(["existing", "existing", "updated", "nearest"])
        is_converted = rng.random() < 0.25
        if is_converted and dtype == "float32":
            mixers = mixers[:1]
        return cls(
            seed=rng.randrange(10**6),
            prompts=tuple(rng.randrange(1, 10) for _ in range(rng.choice([1, 2, 3]))),
            cut=rng.randrange(10),
            steps=tuple(
                (rng.choice(names), rng.randrange(24), rng.randrange(24)) for _ in range(rng.randrange(2, 7))
            ),
            mixers=tuple(mixers),
            dtype=dtype,
            has_rope=rng.random() < 0.5,
            num_kv_heads=rng.choice([1, 2]),
            conv_size=rng.choice([0, 2, 4]),
            num_slots=rng.choice([1, 3, 6, 20]),
            chunk_size=rng.choice([1, 2, 3, 4]),
            sliding_window=rng.choice([2, 3, 5]),
            merge=merge,
            bias=rng.choice(["count", "count", "count+norm"]),
            rate="count" if merge == "nearest" else rng.choice(["count", "count", 0.3]),
            is_converted=is_converted,
        )

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Logits of every step are those of each row read anew."""
        if not self.mixers or not self.prompts or not all(1 <= n <= 16 for n in self.prompts):
            raise Impossible
        if min(self.num_kv_heads, self.num_slots, self.chunk_size) < 1 or self.sliding_window < 2:
            raise Impossible
        is_routed = self.is_converted or set(self.mixers[1:]) & set(ROUTED)
        if self.dtype == "float32" and len(self.mixers) > 1 and is_routed:
            raise Impossible
        machine = _Machine(self, BACKENDS[name])
        with BACKENDS[name].running():
            for step, a, b in self.steps:
                STEPS[step](machine, a, b)
            for i in range(len(machine.branches)):
                machine.turn_to(i)
                machine.read(1)

    def model(self) -> Any:
        """A model with random weights: large ones, so that logits do not tie."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = self._converted() if self.is_converted else self._own()
        return model.to(getattr(torch, self.dtype)).eval()

    def _converted(self) -> Any:
        config = LlamaConfig(
            **SIZES,
            num_hidden_layers=len(self.mixers),
            num_attention_heads=4,
            num_key_value_heads=2,
            # Texts are longer at times, so that sinks and slots are brought nearer.
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=None,
        )
        return attach(
            LlamaForCausalLM(config).eval(),
            num_slots=[[self.num_slots, 1]] * len(self.mixers),
            window=self.sliding_window * self.chunk_size,
            num_sinks=self.conv_size,
            chunk_size=self.chunk_size,
            merge="nearest" if self.merge == "nearest" else "existing",
        )

    def _own(self) -> OVQForCausalLM:
        config = OVQConfig(
            **SIZES,
            num_hidden_layers=len(self.mixers),
            num_attention_heads=2,
            num_key_value_heads=self.num_kv_heads,
            head_dim=8,
            **of_mixers(
                list(self.mixers),
                num_sinks=2,
                sink_window=self.sliding_window,
                kvm_chunk_size=min(self.chunk_size, self.num_slots),
                kvm_sinks=int(min(self.chunk_size, self.num_slots) > 1),
            ),
            rope_mixers=[n for n, mixer in MIXERS.items() if mixer.supports_rope] if self.has_rope else None,
            sliding_window=self.sliding_window,
            num_slots=self.num_slots,
            chunk_size=self.chunk_size,
            conv_size=self.conv_size,
            merge=self.merge,
            ablation={"bias": self.bias, "rate": self.rate},
        )
        return OVQForCausalLM(config)


class _Machine:
    """A cache with the tokens of its rows, and the branches that went off from it."""

    def __init__(self, program: CacheProgram, backend: Backend) -> None:
        self.program, self.backend, self.model = program, backend, program.model()
        self.next_token = itertools.count(1)
        self.anew = functools.cache(self._anew)
        self.cache = self.model.make_cache()
        self.rows: list[tuple[int, ...]] = []
        self.is_padded = len(set(program.prompts)) > 1
        self.branches: list[tuple[StateCache, list[tuple[int, ...]]]] = []
        self._use(backend.op)
        with backend.running():
            self._begin()

    def _use(self, op: str) -> None:
        for module in self.model.modules():
            if isinstance(module, OVQAttention):
                module.backend = op

    def _begin(self) -> None:
        """Read the prompts in two parts."""
        width = max(self.program.prompts)
        self.rows = [self.tokens(n) for n in self.program.prompts]
        cut = self.program.cut % (width + 1)
        mask = self.mask(width)
        ids = self.padded(width)
        parts = [
            self.logits(ids[:, part], mask[:, : part.stop])
            for part in (slice(0, cut), slice(cut, width))
            if part.stop > part.start
        ]
        self.compare(torch.cat(parts, 1))

    def tokens(self, n: int) -> tuple[int, ...]:
        """The next `n` tokens of a text that repeats itself late."""
        numbers = itertools.islice(self.next_token, n)
        return tuple(1 + (i * i + i // 7 + self.program.seed) % (VOCAB_SIZE - 1) for i in numbers)

    def padded(self, width: int) -> Tensor:
        """Ids of all rows `[B, width]`."""
        return torch.tensor([[0] * (width - len(row)) + list(row) for row in self.rows])

    def mask(self, width: int) -> Tensor:
        """The mask of all columns."""
        return torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in self.rows])

    def read(self, n: int) -> None:
        """Every row reads `n` more tokens, and predicts what it predicts alone."""
        width = self.cache.get_seq_length() + n
        self.rows = [row + self.tokens(n) for row in self.rows]
        # Once there was padding a mask is asked for, though the rows that had it may be gone.
        mask = self.mask(width) if self.is_padded else None
        ids = self.padded(width)[:, -n:]
        self.compare(self.logits(ids, mask))

    def logits(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of the next columns, of which the mask has the last ones."""
        places = {}
        if self.program.is_converted and mask is not None:
            places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
        return self.model(ids, mask, **places, **{CACHE_KEY: self.cache}).logits

    def compare(self, logits: Tensor) -> None:
        """Logits of the last columns, those of padding left out, against those of each row alone."""
        for r, row in enumerate(self.rows):
            n = min(len(row), logits.shape[1])
            expected = self.anew(row)[-n:]
            error = float((logits[r, -n:] - expected).abs().max())
            bound = self.tolerance * (1 + float(expected.abs().max()))
            assert error <= bound, f"logits of row {r}: expected an error of {bound:.1e}, found {error:.1e}"

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.program.dtype]

    def _anew(self, row: tuple[int, ...]) -> Tensor:
        """Logits `[T, vocabulary]` of a row, alone, by the reference."""
        self._use("naive")
        try:
            return self.model(torch.tensor([row]), use_cache=False).logits[0]
        finally:
            self._use(self.backend.op)

    def turn_to(self, branch: int) -> None:
        """Go on with another branch; the present one waits in its place."""
        other = self.branches[branch]
        self.branches[branch] = (self.cache, self.rows)
        self.cache, self.rows = other

    def shorten(self) -> None:
        """A batch that doubles again and again would take forever."""
        if len(self.rows) > MOST:
            self.cache.batch_select_indices(torch.arange(MOST))
            self.rows = self.rows[:MOST]


def _generate(machine: _Machine, a: int, b: int) -> None:
    """Each token that is generated is one of the most likely after those before it."""
    width, num_new = machine.cache.get_seq_length() + 1, 1 + a % 4
    if machine.is_padded and all(len(row) + 1 == width for row in machine.rows):
        # Rows with padding have left. transformers drops a mask of ones, and the cache still asks for one.
        return
    machine.rows = [row + machine.tokens(1) for row in machine.rows]
    out = machine.model.generate(
        machine.padded(width),
        attention_mask=machine.mask(width),
        max_new_tokens=num_new,
        do_sample=False,
        **{CACHE_KEY: machine.cache},
    )
    new = out[:, width:].tolist()
    # The last token is not read any more.
    machine.rows = [row + tuple(ids[:-1]) for row, ids in zip(machine.rows, new, strict=True)]
    assert machine.cache.get_seq_length() == width + num_new - 1, "columns after generate"
    for r, (row, ids) in enumerate(zip(machine.rows, new, strict=True)):
        logits = machine.anew(row)[-num_new:]
        lead = logits.max(-1).values - logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert float(lead.max()) <= machine.tolerance * (1 + float(logits.abs().max())), f"tokens of row {r}"


def _reorder(machine: _Machine, a: int, b: int) -> None:
    index = [(a + b * r) % len(machine.rows) for r in range(len(machine.rows))]
    machine.cache.reorder_cache(torch.tensor(index))
    machine.rows = [machine.rows[i] for i in index]


def _select(machine: _Machine, a: int, b: int) -> None:
    index = [a % len(machine.rows), b % len(machine.rows)]
    machine.cache.batch_select_indices(torch.tensor(index))
    machine.rows = [machine.rows[i] for i in index]


def _repeat(machine: _Machine, a: int, b: int) -> None:
    machine.cache.batch_repeat_interleave(1 + a % 2)
    machine.rows = [row for row in machine.rows for _ in range(1 + a % 2)]
    machine.shorten()


def _branch(machine: _Machine, a: int, b: int) -> None:
    copied = machine.cache.snapshot() if a % 2 else copy.deepcopy(machine.cache)
    machine.branches = [*machine.branches, (copied, list(machine.rows))][-2:]


def _turn(machine: _Machine, a: int, b: int) -> None:
    if machine.branches:
        machine.turn_to(a % len(machine.branches))


def _crop(machine: _Machine, a: int, b: int) -> None:
    """Rows read more tokens, of which the last are taken out again."""
    num_new, num = 1 + a % 6, b % (2 + a % 6)
    machine.cache.activate_past_recording()
    machine.read(num_new)
    if num and machine.program.is_converted and len(machine.rows) > 1:
        try:
            machine.cache.crop(-num)
        except ValueError:
            return
        raise AssertionError("crop: expected a refusal")
    machine.cache.crop(-num)
    machine.rows = [row[: len(row) - num] for row in machine.rows]


def _join(machine: _Machine, a: int, b: int) -> None:
    """A row joins the batch."""
    row, cache = machine.tokens(1 + a % 8), machine.model.make_cache()
    machine.is_padded |= len(row) != machine.cache.get_seq_length()
    machine.model(torch.tensor([row]), **{CACHE_KEY: cache})
    caches, rows = [machine.cache, cache], [*machine.rows, row]
    if b % 2:
        caches, rows = caches[::-1], [row, *machine.rows]
    machine.cache, machine.rows = type(cache).concatenate(caches), rows
    machine.shorten()


STEPS: dict[str, Callable[[_Machine, int, int], None]] = {
    "read": lambda machine, a, b: machine.read(1 + a % 6),
    "generate": _generate,
    "reorder": _reorder,
    "select": _select,
    "repeat": _repeat,
    "branch": _branch,
    "turn": _turn,
    "crop": _crop,
    "join": _join,
}

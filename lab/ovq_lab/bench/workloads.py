"""Workloads of `ovq bench`: attention by OVQ or another mixer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ovq.ops import OVQState, ovq_attention, slots_by_chunk
from ovq.ops.options import default_growth
from ovq_lab.bench.rivals import RIVALS
from ovq_lab.eval.rows import model_label


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One attention workload.

    Attributes:
        mixer: `"ovq"` or one of `rivals.RIVALS`.
        length: Tokens T.
        merge: The merge rule of OVQ, with its default growth.
        chunk_size: C of OVQ, and the width of the window.
        head_dim: K = V.
    """

    mixer: str
    length: int
    dtype: str
    num_slots: int | None = None
    merge: str = "existing"
    chunk_size: int = 256
    num_heads: int = 8
    head_dim: int = 64

    @property
    def label(self) -> str:
        """Its name in tables and figures.

        Example:
            >>> shape = {"length": 4096, "dtype": "float32", "num_slots": 1024}
            >>> [Workload(mixer="ovq", merge=rule, **shape).label for rule in ("existing", "nearest")]
            ['OVQ, 1024 slots', 'OVQ, nearest, 1024 slots']
        """
        if self.mixer == "ovq":
            return model_label("ovq", self.num_slots, merge=self.merge)
        return RIVALS[self.mixer].label.format(window=self.chunk_size)

    def row(self, what: str) -> dict[str, Any]:
        """The fields of a report row that describe the workload."""
        return {
            "what": what,
            "mixer": self.mixer,
            "label": self.label,
            "num_slots": self.num_slots,
            "merge": self.merge if self.mixer == "ovq" else None,
            "length": self.length,
            "dtype": self.dtype,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Options of `ovq_attention`, for OVQ only."""
        assert self.num_slots is not None
        return {"num_slots": self.num_slots, "chunk_size": self.chunk_size, "merge": self.merge}

    def inputs(self, *, device: str = "cpu", requires_grad: bool = False) -> list[Tensor]:
        """q, k, v in the mixer's layout: `[1, T, H, K]` for OVQ and fla, else `[1, H, T, K]`."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.length, self.num_heads, self.head_dim)
        tensors = []
        for is_value in (False, False, True):
            x = torch.randn(shape, generator=generator)
            x = (x if is_value else normalize(x, dim=-1)).to(device, getattr(torch, self.dtype))
            is_token_first = self.mixer == "ovq" or RIVALS[self.mixer].is_token_first
            x = x if is_token_first else x.transpose(1, 2).contiguous()
            tensors.append(x.requires_grad_(requires_grad))
        return tensors

    def read(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The measured function of q, k and v."""
        scale = self.head_dim**0.5
        if self.mixer == "ovq":
            return lambda q, k, v: ovq_attention(q, k, v, scale=scale, **self.options)[0]
        return RIVALS[self.mixer].read(scale, self.chunk_size)

    def forward(self, device: str) -> Callable[[], object]:
        """A function that runs the forward pass once."""
        inputs, read = self.inputs(device=device), self.read()
        return torch.no_grad()(lambda: read(*inputs))

    def forward_backward(self, device: str) -> Callable[[], tuple[Tensor, ...]]:
        """A function that runs forward and backward once, and returns the gradients of q, k and v."""
        inputs, read = self.inputs(device=device, requires_grad=True), self.read()
        grad = torch.randn_like(inputs[0].detach())
        return lambda: torch.autograd.grad(read(*inputs), inputs, grad)

    def decode(self, device: str) -> Callable[[], object]:
        """A function that decodes one token after `length` tokens and continues at each further call; after a
        chunk of tokens it starts again. Caches hold as many tokens as have been read at each step."""
        if self.mixer == "ovq":
            return self._decode_ovq(device)
        make = RIVALS[self.mixer].decode
        assert make is not None, "asked for where has_decode is true"
        return torch.no_grad()(make(self._steps(device), self.head_dim**0.5))

    def _steps(self, device: str) -> Iterator[list[Tensor]]:
        """A query and the keys and values it attends to, for each token after the first `length`."""
        if self.cost == "exact":
            q, *cache = dataclasses.replace(self, length=self.length + self.chunk_size).inputs(device=device)
            places = range(self.length, self.length + self.chunk_size)
            # Slices of a preallocated cache, made beforehand so that slicing is not measured.
            return itertools.cycle([[q[:, :, t : t + 1], *(x[:, :, : t + 1] for x in cache)] for t in places])
        # Any window serves, and the cost of a state does not depend on its content.
        kept = min(self.length, self.chunk_size) if self.cost == "window" else 1
        q, k, v = dataclasses.replace(self, length=kept).inputs(device=device)
        return itertools.repeat([q[:, :, -1:] if self.cost == "window" else q, k, v])

    @property
    def has_decode(self) -> bool:
        """Whether decoding one token after a context can be measured."""
        return self.mixer == "ovq" or RIVALS[self.mixer].decode is not None

    def _decode_ovq(self, device: str) -> Callable[[], object]:
        inputs = self.inputs(device=device)
        first: OVQState | None
        with torch.no_grad():
            _, first = ovq_attention(*inputs, **self.options, output_final_state=True)
        places = [t % self.length for t in range(self.chunk_size)]
        tokens = [[x[:, t : t + 1] for x in inputs] for t in places]
        state, t = first, 0

        @torch.no_grad()
        def call() -> object:
            nonlocal state, t
            if t == self.chunk_size:
                # Starts again, so that no more than a chunk is read beyond `length` tokens.
                state, t = first, 0
            token = tokens[t]
            t += 1
            o, state = ovq_attention(*token, **self.options, initial_state=state, output_final_state=True)
            return o

        return call

    def stream(self, piece: int) -> OVQState:
        """The state of OVQ after reading `length` tokens in pieces; memory must not grow with the length."""
        state: OVQState | None = None
        inputs = dataclasses.replace(self, length=piece).inputs()
        with torch.no_grad():
            for _ in range(0, self.length, piece):
                _, state = ovq_attention(
                    *inputs, **self.options, initial_state=state, output_final_state=True
                )
        assert state is not None
        return state

    def flops(self, *, backward: bool = False) -> float:
        """Floating-point operations that the algorithm needs, counting matrix products only.

        OVQ: 2 T H (n (2 K + V) + C (K + V) / 2), with n the mean size of the dictionary, for routing, scores
        and the read. Exact attention: 2 T H (T / 2) (K + V). A backward needs twice the products of the read
        (it has no routing). Recomputed products are not counted, nor those of the nearest-item search of
        "nearest".

        Example:
            >>> w = Workload(mixer="sdpa", length=1024, dtype="float32", num_heads=1, head_dim=64)
            >>> w.flops() == 2 * 1024 * 512 * 128
            True
        """
        per_key, routing = 2 * self.head_dim, 0.0
        if self.cost == "state":
            # Products with a [K, V] state as the recurrence needs them; in chunks there are more.
            read: float = RIVALS[self.mixer].products * self.head_dim**2
        elif self.cost == "exact":
            read = self.length / 2 * per_key
        elif self.cost == "window":
            read = min(self.chunk_size, self.length / 2) * per_key
        else:
            sizes = self._sizes(-(-self.length // self.chunk_size) - 1)
            num_slots = sum(sizes) / len(sizes)
            read = (num_slots + min(self.chunk_size, self.length) / 2) * per_key
            routing = 0.0 if backward else num_slots * self.head_dim
        return 2 * self.num_heads * self.length * ((2 if backward else 1) * read + routing)

    def _sizes(self, num_chunks: int) -> list[int]:
        """Slots of OVQ before each of `num_chunks` chunks, and after the last."""
        sizes = {"num_slots": self.options["num_slots"], "chunk_size": self.chunk_size}
        return slots_by_chunk(0, 0, num_chunks, growth=default_growth(self.merge), **sizes)

    @property
    def cost(self) -> str:
        """Kind of cost: `"exact"`, `"window"`, `"slots"` or `"state"`."""
        return "slots" if self.mixer == "ovq" else RIVALS[self.mixer].cost

    def bytes(self, part: str) -> float:
        """Lower bound of the bytes read and written by any implementation.

        These are the inputs, the output and their gradients, once; for a decoded token, its cache, state or
        dictionary.

        Example:
            >>> w = Workload(mixer="sdpa", length=1024, dtype="bfloat16", num_heads=1, head_dim=64)
            >>> w.bytes("forward") == 4 * 1024 * 64 * 2, w.bytes("decode") == 2 * 1024 * 64 * 2
            (True, True)
        """
        size = getattr(torch, self.dtype).itemsize
        row = self.num_heads * self.head_dim * size
        if part == "decode":
            if self.cost == "state":
                return 2 * self.num_heads * self.head_dim**2 * 4
            if self.cost == "slots":
                slots = self._sizes(self.length // self.chunk_size)[-1]
                # Sums are float32, counts have 8 bytes; the chunk is half full on average.
                return slots * self.num_heads * (8 * self.head_dim + 8) + self.chunk_size * row
            return 2 * row * (self.length if self.cost == "exact" else min(self.length, self.chunk_size))
        # The backward reads q, k, v, o and the gradient of o, and writes three gradients.
        return self.length * row * (4 if part == "forward" else 12)

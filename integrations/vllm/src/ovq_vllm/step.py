"""What a step of the engine runs: the requests of each kind, their tokens, and the blocks of their states.

vLLM puts the new tokens of all requests one after the other. Requests with one new token, which is nearly
always decoding, are run as rows `[R, 1]`, all others packed as `[1, T]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from ovq.layers import SequenceLayout
from ovq.ops.call import RowBounds


@dataclass(frozen=True, kw_only=True)
class RequestLayout(SequenceLayout):
    """The new tokens of requests that have read different numbers of tokens.

    Attributes:
        place: `[B, T]` the place of each new token in its request, from 1.
    """

    place: Tensor

    def positions(self, device: torch.device) -> Tensor:
        """See `SequenceLayout.positions`."""
        return self.place.flatten().to(device) - 1

    def places(self, num_seen: Tensor | None = None) -> Tensor:
        """See `SequenceLayout.places`; each token's own place, whatever states have counted."""
        return self.place


@dataclass(frozen=True)
class Group:
    """Requests of a step that are run in one call of each layer.

    Attributes:
        blocks: `[R]` int64, the blocks of their states.
        block_ids: the same numbers.
        num_seen: tokens that each has read before this step.
        lengths: new tokens of each.
        block_size: where a state has read so many tokens, or a multiple, its block is kept as it is for other
            requests that begin alike; vLLM copies it to another one before the request goes on.
        tokens: `[T]` int64, where they are among all new tokens of the step.
        is_packed: whether the tokens are packed into one row `[1, T]`, and not rows `[R, 1]`.
    """

    blocks: Tensor
    block_ids: tuple[int, ...]
    num_seen: tuple[int, ...]
    lengths: tuple[int, ...]
    block_size: int
    tokens: Tensor
    is_packed: bool
    _layouts: dict[bool, RequestLayout] = field(default_factory=dict)

    @property
    def num_after(self) -> tuple[int, ...]:
        """Tokens that each request has read after this step."""
        return tuple(seen + length for seen, length in zip(self.num_seen, self.lengths, strict=True))

    @property
    def is_at_end(self) -> bool:
        """Whether the block of a request is complete after this step."""
        return any(after % self.block_size == 0 for after in self.num_after)

    @property
    def fresh(self) -> list[int]:
        """The rows of requests that have read nothing."""
        return [row for row, seen in enumerate(self.num_seen) if seen == 0]

    def take(self, x: Tensor) -> Tensor:
        """`[T, D]` of all new tokens of the step to the rows of this group, `[R, 1, D]` or `[1, T, D]`."""
        own = x if len(self.tokens) == len(x) else x.index_select(0, self.tokens)
        return own[None] if self.is_packed else own[:, None]

    def put(self, rows: Tensor, into: Tensor) -> None:
        """Write what `take` gave to where it came from."""
        into.index_copy_(0, self.tokens, rows.flatten(0, 1))

    def read(self, tensor: Tensor) -> Tensor:
        """What the blocks of these requests have in a tensor `[blocks, ...]`; at first zeros."""
        found = tensor.index_select(0, self.blocks)
        # Whatever a request that is gone has left.
        found[self.fresh] = 0
        return found

    @cached_property
    def rows(self) -> SequenceLayout:
        """The layout for mixers that need no places of tokens."""
        offsets = torch.tensor([0, *accumulate(self.lengths)]) if self.is_packed else None
        num_rows, num_new = (1, len(self.tokens)) if self.is_packed else (len(self.tokens), 1)
        return SequenceLayout.of(None, batch_size=num_rows, num_past=0, num_new=num_new, cu_seqlens=offsets)

    def layout(self, as_rows: bool) -> RequestLayout:
        """The layout for the library's layers, made once for all of them; packed if not `as_rows`."""
        if as_rows not in self._layouts:
            place = torch.cat(
                [
                    torch.arange(seen + 1, after + 1)
                    for seen, after in zip(self.num_seen, self.num_after, strict=True)
                ]
            )
            starts = [0, *accumulate(self.lengths)][:-1]
            bounds = None if as_rows else RowBounds(torch.tensor([starts, self.lengths]))
            self._layouts[as_rows] = RequestLayout(
                num_past=max(self.num_seen),
                num_new=1 if as_rows else len(place),
                place=place[:, None] if as_rows else place[None],
                bounds=bounds,
            )
        return self._layouts[as_rows]


@dataclass
class Step:
    """The metadata of the state layers: all requests of a step."""

    groups: list[Group]


class StateBackend(AttentionBackend):
    """vLLM's name for what makes the metadata of a kind of layers."""

    @staticmethod
    def get_name() -> str:
        """A name for logs."""
        return "OVQ_STATE"

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """What makes the metadata."""
        return StepBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Layers with states, and no keys and values in pages."""
        return True


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the `Step` of what vLLM has scheduled."""

    # A chunk that is complete is merged, which the host decides.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    reorder_batch_threshold = 1

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """The groups of a step; rows without a token, which are padding, are in none."""
        given = common_attn_metadata
        num = given.num_reqs
        # Both are exact without speculative decoding, which is refused.
        total = given.seq_lens_cpu_upper_bound
        totals = (given.seq_lens.cpu() if total is None else total)[:num].tolist()
        bounds = list(pairwise(given.query_start_loc_cpu[: num + 1].tolist()))
        # A state lies in the block of its last token; without prefix caching, a block holds any text.
        columns = torch.tensor([[max(after - 1, 0) // self._block_size] for after in totals])
        table = given.block_table_tensor[:num]
        all_blocks = table.gather(1, columns.to(table.device))[:, 0].tolist()
        groups = []
        for is_packed in (False, True):
            rows = [r for r, (a, b) in enumerate(bounds) if (b - a > 1 if is_packed else b - a == 1)]
            if not rows:
                continue
            lengths = tuple(bounds[r][1] - bounds[r][0] for r in rows)
            ids = tuple(all_blocks[r] for r in rows)
            groups.append(
                Group(
                    blocks=torch.tensor(ids, device=self.device),
                    block_ids=ids,
                    num_seen=tuple(totals[r] - n for r, n in zip(rows, lengths, strict=True)),
                    lengths=lengths,
                    block_size=self._block_size,
                    tokens=torch.cat([torch.arange(*bounds[r]) for r in rows]).to(self.device),
                    is_packed=is_packed,
                )
            )
        return Step(groups)

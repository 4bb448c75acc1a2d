"""Metadata of a step of the engine: groups of requests, their tokens, and the blocks of their states.

vLLM concatenates the new tokens of all requests. Requests with one new token (nearly always decoding) run as
rows `[R, 1]`, all others packed as `[1, T]`.
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
    """Layout of new tokens of requests that have read different numbers of tokens.

    Attributes:
        place: `[B, T]`, place of each new token in its request, from 1.
    """

    place: Tensor

    def positions(self, device: torch.device) -> Tensor:
        """See `SequenceLayout.positions`."""
        return self.place.flatten().to(device) - 1

    def places(self, num_seen: Tensor | None = None) -> Tensor:
        """See `SequenceLayout.places`; each token's own place, so `num_seen` of the states is ignored."""
        return self.place


@dataclass(frozen=True)
class Group:
    """Requests of a step that run in one call of each layer.

    Attributes:
        blocks: `[R]` int64, the blocks of their states.
        block_ids: the same numbers on the host.
        num_seen: tokens that each request has read before this step.
        lengths: new tokens of each request.
        block_size: tokens per block. A state after a multiple of it stays in its block for other requests
            with this prefix; vLLM copies it to a new block before the request continues.
        tokens: `[T]` int64, indices of the group's tokens among all new tokens of the step.
        is_packed: whether the tokens form one row `[1, T]` instead of rows `[R, 1]`.
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
        """Number of tokens that each request has read after this step."""
        return tuple(seen + length for seen, length in zip(self.num_seen, self.lengths, strict=True))

    @property
    def is_at_end(self) -> bool:
        """Whether the block of a request is complete after this step."""
        return any(after % self.block_size == 0 for after in self.num_after)

    @property
    def fresh(self) -> list[int]:
        """Rows of requests that have read nothing yet."""
        return [row for row, seen in enumerate(self.num_seen) if seen == 0]

    def take(self, x: Tensor) -> Tensor:
        """Gather this group's rows, `[R, 1, D]` or `[1, T, D]`, from all new tokens `[T, D]` of the step."""
        own = x if len(self.tokens) == len(x) else x.index_select(0, self.tokens)
        return own[None] if self.is_packed else own[:, None]

    def put(self, rows: Tensor, into: Tensor) -> None:
        """Inverse of `take`: scatter the rows of this group into `into`."""
        into.index_copy_(0, self.tokens, rows.flatten(0, 1))

    def read(self, tensor: Tensor) -> Tensor:
        """Entries of a tensor `[blocks, ...]` for these requests; zeros for those that have read nothing."""
        found = tensor.index_select(0, self.blocks)
        # Remove what a former request has left.
        found[self.fresh] = 0
        return found

    @cached_property
    def rows(self) -> SequenceLayout:
        """The layout for mixers that do not use the places of tokens."""
        offsets = torch.tensor([0, *accumulate(self.lengths)]) if self.is_packed else None
        num_rows, num_new = (1, len(self.tokens)) if self.is_packed else (len(self.tokens), 1)
        return SequenceLayout.of(None, batch_size=num_rows, num_past=0, num_new=num_new, cu_seqlens=offsets)

    def layout(self, as_rows: bool) -> RequestLayout:
        """The layout for the library's layers, cached for all of them; packed unless `as_rows`."""
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
    """Metadata of the layers with states: all requests of a step."""

    groups: list[Group]


class StateBackend(AttentionBackend):
    """vLLM's attention backend of layers with states; only builds their metadata."""

    @staticmethod
    def get_name() -> str:
        """Name in logs."""
        return "OVQ_STATE"

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """Class that builds the metadata."""
        return StepBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """True: such layers have states instead of keys and values in pages."""
        return True


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Builds the `Step` from the requests that vLLM has scheduled."""

    # No CUDA graphs: the host decides whether a chunk is complete and merged.
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
        """Build the groups of a step; rows without tokens are padding and in no group."""
        given = common_attn_metadata
        num = given.num_reqs
        # Both are exact, as speculative decoding is refused.
        total = given.seq_lens_cpu_upper_bound
        totals = (given.seq_lens.cpu() if total is None else total)[:num].tolist()
        bounds = list(pairwise(given.query_start_loc_cpu[: num + 1].tolist()))
        # A state is in the block of its last token; without prefix caching, one block serves any length.
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

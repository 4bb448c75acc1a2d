"""Context parallelism: a document split over the ranks of a process group.

Rank r reads the r-th part. From earlier parts it only needs the state of each layer, whose size does not
depend on their length: `OVQState` and the last inputs of the convolution for an OVQ layer, the last keys and
values for a sliding window, the state of a recurrent mixer. In the backward pass, the gradient of the loss
with respect to that state is sent back. Forward and backward equal those of one process.

    torch.distributed.init_process_group()
    parallel = ContextParallel(model)  # each rank has the whole model
    loss = parallel.forward_backward([{"input_ids": ids, "labels": ids}])  # gradients are on every rank
    optimizer.step()
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ovq.hf.loss import can_be_pieced, loss_in_pieces
from ovq.hf.modeling_ovq import OVQForCausalLM, check_ids
from ovq.layers import SequenceLayout
from ovq.ops.parts import StateSpec, of_rows
from ovq.parallel.schedule import steps_of_rank
from ovq.parallel.segment import Segment
from ovq.parallel.transfer import BACK, FORTH, Neighbours, floating

NAMES = ("input_ids", "labels", "attention_mask", "position_ids")
"""What a micro-batch may have."""

IGNORED = -100
"""The label of a position that is not predicted, as in transformers."""


class ContextParallel:
    """Trains a model on documents that are split over the ranks of a process group.

    Every rank holds the whole model; here all get the weights of the group's first rank. A rank gets whole
    micro-batches of token ids and reads its part of them, so it knows its targets, including the first token
    of the next part, and the total number of targets.

    Args:
        model: The model, not wrapped in another.
        group: The ranks in the order of the document; None for all of them. All ranks of the group must build
            their `ContextParallel` at the same time.
        recompute: Run each layer again in the backward pass instead of keeping its activations. (The model's
            own gradient checkpointing cannot, because it does not handle states.)
        max_in_flight: Micro-batches whose activations a rank may keep at a time, see `steps_of_rank`.

    Raises:
        ValueError: If there is no process group, or the model is of another type or has a mixer without a
        state of constant size.
    """

    def __init__(
        self,
        model: OVQForCausalLM,
        group: dist.ProcessGroup | None = None,
        *,
        recompute: bool = False,
        max_in_flight: int | None = None,
    ) -> None:
        if not isinstance(model, OVQForCausalLM):
            raise ValueError(
                f"model: expected an OVQForCausalLM itself, found {type(model).__name__}: other models, "
                "wrapped and converted ones included, pass no gradients to the previous part of a document"
            )
        for name, mixer in zip(model.config.mixer_types, model.mixers(), strict=True):
            reason: str | None = "its state grows with every token, and so would every message between ranks"
            if mixer.has_bounded_state:
                reason = mixer.trained_on_whole_batches
            if reason is not None:
                raise ValueError(
                    f"mixer_types: expected mixers that pass on a state of constant size, found {name!r}: "
                    f"{reason}"
                )
        if max_in_flight is not None and max_in_flight < 1:
            raise ValueError(f"max_in_flight: expected at least 1 micro-batch, found {max_in_flight}")
        if not dist.is_initialized():
            raise ValueError(
                "expected torch.distributed.init_process_group to have been called (start the program with "
                "torchrun), found no process group"
            )
        self.model = model
        self.recompute, self.max_in_flight = recompute, max_in_flight
        self.neighbours = Neighbours(group, model.device)
        with torch.no_grad():
            for tensor in itertools.chain(model.parameters(), model.buffers()):
                dist.broadcast(tensor, self.neighbours.first, group)

    def forward_backward(
        self, micro_batches: Sequence[Mapping[str, Tensor]], *, bounds: Sequence[int] | None = None
    ) -> float:
        """Compute the loss of an optimizer step, and its gradients.

        Args:
            micro_batches: For each, `input_ids` `[B, T]` and `labels` `[B, T]` (usually the same; -100 is
                ignored), whole and the same on every rank. B and T may differ between micro-batches. Of other
                names `attention_mask`, all ones, and `position_ids`, 0 to T - 1, are allowed, as collators
                add them: rows have no padding and are not packed.
            bounds: `[R + 1]` first token of each rank's part, then T; each part needs at least one token.
                None: `even_bounds`.

        Returns:
            The mean loss over the targets of all micro-batches, the same on every rank. Its gradients have
            been added to `.grad` of the parameters, summed over the ranks.

        Raises:
            ValueError: If the input of any rank has a wrong shape or unknown names, differs from that of
                others, or has no targets at all; the bounds do not divide it; gradients are disabled (use
                `loss`), or the model has gradient checkpointing on (use `recompute`).
        """
        if not torch.is_grad_enabled():
            raise ValueError("expected gradients to be enabled (ContextParallel.loss needs none)")
        if self.model.model.gradient_checkpointing:
            raise ValueError(
                "expected a model without gradient checkpointing (use recompute=True), found one with"
            )
        num_targets, parts = self._checked(micro_batches, bounds)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        grads_before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            loss = self._run(parts, num_targets)
            self._sum(parameters, loss)
        except BaseException:
            # Those of earlier steps must not be lost with this one.
            for parameter, before in zip(parameters, grads_before, strict=True):
                parameter.grad = before
            raise
        for parameter, before in zip(parameters, grads_before, strict=True):
            if before is not None:
                assert parameter.grad is not None, "made by `_sum` where there was none"
                parameter.grad += before
        return float(loss)

    @torch.no_grad()
    def loss(
        self, micro_batches: Sequence[Mapping[str, Tensor]], *, bounds: Sequence[int] | None = None
    ) -> float:
        """The loss of `forward_backward` without gradients, as for held-out documents."""
        num_targets, parts = self._checked(micro_batches, bounds)
        loss = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for part in parts:
            loss += _PartRun(self, *part).forward(num_targets)
        self.neighbours.finish()
        dist.all_reduce(loss, group=self.neighbours.group)
        return float(loss)

    def _checked(
        self, micro_batches: Sequence[Mapping[str, Tensor]], bounds: Sequence[int] | None
    ) -> tuple[int, list[tuple[Tensor, Tensor, int]]]:
        """The number of targets, and this rank's parts.

        If the input of one rank is wrong all of them raise, as the others would wait for it for ever.
        """
        refused: Exception | None = None
        try:
            num_targets = sum(_num_targets(batch, self.model.config.vocab_size) for batch in micro_batches)
            if num_targets == 0:
                raise ValueError("micro_batches: expected at least one target, found none")
            parts = [self._part(batch, bounds) for batch in micro_batches]
        except Exception as error:
            refused = error
        own = torch.tensor(0 if refused else _digest(micro_batches, bounds), device=self.model.device)
        found = [torch.empty_like(own) for _ in range(self.neighbours.num_ranks)]
        dist.all_gather(found, own, group=self.neighbours.group)
        if refused:
            raise refused
        if others := [rank for rank, digest in enumerate(found) if digest != own]:
            raise ValueError(
                f"micro_batches, bounds: expected the same on every rank, found others on ranks {others} of "
                "the group, or input that is refused there"
            )
        return num_targets, parts

    def _run(self, parts: Sequence[tuple[Tensor, Tensor, int]], num_targets: int) -> Tensor:
        """Run the forward and backward of this rank's parts; returns its share of the loss."""
        steps = steps_of_rank(
            self.neighbours.rank,
            num_ranks=self.neighbours.num_ranks,
            num_micro_batches=len(parts),
            max_in_flight=self.max_in_flight,
        )
        runs: dict[int, _PartRun] = {}
        loss = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for step in steps:
            if step.is_forward:
                runs[step.micro_batch] = run = _PartRun(self, *parts[step.micro_batch])
                loss += run.forward(num_targets)
            else:
                runs.pop(step.micro_batch).backward()
        self.neighbours.finish()
        return loss

    def _sum(self, parameters: Sequence[torch.nn.Parameter], loss: Tensor) -> None:
        """Sum the loss and the gradients of parameters over all ranks."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        pending = [
            dist.all_reduce(tensor, group=self.neighbours.group, async_op=True)
            for tensor in [loss, *(p.grad for p in parameters)]
        ]
        for work in pending:
            work.wait()

    def _part(self, batch: Mapping[str, Tensor], bounds: Sequence[int] | None) -> tuple[Tensor, Tensor, int]:
        """Token ids and targets of this rank's part, and the position of its first token."""
        ids, num_tokens = batch["input_ids"], batch["input_ids"].shape[1]
        num_ranks, rank = self.neighbours.num_ranks, self.neighbours.rank
        if bounds is None:
            bounds = even_bounds(num_tokens, num_ranks, multiple=self.model.config.chunk_size)
        rises = all(a < b for a, b in itertools.pairwise(bounds))
        if len(bounds) != num_ranks + 1 or bounds[0] != 0 or bounds[-1] != num_tokens or not rises:
            raise ValueError(
                f"bounds: expected {num_ranks + 1} that rise from 0 to {num_tokens} tokens, "
                f"found {list(bounds)}"
            )
        start, stop = bounds[rank], bounds[rank + 1]
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        ids, targets = (t[:, start:stop].to(self.model.device).contiguous() for t in (ids, targets))
        return ids, targets, start


class _PartRun:
    """One rank's part of one micro-batch, layer by layer."""

    def __init__(self, parallel: ContextParallel, ids: Tensor, targets: Tensor, start: int) -> None:
        self._neighbours = parallel.neighbours
        self._model, self._recompute = parallel.model, parallel.recompute
        self._ids, self._targets, self._start = ids, targets, start
        self._segments: list[Segment] = []
        # What this part gets and passes on, by layer.
        self._before, self._after = (list(self._specs(n)) for n in (start, start + ids.shape[1]))

    def forward(self, num_targets: int) -> Tensor:
        """This part's share of the loss. With gradients also runs the backward of the output layer, so that
        the large logits need not be kept."""
        layout = SequenceLayout(num_past=self._start, num_new=self._ids.shape[1])
        self._embedded = hidden = self._model.model.embed_tokens(self._ids)
        for i, block in enumerate(self._model.model.layers):
            state = {} if self._neighbours.is_first else self._neighbours.receive(self._before[i], FORTH)
            segment = Segment(block, i, self._model.config, hidden, state, layout, recompute=self._recompute)
            hidden, state = segment.forward()
            if torch.is_grad_enabled():
                self._segments.append(segment)
            if not self._neighbours.is_last:
                self._neighbours.send(state, self._after[i], FORTH)
        top = hidden.detach().requires_grad_()
        is_target, head = self._targets != IGNORED, self._model.lm_head
        normed, targets = self._model.model.norm(top)[is_target], self._targets[is_target]
        if can_be_pieced(head, self._model.loss_function):
            loss = loss_in_pieces(normed, head.weight, targets, num_targets)
        else:
            loss = self._model.loss_function(
                head(normed),
                None,
                self._model.config.vocab_size,
                num_items_in_batch=num_targets,
                shift_labels=targets,
            )
        if loss.requires_grad:
            with torch.autocast(top.device.type, enabled=False):
                loss.backward()
        self._grad = top.grad
        return loss.detach()

    def backward(self) -> None:
        """Run the backward of all layers."""
        grad = self._grad
        layers = list(zip(self._segments, self._before, self._after, strict=True))
        for segment, before, after in reversed(layers):
            has_next = not self._neighbours.is_last
            grads = self._neighbours.receive(floating(after), BACK) if has_next else {}
            grad, grads = segment.backward(grad, grads)
            if not self._neighbours.is_first:
                self._neighbours.send(grads, floating(before), BACK)
        # Embeddings may be frozen.
        if self._embedded.requires_grad:
            self._embedded.backward(grad)

    def _specs(self, num_tokens: int) -> Iterator[StateSpec]:
        """Shapes and dtypes of each layer's state after this many tokens, known to sender and receiver."""
        dtype, kind = self._model.dtype, self._model.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        for block in self._model.model.layers:
            yield of_rows(block.mixer.state_spec(num_tokens, dtype), len(self._ids))


def even_bounds(num_tokens: int, num_ranks: int, *, multiple: int = 1) -> list[int]:
    """First token of each rank's part, then T, for parts of nearly equal length.

    Args:
        num_tokens: T, at least `num_ranks`.
        num_ranks: R.
        multiple: Begin parts at multiples of this if there are enough tokens. At the end of a chunk no token
            is pending; pending tokens would have to be read again by the next rank.

    Example:
        >>> even_bounds(1000, 3, multiple=64), even_bounds(10, 3, multiple=64)
        ([0, 320, 640, 1000], [0, 3, 6, 10])
    """
    if num_tokens < num_ranks:
        raise ValueError(f"expected at least one token per rank, {num_ranks}, found {num_tokens}")
    size = multiple if num_tokens >= num_ranks * multiple else 1
    return [rank * num_tokens // num_ranks // size * size for rank in range(num_ranks)] + [num_tokens]


def _digest(micro_batches: Sequence[Mapping[str, Tensor]], bounds: Sequence[int] | None) -> int:
    """A number of 63 bits that differs if token ids, labels or bounds do."""
    digest = hashlib.blake2b(repr(None if bounds is None else list(bounds)).encode(), digest_size=8)
    for batch in micro_batches:
        for name in ("input_ids", "labels"):
            tensor = batch[name].to("cpu", torch.int64).contiguous()
            digest.update(repr(tensor.shape).encode() + tensor.numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def _num_targets(batch: Mapping[str, Tensor], vocab_size: int) -> int:
    """Number of targets of a micro-batch; ValueError for missing or unknown tensors, wrong shapes or ids,
    padding or packed rows."""
    if unknown := sorted(set(batch) - set(NAMES)):
        raise ValueError(f"micro_batches: expected only {', '.join(NAMES)}, found {', '.join(unknown)}")
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor):
            raise ValueError(f"micro_batches: expected a tensor {name} in each, found {sorted(batch)}")
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.dim() != 2 or labels.shape != ids.shape:
        raise ValueError(
            "expected input_ids [B, T] and labels of the same shape, "
            f"found {list(ids.shape)} and {list(labels.shape)}"
        )
    if (mask := batch.get("attention_mask")) is not None and (num_padded := int((mask == 0).sum())):
        raise ValueError(
            f"attention_mask: expected no padding (micro-batches may differ in length), found {num_padded} "
            "tokens of it"
        )
    if (positions := batch.get("position_ids")) is not None:
        straight = torch.arange(ids.shape[1], device=positions.device)
        if not all(torch.equal(row.long(), straight) for row in positions):
            raise ValueError(
                f"position_ids: expected 0 to {ids.shape[1] - 1} in each row, as rows are not packed here, "
                "found others"
            )
    targets = labels[:, 1:][labels[:, 1:] != IGNORED]
    check_ids("input_ids", ids, vocab_size)
    check_ids("labels", targets, vocab_size)
    return len(targets)

"""Messages between neighbouring ranks: the state of a layer forward, the gradient of that state back.

The receiver knows all shapes (`Mixer.state_spec`). So a message contains only the bytes of the tensors, and
its length depends on the model, not on the document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ovq.layers.memory import StateSpec, num_bytes

FORTH, BACK = 1, -1
"""The ways of a message: a state to the next rank, or its gradient to the previous one."""


def floating(spec: StateSpec) -> StateSpec:
    """The entries of floating-point tensors, which have gradients.

    Example:
        >>> list(floating({"count": ((2, 3), torch.int64), "keys": ((5,), torch.bfloat16)}))
        ['keys']
    """
    return {name: entry for name, entry in spec.items() if entry[1].is_floating_point}


def pack(tensors: Mapping[str, Tensor], spec: StateSpec, device: torch.device | str = "cpu") -> Tensor:
    """The bytes of the tensors that `spec` names, in its order: `[num_bytes]` uint8 on that device."""
    for name, (shape, dtype) in spec.items():
        found = (tuple(tensors[name].shape), tensors[name].dtype)
        assert found == (shape, dtype), f"{name}: expected {shape} in {dtype}, found {found}"
    flat = (tensors[name].detach().to(device).contiguous().flatten() for name in spec)
    return torch.cat([t.view(torch.uint8) for t in flat])


def unpack(message: Tensor, spec: StateSpec) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    tensors, start = {}, 0
    for name, (shape, dtype) in spec.items():
        stop = start + math.prod(shape) * dtype.itemsize
        # Copied, because a view in another dtype needs an aligned address.
        tensors[name] = message[start:stop].clone().view(dtype).view(shape)
        start = stop
    return tensors


class Neighbours:
    """The ranks before and after this one in `group`; None for all ranks.

    Each way has a process group of its own. Some backends run the requests between two ranks
    of a group in order; a state that waits to be received would then block a gradient that must arrive first.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self.first = self._ranks[0]
        self.rank, self.num_ranks = self._ranks.index(dist.get_rank()), len(self._ranks)
        self.is_first, self.is_last = self.rank == 0, self.rank == self.num_ranks - 1
        self.group, self._device = group, device
        self._pad_num_groups()
        self._groups = {
            way: dist.new_group(self._ranks, use_local_synchronization=True) for way in (FORTH, BACK)
        }
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self.num_bytes_sent = 0

    def _pad_num_groups(self) -> None:
        """Give all ranks equally many process groups, by groups of one rank for those that have fewer.

        PyTorch names a group that only its own ranks make after the number of groups that a rank has. If
        these numbers differ, as where some ranks are also in a group for logging, ranks wait for ever.
        """
        # Private to PyTorch: where it is gone, nothing is padded.
        own = len(getattr(dist.distributed_c10d._world, "pg_names", ()))
        most = torch.tensor(own, device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        for _ in range(int(most) - own):
            dist.new_group([self._ranks[self.rank]], use_local_synchronization=True)

    def send(self, tensors: Mapping[str, Tensor], spec: StateSpec, way: int) -> None:
        """Send to the neighbour that way, without waiting for it."""
        message = pack(tensors, spec, self._device)
        # The bytes must stay in memory until they have been sent.
        self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
        work = dist.isend(message, self._ranks[self.rank + way], self._groups[way])
        assert work is not None, "None is for ranks outside of the group"
        self._sent.append((work, message))
        self.num_bytes_sent += len(message)

    def receive(self, spec: StateSpec, way: int) -> dict[str, Tensor]:
        """Wait for a message on its way from the other neighbour."""
        message = torch.empty(num_bytes(spec), dtype=torch.uint8, device=self._device)
        dist.recv(message, self._ranks[self.rank - way], self._groups[way])
        return unpack(message, spec)

    def finish(self) -> None:
        """Wait until all sent messages have been received."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

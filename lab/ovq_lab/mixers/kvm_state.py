"""State of a `"kvm"` layer: slots for tokens that have left its window, and the window of whole chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.layers.memory import TensorMemory
from ovq.ops.schedule import scheduled_slots

#: Schedules of the number of slots.
KVM_GROWTHS = ("immediate", "plateau", "sqrt")
#: As in the published configuration that is nearest to ours (`kvm_swa_saturate1024_wd.yaml`).
KVM_GROWTH = "plateau"
KVM_CHUNK_SIZE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVMSchedule:
    """Number of tokens of a row that have left the window, and number of slots for them.

    Both depend only on the number of tokens read, so they are the same however a row is cut into calls.
    Chunks count from the first token of the row, and the window consists of the last W. The newest may be
    incomplete; once its first token is read, the oldest chunk leaves the window as a whole.

    Attributes:
        num_slots: N, the largest number of slots per head; at least C.
        chunk_size: C, tokens per chunk.
        window_chunks: W, chunks in the window.
        growth: `"immediate"`, N slots as soon as there are tokens for them; `"plateau"`, floor(t N / (t + N))
            after t tokens; `"sqrt"`, floor(16 sqrt(t)), at most N.

    Example:
        >>> schedule = KVMSchedule(num_slots=7, chunk_size=4, window_chunks=2, growth="immediate")
        >>> [(schedule.num_left(t), schedule.num_kept(t), schedule.num_open(t)) for t in (8, 9, 12, 13)]
        [(0, 8, 0), (4, 5, 4), (4, 8, 4), (8, 5, 7)]
    """

    num_slots: int
    chunk_size: int
    window_chunks: int
    growth: str

    @classmethod
    def of(cls, settings: Any) -> KVMSchedule:
        """The schedule of a layer, or of the config of a model."""
        size = settings.kvm_chunk_size
        schedule = cls(
            num_slots=settings.num_slots,
            # The first chunk to leave opens a slot per token, so that more than N would not fit.
            chunk_size=min(KVM_CHUNK_SIZE, settings.num_slots) if size is None else size,
            window_chunks=settings.kvm_window_chunks,
            growth=settings.kvm_growth,
        )
        if schedule.window_chunks < 1:
            raise ValueError(f"kvm_window_chunks: expected at least 1, found {schedule.window_chunks}")
        if schedule.growth not in KVM_GROWTHS:
            raise ValueError(f"kvm_growth: expected one of {KVM_GROWTHS}, found {schedule.growth!r}")
        if not 0 <= settings.kvm_sinks < schedule.chunk_size <= schedule.num_slots:
            raise ValueError(
                "expected 0 <= kvm_sinks < kvm_chunk_size <= num_slots, found "
                f"kvm_sinks={settings.kvm_sinks}, kvm_chunk_size={schedule.chunk_size}, "
                f"num_slots={schedule.num_slots}"
            )
        return schedule

    @property
    def window_size(self) -> int:
        """The largest number of tokens in the window, W C."""
        return self.window_chunks * self.chunk_size

    def num_left(self, num_tokens: int) -> int:
        """Number of tokens, of the first `num_tokens`, that have left the window."""
        num_chunks = -(-num_tokens // self.chunk_size)
        return max(0, num_chunks - self.window_chunks) * self.chunk_size

    def num_kept(self, num_tokens: int) -> int:
        """Number of tokens, of the first `num_tokens`, that are in the window."""
        return num_tokens - self.num_left(num_tokens)

    def num_open(self, num_tokens: int) -> int:
        """Number of slots in use per head after `num_tokens` tokens."""
        num_left = self.num_left(num_tokens)
        if num_left <= self.chunk_size:
            # The first chunk opens a slot per token, whatever the schedule.
            return num_left
        # The schedule is evaluated at the tokens read when the last chunk left. No schedule asks for more new
        # slots than a chunk has tokens, so earlier chunks need not be simulated.
        num_read = num_left + self.window_size - self.chunk_size
        if self.growth == "sqrt":
            wanted = min(math.isqrt(256 * num_read), self.num_slots)
        else:
            wanted = scheduled_slots(num_read, num_slots=self.num_slots, growth=self.growth)
        return max(self.chunk_size, min(wanted, num_left))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVMMemory(TensorMemory):
    """Memory of `KVMAttention`: slots and a window that are as long as the longest row needs.

    Rows that need less are padded with zeros at the end. Keys are stored before rotation, so that nothing
    changes when a row moves. `"num_seen"`, from which all sizes follow, stays on the CPU.

    Example:
        >>> schedule = KVMSchedule(num_slots=7, chunk_size=4, window_chunks=2, growth="immediate")
        >>> KVMMemory(schedule=schedule).kind
        'the slots of KVM and a window of 2 chunks of 4'
    """

    kind: str = dataclasses.field(init=False)
    schedule: KVMSchedule = dataclasses.field(compare=False)

    def __post_init__(self) -> None:
        """Describe the window in `kind`, by which memories are compared; numbers of slots may differ."""
        window = f"a window of {self.schedule.window_chunks} chunks of {self.schedule.chunk_size}"
        object.__setattr__(self, "kind", f"the slots of KVM and {window}")

    def restored(self, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> dict[str, Tensor]:
        """See `Memory.restored`."""
        return self.to(dict(tensors), device) if device is not None else dict(tensors)

    def to(self, state: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """See `Memory.to`."""
        return super().to(state, device) | {"num_seen": state["num_seen"].cpu()}

    def select(self, state: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """See `Memory.select`; drops slots and columns that only other rows needed."""
        return self.trimmed(super().select(state, rows))

    def concatenate(
        self, states: Sequence[dict[str, Tensor]], num_missing: Sequence[int]
    ) -> dict[str, Tensor]:
        """See `Memory.concatenate`."""
        joined = {"num_seen": torch.cat([state["num_seen"] for state in states])}
        for name in states[0].keys() - joined.keys():
            parts = [state[name] for state in states]
            longest = max(t.shape[2] for t in parts)
            joined[name] = torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in parts])
        return {name: joined[name] for name in states[0]}

    def trimmed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state without the slots and columns that none of its rows needs."""
        num_seen = state["num_seen"].tolist()
        num_open = max((self.schedule.num_open(n) for n in num_seen), default=0)
        num_kept = max((self.schedule.num_kept(n) for n in num_seen), default=0)
        sizes = dict.fromkeys(SLOT_TENSORS, num_open) | dict.fromkeys(WINDOW_TENSORS, num_kept)
        # Copies, because a view would keep the whole tensor alive.
        cut = {name: state[name][:, :, :n].clone() for name, n in sizes.items() if state[name].shape[2] > n}
        return state | cut


#: Names of the state's tensors with one entry per slot, and of those with one entry per token of the window.
SLOT_TENSORS = ("key_sum", "value_sum", "value_length")
WINDOW_TENSORS = ("keys", "values", "gate")

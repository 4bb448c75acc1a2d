"""The OVQ attention op: `ovq_attention`, its state, and its backends.

`attention.py` is the entry point, `naive.py` the reference to read first, and `backends/` holds the fast
implementations.
"""

from ovq.ops.assignments import SlotAssignments, slot_assignments
from ovq.ops.attention import ovq_attention
from ovq.ops.backends.cpu.kernels import cpu_kernels
from ovq.ops.dispatch import backend_used
from ovq.ops.schedule import scheduled_slots, slots_by_chunk
from ovq.ops.state import OVQState

__all__ = [
    "OVQState",
    "SlotAssignments",
    "backend_used",
    "cpu_kernels",
    "ovq_attention",
    "scheduled_slots",
    "slot_assignments",
    "slots_by_chunk",
]

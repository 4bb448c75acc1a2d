"""Memories of equal bytes against exact attention, without training: streams, memories, and their errors."""

from ovq.research.fidelity.measure import LENGTHS, fidelity_rows

__all__ = ["LENGTHS", "fidelity_rows"]

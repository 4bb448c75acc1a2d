"""Memories of equal bytes compared with exact attention, without training: streams, memories, and errors."""

from ovq_lab.figures.fidelity.measure import fidelity_rows

__all__ = ["fidelity_rows"]

"""A document split over processes, each of which passes its state of constant size to the next."""

from ovq.parallel.context import ContextParallel, even_bounds

__all__ = ["ContextParallel", "even_bounds"]

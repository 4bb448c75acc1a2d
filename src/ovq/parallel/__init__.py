"""Context parallelism: each process reads a part of a document and passes its constant-size state on."""

from ovq.parallel.context import ContextParallel, even_bounds

__all__ = ["ContextParallel", "even_bounds"]

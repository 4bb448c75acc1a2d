"""OVQ attention on a CPU in compiled code: the inner loop of the `torch` backend where a C++ compiler is at hand."""

from ovq.ops.cpu.kernels import can_run, chunk_backward, chunk_forward, cpu_kernels

__all__ = ["can_run", "chunk_backward", "chunk_forward", "cpu_kernels"]

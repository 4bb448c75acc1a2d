"""The inner loop of the `torch` backend in compiled code, for a CPU with a C++ compiler at hand."""

from ovq.ops.cpu.kernels import CompiledAttention, can_run, cpu_kernels

__all__ = ["CompiledAttention", "can_run", "cpu_kernels"]

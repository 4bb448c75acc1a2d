"""What takes the time on a CPU, in compiled code where there is a C++ compiler.

That is the inner loop of the `torch` backend, and the short convolution.
"""

from ovq.ops.cpu.build import MissingKernelsWarning
from ovq.ops.cpu.convolution import CompiledConvolution, can_convolve
from ovq.ops.cpu.kernels import CompiledAttention, can_run, cpu_kernels

__all__ = [
    "CompiledAttention",
    "CompiledConvolution",
    "MissingKernelsWarning",
    "can_convolve",
    "can_run",
    "cpu_kernels",
]

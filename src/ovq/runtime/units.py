"""Human-readable numbers, and numbers in what PyTorch says."""

import math
import re


def format_bytes(num_bytes: float) -> str:
    """A number of bytes in binary units, for display.

    Example:
        >>> format_bytes(900), format_bytes(2048), format_bytes(3.5 * 2**20)
        ('900 B', '2.0 KiB', '3.5 MiB')
    """
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    power = min(3, int(math.log2(num_bytes)) // 10)
    return f"{num_bytes / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def memory_refused(error: Exception) -> str | None:
    """The size that PyTorch could not get, if that is the error, which on a CPU has no class of its own.

    Example:
        >>> memory_refused(RuntimeError("can't allocate memory: you tried to allocate 64 bytes. Error 12"))
        '64 bytes'
    """
    size = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return None if size is None else size[1]

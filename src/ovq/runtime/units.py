"""Human-readable numbers."""

import math


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

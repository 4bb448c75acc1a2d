"""A setting of the C library's memory allocator that speeds up training on a CPU."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, see `man 3 mallopt`.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors instead of returning it to the system.

    A training step frees and allocates the same tensors of a few MB again and again. glibc returns such
    memory at once, and the system clears every page before it hands it out again. Measured on the
    `recall-ovq` recipe at 256 tokens, one thread: 0.166 s per step, against 0.124 s with this setting. The
    process then stays as large as its largest step.

    Returns:
        Whether it was set; False where the C library is not glibc.

    Example:
        >>> keep_freed_memory() == (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"))
        True
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # 32 MiB is the largest threshold that glibc accepts; larger blocks are still mapped and unmapped one by
    # one.
    settings = ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    # All are set, even if one of them fails.
    were_taken = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(were_taken)

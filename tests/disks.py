"""Disks that are full."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(limit):
    """No file of this process grows beyond `limit` bytes: a write fails in the middle, as on a full disk.

    Python ignores the signal that comes with it; processes started here are ended by it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

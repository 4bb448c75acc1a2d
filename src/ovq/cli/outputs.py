"""Standard input, output and error as a command finds them: open, closed, or a pipe that nobody reads."""

from __future__ import annotations

import contextlib
import os
import select
import sys


def open_closed_streams() -> None:
    """Put the null device in the place of streams that the caller has closed (`ovq ... >&-`).

    Python has None there, and the next file that is opened would get the number of the stream, and with it
    whatever a library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (open as long as the process)


class Readers:
    """Whether those who read what this process prints are still there.

    It looks at copies of standard output and error, as rich points output at the null device when it finds a
    pipe broken.
    """

    def __init__(self) -> None:
        self._copies = []
        for number in (1, 2):
            with contextlib.suppress(OSError):
                self._copies.append(os.dup(number))

    def is_one_gone(self) -> bool:
        """Whether a pipe of ours has no reader left. Other pipes break too, those of worker processes say."""
        if not hasattr(select, "poll"):
            return True
        poll = select.poll()
        for copy in self._copies:
            poll.register(copy, 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))

    def close(self) -> None:
        """Let go of the copies."""
        for copy in self._copies:
            os.close(copy)


def drop_unwritten() -> None:
    """Throw away what cannot be written: Python would try once more at its exit, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

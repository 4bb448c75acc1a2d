"""Robust standard streams: closed streams, broken pipes, and any encoding."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys


def replace_closed_streams() -> None:
    """Replace streams that the caller has closed (`ovq ... >&-`) by the null device.

    Python sets them to None. The next opened file would get the stream's descriptor, and with it whatever a
    library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (open as long as the process)


def accept_any_text() -> None:
    """Read text as UTF-8, and print any text, whatever encoding the system prefers (`LC_ALL=C`).

    Characters that the output's encoding lacks are printed as escapes (`\\xfc`), instead of an error in the
    middle of a text. Undecodable bytes of file names are printed as they are.
    """
    codecs.register_error(_ERRORS, _bytes_or_escapes)
    # The streams may have been replaced by objects without an encoding.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A stream that cannot be written to raises its error later, when it is used.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors=_ERRORS)


_ERRORS = "ovq_bytes_or_escapes"


def _bytes_or_escapes(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of codecs for characters that cannot be encoded: the original bytes, or escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


class OutputPipes:
    """Detects whether a reader of this process's output has closed its pipe.

    It checks copies of standard output and error, because rich redirects output to the null device when it
    finds a broken pipe.
    """

    def __init__(self) -> None:
        self._copies = []
        for number in (1, 2):
            with contextlib.suppress(OSError):
                self._copies.append(os.dup(number))

    def has_lost_reader(self) -> bool:
        """Whether standard output or error is a pipe without a reader. Other pipes can break too, for example
        those of workers."""
        if not hasattr(select, "poll"):
            return True
        poll = select.poll()
        for copy in self._copies:
            poll.register(copy, 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))

    def close(self) -> None:
        """Close the copies."""
        for copy in self._copies:
            os.close(copy)


def discard_unwritten() -> None:
    """Discard output that cannot be written; otherwise Python would try again at exit and print an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

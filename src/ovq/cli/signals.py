"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed.

Each is raised as an exception, so that workers are ended and temporary files removed; by default, SIGTERM and
SIGHUP end a Python program where it stands.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

# Those who end a program often send a signal twice, to it and to its group: this is not impatience.
_SECONDS_OF_ONE_SIGNAL = 1.0
_SECONDS_BEFORE_ANOTHER_TRY = 0.05


class Ended(SystemExit):
    """A signal other than that of Ctrl-C has come. The exit code is the one that a shell reports for it.

    Attributes:
        name: Of the signal.

    Example:
        >>> Ended(signal.SIGTERM).code, Ended(signal.SIGTERM).name
        (143, 'SIGTERM')
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise signals in the block as `KeyboardInterrupt` or `Ended`; those that are ignored or handled
    otherwise (`nohup`, a program that calls `main`) are left so.

    An exception that is raised inside a destructor gets no further than that. This happens above all while
    PyTorch is imported; it is then raised again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        # Python lets no other thread handle signals.
        yield
        return
    hook = sys.unraisablehook
    # There is no SIGHUP on Windows.
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _Handler())

    def again(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            _raise_soon(signal.SIGINT)
        elif isinstance(error, Ended):
            number = signal.Signals[error.name]
            signal.signal(number, _Handler())
            _raise_soon(number)
        else:
            hook(unraisable)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C in the block, in place of raising it; yields a function that says whether it has come.

    Example:
        >>> with noted() as has_come:
        ...     signal.raise_signal(signal.SIGINT)
        ...     has_come()
        True
    """
    came = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    # As in `raised`.
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield came.is_set
        return
    signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)


class _Handler:
    """Raises `Ended` for a signal, and not again for what is the same signal."""

    def __init__(self) -> None:
        self._last = -_SECONDS_OF_ONE_SIGNAL

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_OF_ONE_SIGNAL:
            self._last = now
            raise Ended(number)


def _raise_soon(number: int) -> None:
    main = threading.main_thread().ident
    assert main is not None
    # Whatever the main thread waits for then. On Windows it waits until it runs again.
    send = partial(signal.pthread_kill, main) if hasattr(signal, "pthread_kill") else signal.raise_signal
    timer = threading.Timer(_SECONDS_BEFORE_ANOTHER_TRY, send, (number,))
    timer.daemon = True
    timer.start()

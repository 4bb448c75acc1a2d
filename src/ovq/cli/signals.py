"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal.

Each is raised as an exception, so that workers are ended and temporary files removed; by default, SIGTERM and
SIGHUP end a Python program without any cleanup.
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

# Programs that end another often send a signal twice, to it and to its group, which counts as one signal.
_SECONDS_OF_ONE_SIGNAL = 1.0
_SECONDS_BEFORE_ANOTHER_TRY = 0.05


class EndedBySignal(SystemExit):
    """A signal other than Ctrl-C has come. The exit code is the one that a shell reports for it.

    Attributes:
        name: Name of the signal.

    Example:
        >>> EndedBySignal(signal.SIGTERM).code, EndedBySignal(signal.SIGTERM).name
        (143, 'SIGTERM')
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Context manager that raises signals as `KeyboardInterrupt` or `EndedBySignal`. Signals that are ignored
    or have another handler (`nohup`, a program that calls `main`) stay so.

    Python does not propagate an exception raised inside a destructor, which happens mostly while PyTorch is
    imported; such a signal is raised again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can handle signals.
        yield
        return
    hook = sys.unraisablehook
    # There is no SIGHUP on Windows.
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _Handler())

    def raise_again(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            _raise_soon(signal.SIGINT)
        elif isinstance(error, EndedBySignal):
            number = signal.Signals[error.name]
            signal.signal(number, _Handler())
            _raise_soon(number)
        else:
            hook(unraisable)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Context manager that catches Ctrl-C without raising; yields a function that tells whether it has come.

    Example:
        >>> with interrupt_flag() as has_come:
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
    """Raises `EndedBySignal` for a signal, but not again for its repetition within a second."""

    def __init__(self) -> None:
        self._last = -_SECONDS_OF_ONE_SIGNAL

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_OF_ONE_SIGNAL:
            self._last = now
            raise EndedBySignal(number)


def _raise_soon(number: int) -> None:
    main = threading.main_thread().ident
    assert main is not None
    # Interrupts whatever the main thread waits for; on Windows, only takes effect when it runs again.
    send = partial(signal.pthread_kill, main) if hasattr(signal, "pthread_kill") else signal.raise_signal
    timer = threading.Timer(_SECONDS_BEFORE_ANOTHER_TRY, send, (number,))
    timer.daemon = True
    timer.start()

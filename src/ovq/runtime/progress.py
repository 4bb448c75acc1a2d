"""Progress on standard error: bars on a terminal, occasional lines in a log file."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ovq.runtime.verbosity import is_quiet

_SECONDS_BETWEEN_LINES = 10.0


class AnyWork(Protocol):
    """One piece of work, with any display."""

    def update(self, done: int, *, note: str = "") -> None:
        """Report that `done` units are finished, with a note on the state of the work."""


class WorkReporter(Protocol):
    """Reporter for evaluations: pieces of work only."""

    def start(self, label: str, *, total: int) -> AnyWork:
        """Begin a piece of work of `total` units."""


class AnyReporter(WorkReporter, Protocol):
    """Reporter for training: a `Reporter`, or that of a worker process."""

    def say(self, text: str) -> None:
        """Print a line."""


class Reporter:
    """Shows the progress of pieces of work; use it as a context manager.

    Standard output is left to results, so that they can be piped. If standard error is not a terminal, bars
    would fill a log with control characters; a line is then printed at the start and the end of each piece of
    work, and every ten seconds in between.

    Args:
        console: Where to report; None for standard error, or nowhere after `set_quiet`.
        is_long: Replace a full bar by a line, for more pieces of work than fit on a screen.
    """

    def __init__(self, console: Console | None = None, *, is_long: bool = False) -> None:
        # In paths, [/x] is no style and :x: no emoji.
        self.console = console or Console(stderr=True, quiet=is_quiet(), markup=False, emoji=False)
        self._is_long = is_long
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Reporter:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop drawing, which restores the terminal's cursor."""
        # Up to rich 14, a progress display that was never drawn ends with an empty line.
        if not self._progress.disable:
            self._progress.stop()

    def start(self, label: str, *, total: int) -> Work:
        """Begin a piece of work of `total` units."""
        return Work(self._progress, label, total, is_line_at_end=self._is_long)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        # A path broken over two lines could not be copied.
        self.console.print(text, highlight=False, soft_wrap=True)


class Work:
    """One piece of work of a `Reporter`; made by `Reporter.start`."""

    def __init__(self, progress: Progress, label: str, total: int, *, is_line_at_end: bool) -> None:
        self._progress = progress
        self._label = label
        self._total = total
        self._is_line_at_end = is_line_at_end
        self._task: TaskID = progress.add_task(label, total=total, note="")
        self._started = self._last_line = time.monotonic()
        if progress.disable:
            self._print_line(0, "")

    def update(self, done: int, *, note: str = "") -> None:
        """Report that `done` units are finished, with a note on the state of the work."""
        self._progress.update(self._task, completed=done, note=note)
        is_full = done >= self._total
        if self._progress.disable:
            if is_full or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._print_line(done, note)
        elif is_full and self._is_line_at_end:
            self._progress.update(self._task, visible=False)
            self._print_line(done, note)

    def _print_line(self, done: int, note: str) -> None:
        self._last_line = time.monotonic()
        elapsed = f"{self._last_line - self._started:.0f} s"
        text = ", ".join(part for part in (note, elapsed) if part)
        self._progress.console.print(f"{self._label}: {done}/{self._total} ({text})", highlight=False)

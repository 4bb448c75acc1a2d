"""What tests of finding and making the kernels share."""

import warnings

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.build import MissingKernelsWarning


def restart(monkeypatch):
    """From here on all is as in a new process."""
    build._attempt.cache_clear()
    monkeypatch.setattr(build, "_is_warned", False)


def warned(function):
    """What the function returns, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        returned = function()
    return returned, [str(w.message) for w in caught if w.category is MissingKernelsWarning]


class Compiler:
    """A command that makes the kernels at once, out of ones made before, and writes down its calls."""

    def __init__(self, folder, body):
        folder.mkdir()
        self.path, self.log = folder / "c++", folder / "calls"
        # The last argument is the file to make.
        self.path.write_text(f'#!/bin/sh\necho "$TMPDIR" >> {self.log}\nfor last; do :; done\n{body}\n')
        self.path.chmod(0o755)

    @property
    def calls(self):
        """The folders for temporary files it was called with."""
        return self.log.read_text().splitlines() if self.log.exists() else []

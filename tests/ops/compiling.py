"""What tests of finding and making the kernels share."""

from ovq.ops.backends.cpu import build


def restart(monkeypatch):
    """From here on all is as in a new process."""
    build._attempt.cache_clear()
    monkeypatch.setattr(build, "_is_warned", False)

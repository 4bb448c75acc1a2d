"""Settings shared by all tests."""

import functools
import os
import signal

import hypothesis
import pytest
import torch

from ovq.ops.backends.cpu import build

# One thread a worker: two pytest workers on two cores would otherwise wait for each other's threads.
torch.set_num_threads(1)

# What a shell starts in the background ignores Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Derandomized, so that a run is repeatable; no deadline, since machines are noisy.
hypothesis.settings.register_profile("ovq", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ovq")


@pytest.fixture(autouse=True)
def as_loud_as_before():
    """Commands that are called within a test with `-q` or `-v` leave that to the processes of later ones."""
    names = ("OVQ_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session", autouse=True)
def commands_made_once():
    """Typer would make them anew for each call, which takes longer than most calls do."""
    import ovq.cli

    with pytest.MonkeyPatch.context() as patch:
        made = functools.cache(lambda has_laboratory, make=ovq.cli._program: make())
        patch.setattr(ovq.cli, "_program", lambda: made(ovq.cli.has_laboratory()))
        yield


@pytest.fixture(scope="session", autouse=True)
def small_pictures():
    """Tests look at figures, and few at how sharp their files are, which takes most of the time."""
    from ovq_lab.plots import panels

    small = {"_DPI": 30, "_shrink": lambda path: None}
    full = {name: getattr(panels, name) for name in small}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(panels, name, value)
        yield full


@pytest.fixture
def full_pictures(small_pictures, monkeypatch):
    for name, value in small_pictures.items():
        monkeypatch.setattr(f"ovq_lab.plots.panels.{name}", value)


@pytest.fixture
def drawn(monkeypatch):
    """The figures of matplotlib that are saved, in their order."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.fixture
def runs(monkeypatch):
    """Names of the kernels over whole calls that have run."""
    names, load = [], build.load

    class Library:
        def __init__(self):
            self.loaded = load()

        def __getattr__(self, name):
            names.extend([name] if name in ("ovq_forward", "ovq_backward") else [])
            return getattr(self.loaded, name)

    monkeypatch.setattr(build, "load", Library)
    return names

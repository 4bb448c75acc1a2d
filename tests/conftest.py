"""Settings shared by all tests."""

import hypothesis
import pytest
import torch

# One thread a worker: two pytest workers on two cores would otherwise wait for each other's threads.
torch.set_num_threads(1)

# Derandomized, so that a run is repeatable; no deadline, since machines are noisy.
hypothesis.settings.register_profile("ovq", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ovq")


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

"""Modules of the laboratory under the names that they had in the library."""

import importlib
import pickle
import runpy
import sys

import pytest

from ovq import moved
from ovq_lab.mixers import MIXERS, VQAttention
from ovq_lab.train.config import TrainArgs


def imported_by_old_names():
    return [name for name in sys.modules if f"{name}.".startswith(tuple(f"{old}." for old in moved.MOVED))]


@pytest.fixture(autouse=True)
def _nothing_imported():
    """Before a test and after it, no module has been imported by an old name."""
    for name in imported_by_old_names():
        del sys.modules[name]
    yield
    for name in imported_by_old_names():
        del sys.modules[name]


@pytest.mark.parametrize("old", moved.MOVED)
@pytest.mark.filterwarnings("ignore:ovq.research is now")
def test_an_old_name_is_the_new_module_and_warns(old):
    new = importlib.import_module(moved.MOVED[old])
    with pytest.warns(FutureWarning, match=f"^{old} is now {moved.MOVED[old]}$") as caught:
        assert importlib.import_module(old) is new
    assert caught[-1].filename == importlib.__file__
    assert new.__name__ == new.__spec__.name == moved.MOVED[old]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ovq.tasks.recall", "ovq_lab.tasks.recall"),
        ("ovq.research.bench.suite", "ovq_lab.bench.suite"),
        ("ovq.research.reproduce.figures", "ovq_lab.figures.figures"),
    ],
)
def test_modules_of_a_package_are_found_and_the_package_alone_warns(old, new):
    with pytest.warns(FutureWarning) as caught:
        assert importlib.import_module(old) is importlib.import_module(new)
    assert [str(each.message).partition(" ")[0] for each in caught] == [
        name
        for name in ("ovq.research", "ovq.research.reproduce", "ovq.tasks")
        if f"{old}.".startswith(f"{name}.")
    ]
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{old}s'"):
        importlib.import_module(f"{old}s")


def test_what_an_earlier_version_pickled_has_todays_class():
    saved = pickle.dumps(TrainArgs(steps=7), protocol=0).replace(b"ovq_lab.train", b"ovq.train")
    with pytest.warns(FutureWarning, match=r"ovq\.train is now ovq_lab\.train"):
        found = pickle.loads(saved)
    assert type(found) is TrainArgs
    assert found == TrainArgs(steps=7)


def test_mixers_are_still_in_layers():
    layers = importlib.import_module("ovq.layers")
    vars(layers).pop("VQAttention", None)
    with pytest.warns(FutureWarning) as caught:
        from ovq.layers import VQAttention as Old
    assert Old is VQAttention is MIXERS["vq"]
    assert [str(each.message) for each in caught] == [
        "ovq.layers.VQAttention is now ovq_lab.mixers.VQAttention"
    ]
    assert caught[0].filename == __file__
    del layers.VQAttention
    with pytest.raises(AttributeError, match=r"module 'ovq\.layers' has no attribute 'Mamba3'"):
        layers.Mamba3  # noqa: B018


def test_programs_run_by_old_names(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peak"])
    with pytest.warns(FutureWarning), pytest.raises(IndexError):
        runpy.run_module("ovq.research.bench.peak", run_name="__main__")


@pytest.mark.parametrize("name", ["ovq.tasks", "ovq.layers.raven"])
def test_without_the_laboratory_the_error_names_it(name, monkeypatch):
    monkeypatch.setattr("ovq.plugins.has_laboratory", lambda: False)
    with pytest.raises(
        ModuleNotFoundError, match=rf"{name}: expected the package ovq-lab, .* install \./lab"
    ):
        importlib.import_module(name)

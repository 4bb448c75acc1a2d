"""Tasks and mixers of others: registered by a module, or offered by an installed package."""

import dataclasses
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ovq import plugins
from ovq.cli import main
from ovq.hf import OVQConfig
from ovq.layers import Mamba2, mixer_class, register_mixer
from ovq_lab.figures import presets
from ovq_lab.figures.results import load_results
from ovq_lab.mixers import MIXERS, LinearAttention
from ovq_lab.tasks import TASKS, RecallTask, TextTask, register_task, task_class
from ovq_lab.train.config import RunConfig
from tests.research.reproduce.common import TINY as TINY_PRESET

# The example of the documentation.
TRAINING = (Path(__file__).parent.parent / "docs" / "use" / "training.md").read_text()
[MODULE] = re.findall(r"```python\n([^`]*register_mixer[^`]*)```", TRAINING)
TINY = [
    "train.steps=2",
    "train.lengths=32",
    "train.length_shares=1",
    "train.batch_size=2",
    # A loss that is logged is drawn.
    "train.log_every=1",
    "model.hidden_size=16",
]
TINY += ["model.mixer_types=sliding_attention,mine", "task.num_pairs=2"]


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module in the current folder; what a test registers or imports is gone after it."""
    (tmp_path / "their_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = [(known, dict(known)) for known in (MIXERS, TASKS)]
    yield "their_module"
    sys.modules.pop("their_module", None)
    for known, classes in before:
        known.clear()
        known.update(classes)


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code or 0


def forget():
    """As a new process begins."""
    sys.modules.pop("their_module", None)
    del MIXERS["mine"], TASKS["many_keys"]


def test_a_task_and_a_mixer_of_the_user_train_and_are_evaluated(module, tmp_path, capsys):
    sets = [word for each in TINY for word in ("--set", each)]
    assert run("train", "recall-ovq", "--task", "their_module:ManyKeys", *sets, "--out", "run") == 0
    config = RunConfig.load(tmp_path / "run")
    assert (config.task.name, config.task.vocab_size, config.mixer) == ("many_keys", 4096, "mine")
    forget()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "import their_module  # registers a mixer\nfrom transformers" in card
    # Told to test it so that it can be.
    assert capsys.readouterr().out.endswith("ovq eval --model run --import their_module\n")
    evaluate = ["eval", "--model", "run", "--lengths", "32", "--examples", "2"]
    # A name in a file imports nothing.
    assert run(*evaluate) == 2
    assert (
        "expected a task among mqar, positional, recall, regression, found 'many_keys'; one of your own is "
        "known once its module is imported (--import MODULE)" in capsys.readouterr().err
    )
    assert "their_module" not in sys.modules
    assert run(*evaluate, "--import", module) == 0
    assert "many_keys: share of right" in capsys.readouterr().out


def test_a_mixer_of_the_user_joins_a_figure(module, tmp_path, monkeypatch, capsys):
    """In worker processes, too, which import neither the module nor, with the class, its name."""
    (tmp_path / "their_module.py").write_text(
        "from ovq.layers import FullAttention, register_mixer\nregister_mixer('mine', FullAttention)\n"
    )
    monkeypatch.setitem(presets.PRESETS, "tiny", dataclasses.replace(TINY_PRESET, num_workers=1))
    words = ["reproduce", "mqar", "--preset", "tiny", "--seeds", 1, "--out", "out", "--lines", "mine"]
    assert run(*words, "--import", module, "--mixer", "mine") == 0
    results = load_results(tmp_path / "out" / "rows" / "mqar.json")
    assert "ovq reproduce mqar --mixer mine --preset tiny" in results["command"]
    assert [entry["mixer"] for entry in results["sweep"]] == ["mine"]
    found = {(row["line"], row["mixer"], row["length"]) for row in results["rows"]}
    assert found == {("mine", "mine", 24), ("mine", "mine", 48)}
    assert run(*words[:-1], "full attention") == 2
    assert "--lines: expected --mixer mine beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "Copying"], "--task Copying: expected module:Class, found 'Copying'"),
        (
            ["--task", "nowhere:Copying"],
            "nowhere: expected a module or class that can be imported, found No module named",
        ),
        (
            ["--task", "their_module:Sorting"],
            "their_module:Sorting: expected a class Sorting in their_module, found none",
        ),
        (["--task", "their_module:Mine"], "expected a class that inherits Task, found <class 'their_mod"),
        (
            ["--import", "nowhere"],
            "nowhere: expected a module or class that can be imported, found No module named",
        ),
    ],
)
def test_what_cannot_be_imported_costs_one_line(arguments, said, capsys):
    assert run("train", "recall-ovq", *arguments, "--out", "run") == 2
    found = capsys.readouterr().err
    assert said in found
    assert len(found.splitlines()) == 1


def test_what_installed_packages_offer_is_found_by_name(monkeypatch):
    offered = {
        "ovq.mixers": [EntryPoint("theirs", "ovq.layers:Mamba2", "ovq.mixers")],
        "ovq.tasks": [EntryPoint("theirs", "ovq_lab.tasks:MQARTask", "ovq.tasks")],
    }
    monkeypatch.setattr(plugins, "entry_points", lambda group: offered[group])
    assert mixer_class("theirs").__name__ == "Mamba2"
    assert task_class("theirs").__name__ == "MQARTask"
    config = OVQConfig(num_hidden_layers=2, mixer_types=["theirs", "ovq"])
    assert config.mixer_types == ["theirs", "ovq"]
    offered["ovq.mixers"] = [EntryPoint("broken", "nowhere:Mixer", "ovq.mixers")]
    with pytest.raises(ValueError, match="nowhere:Mixer: expected a module or class that can be imported"):
        mixer_class("broken")


@pytest.mark.parametrize("name", ["ovq", "with space", "", "module:Class"])
def test_names_that_are_taken_or_none_are_refused(name):
    with pytest.raises(ValueError, match=f"mixer '{name}': expected a name"):
        register_mixer(name, LinearAttention)
    assert MIXERS.get(name) is not LinearAttention


def test_what_is_no_task_or_mixer_is_refused():
    with pytest.raises(ValueError, match="expected a class that inherits Mixer, found <class 'int'>"):
        register_mixer("number", int)
    with pytest.raises(ValueError, match="task 'lm': expected a name that is free"):
        register_task(TextTask)
    with pytest.raises(ValueError, match=r"expected a class that inherits Task"):
        register_task("recall")
    register_task(RecallTask)
    assert TASKS["recall"] is RecallTask


@pytest.fixture
def _no_laboratory(monkeypatch):
    """As where the laboratory is not installed."""
    for module in ("ovq.plugins", "ovq.cli"):
        monkeypatch.setattr(f"{module}.has_laboratory", lambda: False)
    for name in plugins.LABORATORY["mixer"]:
        monkeypatch.delitem(MIXERS, name)


MISSING = "expected the package ovq-lab, the laboratory, found none; from a checkout: pip install ./lab"


@pytest.mark.usefixtures("_no_laboratory")
def test_without_the_laboratory_its_mixers_say_what_is_missing():
    with pytest.raises(ValueError, match=rf"mixer_types: mixer 'kvm': {re.escape(MISSING)}"):
        OVQConfig(num_hidden_layers=2, mixer_types=["ovq", "kvm"])
    assert OVQConfig(num_hidden_layers=2, mixer_types=["ovq", "mamba2"]).mixer_types == ["ovq", "mamba2"]

    class Mine(Mamba2):
        pass

    with pytest.raises(ValueError, match="mixer 'kvm': expected a name that is free, found one of the lab"):
        register_mixer("kvm", Mine)


@pytest.mark.usefixtures("_no_laboratory")
@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("train recall-ovq --set train.steps=2 --out run", "ovq train"),
        ("train --help", "ovq train"),
        ("eval lm --model run", "ovq eval"),
        ("demo", "ovq demo"),
        ("memory --config recall-ovq", "--config: recall-ovq is no folder; for a recipe"),
    ],
)
def test_without_the_laboratory_its_commands_end_in_one_line(line, what, capsys):
    assert run(*line.split()) == 2
    assert capsys.readouterr().err == f"ovq: error: {what}: {MISSING}\n"


@pytest.mark.usefixtures("_no_laboratory")
def test_without_the_laboratory_help_has_the_other_commands(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "generate" in shown
    assert "reproduce" not in shown


def test_with_the_laboratory_help_has_its_commands(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in plugins.LABORATORY["command"])


def test_a_package_that_the_laboratory_needs_and_is_missing_costs_one_line(monkeypatch, capsys):
    # As where the checkout was installed without the extra `dev`.
    def get_recipe(name):
        import no_such_package  # noqa: F401

    monkeypatch.setattr("ovq_lab.train.recipes.get_recipe", get_recipe)
    assert run("train", "recall-ovq", "--out", "run") == 2
    assert capsys.readouterr().err == "ovq: error: No module named 'no_such_package'\n"

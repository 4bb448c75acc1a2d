"""`ovq inspect`: the page and the figures of a text."""

import io
import json
import os
import re
import sys

import pytest
from PIL import Image

from ovq.inspect import layer
from tests.convert.common import converted
from tests.test_cli import fail, run
from tests.tiny import tiny_model

IDS = " ".join(str(i * 17 % 48) for i in range(1, 90))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    fields = {"vocab_size": 48, "hidden_size": 24, "num_slots": 8, "chunk_size": 4, "sliding_window": 4}
    tiny_model(**fields).save_pretrained(folder)
    return folder


def data_of(path):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text())[1])


def test_a_text_becomes_a_page(capsys, model, tmp_path, monkeypatch):
    (tmp_path / "text").write_text(IDS)
    out = tmp_path / "page.html"
    said = run(capsys, "inspect", "--model", model, "--text", tmp_path / "text", "--out", out)
    assert f"Wrote {out} (" in said
    assert "What is kept of 89 tokens" in said
    assert [line.split("│")[3].strip() for line in said.splitlines() if line.count("│") == 8] == ["7/8"] * 2
    data = data_of(out)
    assert data["pieces"] == IDS.split()
    assert (data["hasIds"], data["name"], data["model"]) == (True, "text", model.name)
    assert data["layers"][0]["numReads"] == 8
    first = out.read_bytes()
    monkeypatch.setattr(sys, "stdin", io.StringIO(IDS))
    run(capsys, "inspect", "--model", model, "--text", "-", "--out", out)
    assert data_of(out) == data | {"name": "standard input"}
    assert out.read_bytes() != first


def test_another_dictionary_and_view_and_a_text_that_is_cut(capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--merge", "nearest", "--num-slots", 12, "--layer", 1, "--head", 1]
    said = run(
        capsys, "inspect", "--model", model, "--prompt", IDS, *options, "--max-tokens", 50, "--reads", 3
    )
    assert "Read the first 50 of 89 tokens (--max-tokens)." in said
    assert "12/12" in said
    data = data_of(tmp_path / "inspect.html")
    assert (data["merge"], data["numGiven"]) == ("nearest", 89)
    assert data["first"].items() >= {"layer": 1, "head": 1}.items()
    assert data["pieces"] == IDS.split()[:50]
    assert (data["layers"][0]["numSlots"], data["layers"][0]["numReads"]) == ([12, 12], 3)


def test_one_token_is_one_token(capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "What is kept of 1 token " in run(capsys, "inspect", "--model", model, "--prompt", "7")


def test_slots_in_fewer_bytes_are_looked_into(capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states, assign = [], layer.slot_assignments

    def recorded(k, v, *, initial_state, **options):
        states.append(initial_state)
        return assign(k, v, initial_state=initial_state, **options)

    monkeypatch.setattr(layer, "slot_assignments", recorded)
    run(capsys, "inspect", "--model", model, "--prompt", IDS, "--state-dtype", "int8")
    assert {state.state_dtype for state in states} == {"int8"}


def test_a_converted_model_is_looked_into(capsys, tmp_path):
    converted().save_pretrained(tmp_path / "model")
    ids = " ".join(str(i * 17 % 64) for i in range(90))
    out, figures = tmp_path / "page.html", tmp_path / "figures"
    options = ["--prompt", ids, "--out", out, "--figures", figures]
    said = run(capsys, "inspect", "--model", tmp_path / "model", *options)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    # One head has no slots, and drops what leaves its window.
    assert [row[2] for row in rows] == ["16/16", "0/0", "8/8", "16/16"]
    assert [row[6] for row in rows] == ["0%", "80%", "0%", "0%"]
    data = data_of(out)
    assert [layer["numExact"] for layer in data["layers"]] == [[18, 26], [18, 18]]
    assert (data["levels"][-1], data["convSize"]) == ("dropped: a head without slots", 0)
    assert len(list(figures.iterdir())) == 4
    said = fail(capsys, "inspect", "--model", tmp_path / "model", *options, "--num-slots", 4)
    assert said.startswith("--num-slots: expected none with a converted model, found 4")


def test_figures_even_of_less_than_a_chunk(capsys, model, tmp_path, full_pictures):
    out, figures = tmp_path / "page.html", tmp_path / "figures"
    run(capsys, "inspect", "--model", model, "--prompt", "1 2", "--out", out, "--figures", figures)
    assert sorted(path.name for path in figures.iterdir()) == [
        "counts.png",
        "heads.png",
        "reads.png",
        "slots.png",
    ]
    for path in figures.iterdir():
        with Image.open(path) as picture:
            assert picture.width == 960


def test_help_shows_an_example(capsys):
    assert "ovq inspect --model runs/ovq --text book.txt" in " ".join(
        run(capsys, "inspect", "--help").split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompt 1 --text x", "expected one of --text and --prompt, found both or neither"),
        ("", "expected one of --text and --prompt, found both or neither"),
        ("--text {tmp}/no", "No such file"),
        ("--text {tmp}/file --out {tmp}/file", "--out: expected another file than the text that was read"),
        ("--prompt one", "--prompt: expected token ids such as"),
        ("--prompt 48", "--prompt: expected token ids from 0 to 47"),
        ("--prompt 1 --layer 0", "--layer: expected an OVQ layer, one of [1], found 0"),
        ("--prompt 1 --head 2", "--head: expected 0 to 1, found 2"),
        ("--prompt 1 --merge word", "--merge: expected rules among existing"),
        ("--prompt 1 --merge nearest,existing", "--merge: expected rules among existing"),
        ("--prompt 1 --out {tmp}", "--out: expected a file in a folder that exists"),
        ("--prompt 1 --out {tmp}/pipe", "--out: expected a file in a folder that exists"),
        ("--prompt 1 --figures {tmp}/file", "--figures: expected a folder, found a file"),
        ("--prompt 1 --max-tokens 20000", "--max-tokens"),
    ],
)  # fmt: skip
def test_bad_input_costs_one_line(arguments, message, capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    assert message in fail(capsys, "inspect", "--model", model, *arguments.format(tmp=tmp_path).split())
    assert not (tmp_path / "inspect.html").exists()


def test_a_model_without_dictionaries_is_refused(capsys, tmp_path):
    tiny_model(mixer_types=["full_attention"]).save_pretrained(tmp_path)
    capsys.readouterr()  # Saving shows a bar, unless a test before has turned bars off.
    said = fail(capsys, "inspect", "--model", tmp_path, "--prompt", "1")
    assert said == "--model: expected one with 'ovq' layers, found mixer_types ['full_attention']"

"""Text on the command line where the encoding of the system is not UTF-8, and names that are no text."""

import io
import os
import sys

import pytest

from ovq.cli import main
from tests.test_cli import fail
from tests.tiny import save_reader

PROMPT = "Où? 日本"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose text of the same prompt has characters outside of ASCII, its folder's name too."""
    return save_reader(tmp_path_factory.mktemp("müdel"), mixer_types=["ovq"])


def spoken(monkeypatch, encoding, *arguments, errors="strict", text="", of_text=None):
    """Bytes that a command prints where all streams have this encoding, or standard input another."""
    streams = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors=errors))
    given = io.TextIOWrapper(io.BytesIO(text.encode()), encoding=of_text or encoding, errors=errors)
    monkeypatch.setattr(sys, "stdin", given)
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in arguments])
    sys.stdout.flush()
    assert not ended.value.code, streams["stderr"].getvalue()
    return streams["stdout"].getvalue()


def generate(model, *prompt):
    return ["generate", "--model", model, *prompt, "--max-new-tokens", 24, "--temperature", 1, "--ignore-eos"]


def test_text_is_printed_in_any_encoding(model, monkeypatch):
    command = generate(model, "--prompt", PROMPT)
    usual = spoken(monkeypatch, "utf-8", *command)
    assert not usual.isascii()
    escaped = usual.decode().encode("ascii", "backslashreplace")
    # The second is what Python does where LC_ALL=C.
    for errors in ("strict", "surrogateescape"):
        assert spoken(monkeypatch, "ascii", *command, errors=errors) == escaped


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_standard_input_is_utf_8(model, monkeypatch, encoding):
    # As JSON, which has the number of tokens of the prompt.
    expected = spoken(monkeypatch, "utf-8", *generate(model, "--prompt", PROMPT), "--json")
    command = [*generate(model, "--prompt-file", "-"), "--json"]
    assert spoken(monkeypatch, "utf-8", *command, text=PROMPT, of_text=encoding) == expected


def test_a_byte_order_mark_is_no_part_of_a_text(model, monkeypatch, tmp_path):
    """Editors on Windows write one. Models would keep it for good, as their first token."""
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8-sig")
    expected = spoken(monkeypatch, "utf-8", *generate(model, "--prompt", PROMPT), "--json")
    of_file = generate(model, "--prompt-file", tmp_path / "prompt.txt")
    assert spoken(monkeypatch, "utf-8", *of_file, "--json") == expected
    of_pipe = generate(model, "--prompt-file", "-")
    assert spoken(monkeypatch, "utf-8", *of_pipe, "--json", text="\ufeff" + PROMPT) == expected


def test_arguments_that_python_took_for_no_text_are_read_as_utf_8(model, monkeypatch, capsys, tmp_path):
    """As in `LC_ALL=C ovq generate --prompt 日本`: Python then decodes arguments as ASCII."""
    escaped = PROMPT.encode().decode("ascii", "surrogateescape")
    with monkeypatch.context() as patch:
        expected, found = (
            spoken(patch, "ascii", *generate(model, "--prompt", prompt), "--json")
            for prompt in (PROMPT, escaped)
        )
        assert found == expected
    commands = (generate(model), ["inspect", "--model", model, "--out", tmp_path / "page.html"])
    for command in commands:
        message = fail(capsys, *command, "--prompt", "ab\udcff")
        assert message == "--prompt: expected text in UTF-8, found other bytes (from byte 2 on)"


def test_names_that_are_no_text_are_printed_as_they_are(model, monkeypatch, tmp_path):
    page = tmp_path / os.fsdecode(b"a \xff b.html")
    command = ["inspect", "--model", model, "--prompt", PROMPT, "--out", page]
    assert b"/a \xff b.html" in spoken(monkeypatch, "utf-8", *command)


@pytest.mark.parametrize(
    "arguments",
    [
        "train recall-ovq --out {}/new",
        "demo --quick --out {}",
        "reproduce recall --out {}",
        "convert --model {model} --out {}",
        "context build --model {model} --text {model}/config.json --out {}",
    ],
)
def test_models_are_not_saved_where_their_weights_cannot_be(model, capsys, tmp_path, arguments):
    out = tmp_path / os.fsdecode(b"a\xff")
    words = [word.replace("{model}", str(model)).format(out) for word in arguments.split()]
    assert "--out: expected a path in UTF-8, in which weights can be saved" in fail(capsys, *words)
    assert list(tmp_path.iterdir()) == []

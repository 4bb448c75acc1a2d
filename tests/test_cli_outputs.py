"""Commands whose output nobody reads, or that are interrupted: no traceback, and the code a shell expects."""

import os
import signal
import subprocess
import sys
from unittest import mock

import pytest

from ovq.cli import main
from tests.processes import command
from tests.tiny import tiny_model

BROKEN, REFUSED = 141, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=60, num_hidden_layers=1).save_pretrained(folder)
    return folder


def code_and_errors(tmp_path, output, *arguments, closed=()):
    """How such a command ends, and what it says on standard error; without an output, nobody reads it."""
    path = tmp_path / "errors"
    process = command(arguments, output=output, errors=path, closed=closed)
    process.start()
    process.join()
    return process.exitcode, path.read_text()


COMMANDS = {
    "generate": "generate --model {model} --prompt 5 --max-new-tokens 3",
    "beams": "generate --model {model} --prompt 5 --max-new-tokens 3 --num-beams 2",
    "table": "memory --config {model}",
    "json": "memory --config {model} --json",
    "list": "reproduce --list",
    "context": "context build --model {model} --text {tmp}/text --out {tmp}/out",
    "help": "train --help",
    "version": "--version",
}


def words(name, model, tmp_path):
    (tmp_path / "text").write_text("5 6 7")
    return [word.format(model=model, tmp=tmp_path) for word in COMMANDS[name].split()]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_output_nobody_reads_ends_without_a_traceback(name, model, tmp_path):
    code, errors = code_and_errors(tmp_path, None, *words(name, model, tmp_path))
    assert code == BROKEN, errors
    assert "Traceback" not in errors
    assert "error" not in errors
    assert "Exception ignored" not in errors


@pytest.mark.parametrize("name", ["table", "context"])
def test_a_command_whose_errors_nobody_reads_either_ends_alike(name, model, tmp_path):
    code, _ = code_and_errors(tmp_path, None, *words(name, model, tmp_path), closed=(2,))
    assert code == BROKEN


def test_bad_input_has_its_code_though_nobody_reads_the_line(tmp_path):
    assert code_and_errors(tmp_path, None, "train", "nothing", closed=(2,))[0] == REFUSED


@pytest.mark.parametrize("name", ["generate", "table", "json"])
def test_output_to_a_full_disk_costs_one_line(name, model, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("the system has no /dev/full")
    code, errors = code_and_errors(tmp_path, "/dev/full", *words(name, model, tmp_path))
    assert (code, errors) == (REFUSED, "ovq: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "ovq: interrupted\n"),
        # Say the pipe of a worker process: whoever reads the output is to know.
        (BrokenPipeError(32, "Broken pipe"), REFUSED, "ovq: error: [Errno 32] Broken pipe\n"),
    ],
)
def test_interruptions_and_pipes_that_break_elsewhere_have_codes_of_their_own(
    monkeypatch, capsys, error, code, line
):
    monkeypatch.setattr("ovq_lab.train.recipes.get_recipe", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "recall-ovq"])
    assert exit_info.value.code == code
    assert capsys.readouterr().err == line


def as_in_the_foreground():
    """A shell lets what it runs in the background ignore Ctrl-C, and the tests may run there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ovq(*arguments, shell=""):
    """A command in a shell, with redirections of it."""
    command = f'exec "$0" -m ovq "$@" {shell}'
    return subprocess.Popen(
        ["/bin/sh", "-c", command, sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_generation_into_a_pipe_ends_with_its_reader_or_its_line_at_ctrl_c(model, tmp_path, is_interrupted):
    pipe, errors = tmp_path / "pipe", tmp_path / "errors"
    os.mkfifo(pipe)
    arguments = ["generate", "--model", model, "--prompt", "5", "--max-new-tokens", "0"]
    process = command(arguments, output=pipe, errors=errors, before=as_in_the_foreground)
    process.start()
    with pipe.open() as output:
        assert output.read(1)
        if is_interrupted:
            os.kill(process.pid, signal.SIGINT)
            assert output.read().endswith("\n")
    process.join()
    assert errors.read_text() == ("ovq: interrupted\n" if is_interrupted else "")
    assert process.exitcode == (130 if is_interrupted else BROKEN)


@pytest.mark.parametrize(
    ("arguments", "closed", "code"),
    [
        ("--version", ">&-", 0),
        ("train --help", ">&- 2>&-", 0),
        ("train nothing", "<&- >&- 2>&-", REFUSED),
        ("generate --model nowhere --prompt-file -", "<&-", REFUSED),
    ],
)
def test_closed_streams_are_no_obstacle(arguments, closed, code):
    process = ovq(*arguments.split(), shell=closed)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors

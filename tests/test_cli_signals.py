"""Ctrl-C, SIGTERM and SIGHUP: a command cleans up, says one line, and ends with the code of the signal."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from ovq.cli.signals import EndedBySignal, raised
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq_lab.text import byte_tokenizer
from tests.convert.common import original
from tests.processes import command
from tests.tiny import TINY

ENDINGS = {
    signal.SIGINT: (130, "ovq: interrupted"),
    signal.SIGTERM: (143, "ovq: ended by SIGTERM"),
    signal.SIGHUP: (129, "ovq: ended by SIGHUP"),
}
COMMANDS = {
    "convert": "convert --model {models}/llama --out {out} --num-slots 8 --window 16 --chunk-size 8 "
    "--probe {text} --needle-weight 0",
    "train": "train recall-ovq {tiny} --set train.steps=4000 --out {out}",
    "train on text": "train lm-ovq {tiny} --set task.dataset={models}/texts --set train.lengths=16,24 "
    "--set train.steps=4000 --set train.eval_every=1 --out {out}",
    "context": "context build --model {models}/ours --text {text} --out {out} --prefill-chunk-size 8",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a Llama, a model of this library, and texts for both."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), byte_tokenizer()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ours = OVQForCausalLM(OVQConfig(vocab_size=len(tokenizer), **sizes))
    llama = original()
    llama.resize_token_embeddings(len(tokenizer))
    for name, model in (("llama", llama), ("ours", ours)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "texts").mkdir()
    for i in range(20):
        (folder / "texts" / f"{i}.txt").write_text("The queen walks on the river. " * 200)
    return folder


def as_in_the_foreground():
    """No signal is ignored, as `nohup` does, and temporary files go where the environment says by now."""
    for number in ENDINGS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    tempfile.tempdir = None


def begun(name, models, folder, before=as_in_the_foreground):
    """A command that has said its first line; its temporary files are to be in `folder / "temporary"`."""
    (folder / "temporary").mkdir(parents=True)
    tiny = " ".join(f"--set {setting}" for setting in TINY)
    given = {"models": models, "out": folder / "out", "tiny": tiny, "text": models / "texts" / "0.txt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "temporary"))
        # What is said is then the progress alone, and the last line.
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        arguments = COMMANDS[name].format(**given).split()
        process = command(arguments, output=folder / "output", errors=folder / "errors", before=before)
        process.start()
    while not (folder / "errors").exists() or not (folder / "errors").read_text():
        assert process.is_alive()
        time.sleep(0.005)
    return process


def end(process, number, folder, may_be_done=False):
    """Send it a signal; it ends as it should, and leaves nothing behind that is not finished.

    The signal may come when the process has already exited, or nearly, which only its exit code tells.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
    process.join(60)
    errors = (folder / "errors").read_text()
    assert "Traceback" not in errors
    assert not list((folder / "temporary").iterdir())
    assert not list(folder.rglob(".*"))
    if may_be_done and process.exitcode == 0:
        assert (folder / "out").exists()
    else:
        assert process.exitcode == ENDINGS[number][0], errors
        assert errors.splitlines()[-1] == ENDINGS[number][1]


def with_a_text_that_takes_long():
    """The probe has made its temporary folder when it begins to read a text, and says so by another one."""
    as_in_the_foreground()
    from ovq.convert import captures

    def capture(*_):
        os.mkdir(os.path.join(os.environ["TMPDIR"], os.pardir, "begun"))
        time.sleep(60)

    captures.capture = capture


@pytest.mark.parametrize("number", ENDINGS)
def test_what_is_temporary_goes_with_a_command_that_a_signal_ends(number, models, tmp_path):
    process = begun("convert", models, tmp_path, with_a_text_that_takes_long)
    while not (tmp_path / "begun").exists():
        assert process.is_alive()
        time.sleep(0.005)
    assert list((tmp_path / "temporary").glob("ovq-*"))
    end(process, number, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_signals_at_random_moments(name, models, tmp_path):
    chance = random.SystemRandom()
    for i, number in enumerate([*ENDINGS, *ENDINGS]):
        folder = tmp_path / f"{i}"
        process = begun(name, models, folder)
        time.sleep(chance.uniform(0, 0.5))
        end(process, number, folder, may_be_done=True)


class InterruptedWhenItGoes:
    """Python drops what is raised in a destructor."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@raised()
def work_with_a_destructor_that_is_interrupted(number):
    InterruptedWhenItGoes(number)
    time.sleep(60)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, EndedBySignal)]
)
def test_a_signal_that_comes_in_a_destructor_is_not_lost(number, error, capsys):
    hook, handlers = sys.unraisablehook, [signal.getsignal(each) for each in ENDINGS]
    with pytest.raises(error):
        work_with_a_destructor_that_is_interrupted(number)
    assert capsys.readouterr().err == ""
    assert (sys.unraisablehook, [signal.getsignal(each) for each in ENDINGS]) == (hook, handlers)


@raised()
def work_that_is_ended_twice(cleaned):
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGTERM)
        cleaned.append(True)


def test_a_signal_that_is_sent_twice_at_once_lets_the_command_clean_up():
    cleaned = []
    with pytest.raises(EndedBySignal, match="143"):
        work_that_is_ended_twice(cleaned)
    assert cleaned


def test_other_errors_in_destructors_are_still_reported():
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", seen.append)
        with raised():
            type("Bad", (), {"__del__": lambda self: 1 / 0})()
    assert [each.exc_type for each in seen] == [ZeroDivisionError]


def test_signals_that_are_ignored_stay_so():
    """`nohup` lets a command ignore SIGHUP, and a shell what it runs in the background Ctrl-C."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_commands_may_be_called_in_other_threads():
    done = []

    def work():
        with raised():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


INTERRUPTED_EARLY = """
import signal, sys
from ovq.__main__ import main

class Finder:
    def find_spec(name, path, target=None):
        if name == "ovq.cli":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def test_ctrl_c_while_the_commands_are_imported_costs_no_traceback():
    process = subprocess.run([sys.executable, "-c", INTERRUPTED_EARLY], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (-signal.SIGINT, "")

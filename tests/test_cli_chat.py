"""`ovq chat`: a terminal, or lines through a pipe; what was said is read once, saved, and gone on from."""

import dataclasses
import functools
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ovq import prompts
from ovq.cli import chat, conversation, main
from ovq.convert import attach
from ovq.hf import build_context, save_context, streaming
from ovq_lab.text import byte_tokenizer
from tests.convert.common import MEMORY, SIZES
from tests.hf.common import is_greedy
from tests.processes import command
from tests.test_cli import fail, run
from tests.tiny import tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Leaves out what was said before a bar once it is not the last answer, as templates do with reasoning.
FORGETTING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content[3:] if m.role == 'assistant' else m.content }}"
    "{% endif %}{{ '\n' }}{% endfor %}<assistant>"
)
# Longer chunks are merged more seldom, which takes most of the time in float64.
KEPT = MEMORY | {"window": [[16, 32], [16, 16]], "chunk_size": 16}
TURNS = ["What is it?", "And then?", "Why?"]
LENGTH = 12


def speaking(model):
    """The same model, which writes printable characters alone, so that text gives its tokens back."""
    with torch.no_grad():
        keep = torch.zeros(257, 1)
        keep[32:127] = 1
        model.lm_head.weight.mul_(keep)
    return model


def save(model, folder, template=TEMPLATE):
    # In float64, so that rounding flips no choice.
    speaking(model).double().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 257})).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted Llama and a model of this library, which both chat."""
    folder = tmp_path_factory.mktemp("chat")
    save(attach(llama(), **KEPT), folder / "converted")
    save(attach(llama(), **KEPT), folder / "forgetting", FORGETTING)
    fields = {"hidden_size": 24, "num_slots": 8, "chunk_size": 4, "sliding_window": 4}
    # With other seeds the document shows in no answer.
    save(tiny_model(2, **fields, initializer_range=0.5), folder / "own")
    (folder / "book.txt").write_text("The queen walks on the river. " * 3)
    return folder


@pytest.fixture
def say(capsys, monkeypatch):
    """Says lines to a chat through a pipe; what it prints."""

    def said(folder, *lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run(capsys, "chat", "--model", folder, "--max-tokens", LENGTH, *options)

    return said


@pytest.fixture
def num_read(monkeypatch):
    """Tokens of the prompts that were read."""
    found = []

    def recorded(model, ids, **options):
        found.append(len(ids))
        return stream(model, ids, **options)

    stream = streaming.stream_tokens
    monkeypatch.setattr(streaming, "stream_tokens", recorded)
    return found


def assert_answers(folder, said, turns, before=""):
    """That each turn was answered as all that was said before, read at once, asks for."""
    model, text = chat.load_any_model(folder), before
    assert len({*said.splitlines()}) > 1
    for turn, answer in zip(turns, said.splitlines(), strict=True):
        assert len(answer) == LENGTH
        text += f"<user>{turn}\n<assistant>{answer}"
        assert is_greedy(model, torch.tensor([*text.encode()]), LENGTH), turn
        text += "\n"


@pytest.mark.parametrize("name", ["converted", "own"])
def test_each_answer_is_that_to_all_that_was_said(name, folders, say, num_read):
    assert_answers(folders / name, say(folders / name, *TURNS), TURNS)
    # The last token of an answer, the end of its line, and the turn.
    first, *others = (len(f"<user>{turn}\n<assistant>") for turn in TURNS)
    assert num_read == [first, *(2 + num for num in others)]


@pytest.mark.parametrize("name", ["converted", "own"])
def test_a_document_is_read_once_and_ends_the_system_message(name, folders, say, num_read):
    book, text = folders / "book.txt", (folders / "book.txt").read_text()
    said = say(folders / name, *TURNS[:2], options=["--document", book, "--system", "Be brief."])
    assert_answers(folders / name, said, TURNS[:2], before=f"<system>Be brief.\n\n{text}\n")
    # What all prompts share is read before.
    assert num_read[0] == len(f"{TURNS[0]}\n<assistant>")


@pytest.mark.parametrize("place", ["refused", "before the last message"])
def test_a_document_that_cannot_open_the_chat_stands_before_it(place, folders, say, num_read, tmp_path):
    """As with some templates of Mistral."""
    book, text = folders / "book.txt", (folders / "book.txt").read_text()
    refused = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    moved = (
        "{% set first = messages[0] %}{% for m in messages if m.role != 'system' %}"
        "{% if loop.last and first.role == 'system' %}{{ first.content }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    )
    folder = save(attach(llama(), **KEPT), tmp_path / "model", refused if place == "refused" else moved)
    assert_answers(folder, say(folder, *TURNS[:2], options=["--document", book]), TURNS[:2], before=text)
    assert max(num_read) < len(text)


def test_reading_a_document_shows_how_far_and_how_fast(capsys, folders, monkeypatch):
    monkeypatch.setattr(chat, "_PIECE", 40)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit):
        main(["chat", "--model", f"{folders / 'converted'}", "--document", f"{folders / 'book.txt'}"])
    captured = capsys.readouterr()
    assert captured.out == ""
    # A long path breaks lines.
    said = " ".join(captured.err.split())
    assert said.startswith(f"read {folders / 'book.txt'}: 0/105 (0 s)")
    assert re.search(r": 105/105 \([\d,]+ tokens/s, \d+ s\)$", said)


@pytest.mark.parametrize(
    ("name", "options"),
    [("converted", ["--temperature", 2, "--top-k", 5, "--seed", 3]), ("forgetting", [])],
)
def test_a_saved_chat_goes_on_as_it_would_have(name, options, folders, say, tmp_path):
    document = ["--document", folders / "book.txt"]
    whole = say(folders / name, *TURNS, options=[*options, *document]).splitlines()
    saved = tmp_path / "chat.ctx"
    begun = say(folders / name, *TURNS[:2], f"/save {saved}", options=[*options, *document])
    assert begun.splitlines() == whole[:2]
    assert say(folders / name, *TURNS[2:], options=[*options, "--context", saved]).splitlines() == whole[2:]
    # In place of what was said before.
    again = say(folders / name, "Hello?", f"/load {saved}", *TURNS[2:], options=options)
    assert again.splitlines()[1:] == whole[2:]


def test_a_file_of_context_build_is_a_document(capsys, folders, say, tmp_path):
    model, book = folders / "converted", folders / "book.txt"
    run(capsys, "context", "build", "--model", model, "--text", book, "--chat", "--out", tmp_path / "c")
    expected = say(model, TURNS[0], options=["--document", book])
    assert say(model, TURNS[0], options=["--context", tmp_path / "c"]) == expected
    assert say(model, f"/load {tmp_path / 'c'}", TURNS[0]) == expected
    run(capsys, "context", "build", "--model", model, "--text", book, "--out", tmp_path / "c")
    said = say(model, *TURNS[:2], options=["--context", tmp_path / "c"])
    assert_answers(model, said, TURNS[:2], before=book.read_text())


def test_generate_goes_on_from_a_chat(capsys, folders, say, tmp_path):
    model, saved, book = folders / "converted", tmp_path / "chat.ctx", folders / "book.txt"
    one = ["generate", "--model", model, "--max-new-tokens", LENGTH, "--context", saved, "--prompt"]
    run(capsys, "context", "build", "--model", model, "--text", book, "--chat", "--out", saved)
    first, second = say(model, *TURNS[:2], options=["--document", book]).splitlines()
    assert run(capsys, *one, TURNS[0], "--chat") == f"{first}\n"
    say(model, TURNS[0], f"/save {saved}", options=["--document", book])
    assert run(capsys, *one, TURNS[1], "--chat") == f"{second}\n"
    message = "--context: expected --chat beside a file that has read a chat, found none"
    assert message in fail(capsys, *one, TURNS[0])


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("about a queen", "--context: expected a chat that was saved, found another note"),
        (
            prompts.note_of_chat([{"role": "user", "content": "?"}], [1]),
            "--prompt: expected messages that go on from those of the context as it read them",
        ),
    ],
)
def test_generate_refuses_a_chat_that_does_not_go_on(note, message, capsys, folders, tmp_path):
    model, saved = folders / "converted", tmp_path / "chat.ctx"
    save_context(dataclasses.replace(build_context(chat.load_any_model(model), [1, 2]), note=note), saved)
    one = ["generate", "--model", model, "--max-new-tokens", 4, "--context", saved, "--prompt", "?"]
    assert message in fail(capsys, *one, "--chat")
    if note == "about a queen":
        assert len(run(capsys, *one).strip("\n")) == 4


def test_where_a_template_writes_otherwise_the_chat_goes_back_to_the_last_prompt(folders, say, num_read):
    assert len(say(folders / "forgetting", *TURNS).splitlines()) == 3
    first, second, third = (len(f"<user>{turn}\n<assistant>") for turn in TURNS)
    left = LENGTH - 3 + 1
    assert num_read == [first, left + second, left + third]


def test_an_answer_that_the_tokenizer_divides_otherwise_is_read_again(folders):
    """The model writes as two tokens what the tokenizer makes one token of."""
    model, shown = chat.load_any_model(folders / "converted"), io.StringIO()

    def terminal(pair=None):
        letters = {chr(i): i for i in range(128)}
        merged = {} if pair is None else {"".join(pair): letters.pop("\1")}
        merges = [] if pair is None else [pair]
        tokens = Tokenizer(models.BPE(vocab=letters | merged, merges=merges))
        tokens.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
        tokenizer.chat_template = TEMPLATE
        talk = conversation.Conversation(model, tokenizer, sampling=streaming.Sampling(), max_tokens=LENGTH)
        found = chat._Terminal(talk, None)
        found._notes = Console(file=shown, width=200)
        return found, talk

    one, talk = terminal()
    one._answer(TURNS[0])
    answer = talk.messages[-1]["content"]
    other, talk = terminal((answer[3], answer[4]))
    other._answer(TURNS[0])
    assert talk.messages[-1]["content"] == answer
    assert "read again" not in shown.getvalue()
    other._answer(TURNS[1])
    assert f"; {LENGTH - 1} earlier tokens read again, as the prompt now has others\n" in shown.getvalue()
    ids = [*talk._ids(talk.messages[:-1]), *map(ord, talk.messages[-1]["content"])]
    assert 1 in ids
    assert is_greedy(model, torch.tensor(ids), LENGTH)


def test_few_states_are_kept(folders):
    talk = conversation.Conversation(
        chat.load_any_model(folders / "converted"),
        chat.load_tokenizer(folders / "converted"),
        sampling=streaming.Sampling(),
        max_tokens=3,
    )
    sizes = []
    for turn in TURNS * 2:
        assert len("".join(talk.answer(turn))) == 3
        sizes.append((len(talk._states), talk.cache.nbytes))
    assert len({*sizes[1:]}) == 1
    assert sizes[-1][0] == 5


def test_commands(capsys, folders, say, tmp_path):
    said = say(folders / "converted", "/help", "/memory", "Hello", "/memory", "/quit", "Hello")
    assert said.count("/save FILE") == 1
    empty, full = (line for line in said.splitlines() if "tokens read" in line)
    assert empty == "0 tokens read; 0 B"
    assert full.startswith(f"{len('<user>Hello|<assistant>') + LENGTH - 1} tokens read; ")
    # Of 34 tokens, three heads have merged 32, and one has dropped 16, as it has no slots.
    assert said.splitlines()[-1] == "rows of all heads: 24 exact, 40 of 40 slots in use"
    said = say(folders / "own", "Hello", "/memory")
    assert "of 16 slots in use" in said
    saved = tmp_path / "chat.ctx"
    say(folders / "own", "Hello", f"/save {saved}")
    assert f"{saved}: what is kept of {23 + LENGTH - 1} tokens" in run(capsys, "context", "info", saved)


def test_what_starts_with_a_space_and_a_slash_is_a_message(folders, say):
    assert len(say(folders / "converted", " /quit", "", "Hello").splitlines()) == 2


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(folders, say, num_read, monkeypatch):
    whole = say(folders / "converted", *TURNS[:2]).splitlines()
    stream = streaming.stream_tokens

    def interrupted(*arguments, **options):
        for i, token in enumerate(stream(*arguments, **options)):
            if i == 4 and len(num_read) == 3:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(streaming, "stream_tokens", interrupted)
    stopped, after = say(folders / "converted", *TURNS[:2]).splitlines()
    assert stopped == whole[0][:5]
    assert len(after) == LENGTH
    # The fifth token, the end of the line, and the turn.
    assert num_read[-1] == 2 + len(f"<user>{TURNS[1]}\n<assistant>")


def test_an_answer_that_ends_with_its_last_token_is_not_cut(folders):
    model, tokenizer = chat.load_any_model(folders / "converted"), chat.load_tokenizer(folders / "converted")

    def is_cut(*ends):
        model.generation_config.eos_token_id = list(ends) or None
        talk = conversation.Conversation(model, tokenizer, sampling=streaming.Sampling(), max_tokens=4)
        answer = "".join(talk.answer("Hello"))
        return answer, talk.is_cut

    answer, was_cut = is_cut()
    assert (len(answer), was_cut) == (4, True)
    assert answer[3] not in answer[:3]
    assert is_cut(ord(answer[3])) == (answer, False)


def test_ctrl_c_stops_the_reading_of_a_message(folders, say, monkeypatch):
    """Between two pieces; the message is then as if it had not been."""
    monkeypatch.setattr(conversation, "_PIECE", 4)
    stream, whole = streaming.stream_tokens, say(folders / "converted", TURNS[1])

    def interrupted(model, ids, *, is_stopped, **options):
        def asked():
            if cache.num_columns == 8 and not done:
                done.append(signal.raise_signal(signal.SIGINT))
            return is_stopped()

        cache = options["cache"]
        yield from stream(model, ids, is_stopped=asked, **options)

    done = []
    monkeypatch.setattr(streaming, "stream_tokens", interrupted)
    assert say(folders / "converted", *TURNS[:2]) == f"\n{whole}"
    assert done == [None]


def test_a_chat_does_not_run_the_code_of_a_folder(folders, tmp_path):
    """In a process that has not imported the model, transformers would ask on standard input whether to."""
    folder = shutil.copytree(folders / "own", tmp_path / "model")
    (folder / "modeling_ovq.py").write_text("raise SystemExit('was run')")
    arguments = [sys.executable, "-m", "ovq", "chat", "--model", folder, "--max-tokens", "4"]
    done = subprocess.run(arguments, input="y\nHello\n", capture_output=True, text=True)
    assert (done.returncode, [len(line) for line in done.stdout.splitlines()]) == (0, [4, 4]), done
    # The type of the model is known, too.
    assert not done.stderr


@pytest.mark.parametrize(
    ("arguments", "lines", "message"),
    [
        (
            "",
            ["/lood x"],
            "expected one of /save FILE, /load FILE, /memory, /help and /quit, found '/lood x'",
        ),
        ("", ["/load"], "found '/load'"),
        ("", ["/load {tmp}/no"], "{tmp}/no: expected a saved context, found no such file"),
        ("", ["/save {tmp}"], "/save: expected a file in a folder that exists, found {tmp}"),
        ("", ["/save {tmp}/c"], "/save: expected a chat in which something was said or read, found none"),
        (
            "-q --document {tmp}/text",
            ["/save {tmp}/text"],
            "/save: expected another file than the text that was read, found {tmp}/text",
        ),
        ("--context {tmp}/no", [], "--context: expected a file of /save or ovq context build, found no file"),
        ("--document {tmp}/no", [], "--document: expected a text file, found none that can be read"),
        ("--document {tmp}/a --context {tmp}/b", [], "--document: expected no --context beside it"),
        ("--document -", [], "--document: expected a file, found -"),
        ("--top-p 0.5", [], "--top-p: expected a temperature above 0 with it"),
        ("--weight-dtype int2", [], "--weight-dtype: expected one of"),
        ("--model {tmp}", [], "{tmp}: expected the folder of a saved model"),
        (
            "--model {plain}",
            [],
            "--model: expected a model whose tokenizer has a chat template, found a tokenizer w",
        ),
        ("--context {other}", [], "expected a chat that was saved, found another note"),
        ("--context {saved} --system Hi", [], "--system: expected none with a saved chat"),
        (
            "--model {strict}",
            ["Hello"],
            "message: expected messages that the model's chat template acc",
        ),
        # Before the document is read, which would show a bar.
        (
            "--model {strict} --document {tmp}/text --system Hi",
            [],
            "--system: expected messages that the model's chat template acc",
        ),
    ],
)
def test_bad_input_costs_one_line(arguments, lines, message, capsys, folders, say, tmp_path, monkeypatch):
    names = {"tmp": tmp_path, **{name: tmp_path / name for name in ("plain", "strict", "saved", "other")}}
    (tmp_path / "text").write_text("Once upon a time")
    if "{plain}" in arguments:
        save(attach(llama(), **KEPT), names["plain"], template=None)
    if "{strict}" in arguments:
        save(attach(llama(), **KEPT), names["strict"], "{{ raise_exception('no system') }}")
    if "{saved}" in arguments or "{other}" in arguments:
        if "{other}" in arguments:
            monkeypatch.setattr(prompts, "json", types.SimpleNamespace(dumps=str, loads=json.loads))
        say(folders / "converted", "Hello", f"/save {names['other' if '{other}' in arguments else 'saved']}")
    text = "".join(f"{line.format(**names)}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    words = [word.format(**names) for word in arguments.split()]
    capsys.readouterr()  # Saving shows a bar, unless a test before has turned bars off.
    found = fail(capsys, "chat", "--model", folders / "converted", *words)
    assert message.format(**names) in found


def on_terminal(path):
    """Make a terminal the standard streams of this process, and Ctrl-C in it a signal."""
    os.setsid()
    terminal = os.open(path, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """A terminal in which a chat runs."""

    def __init__(self, arguments, folder):
        self._own, other = pty.openpty()
        self._seen = ""
        before = functools.partial(on_terminal, os.ttyname(other))
        self.process = command(arguments, output=folder / "output", before=before)
        self.process.start()

    def until(self, text):
        """What it shows from the last call on until some text has come."""
        end = time.monotonic() + 60
        while text not in self._seen:
            assert select.select([self._own], [], [], max(0, end - time.monotonic()))[0], self._seen
            self._seen += os.read(self._own, 4096).decode(errors="replace")
        found, _, self._seen = self._seen.partition(text)
        return found

    def interrupt(self):
        """Press Ctrl-C at a prompt."""
        # Python's input does not see a signal that comes between its prompt and its waiting for keys.
        time.sleep(0.5)
        self.type("\x03")

    def type(self, keys):
        os.write(self._own, keys if isinstance(keys, bytes) else keys.encode())


def test_a_terminal_shows_prompts_and_notes(folders, say, tmp_path):
    answer = say(folders / "converted", "Hello")
    arguments = ["chat", "--model", folders / "converted", "--max-tokens", 0]
    terminal = Terminal(arguments, tmp_path)
    assert "/help lists commands" in terminal.until("> ")
    terminal.type("/nothing\n")
    assert "error: expected one of /save FILE" in terminal.until("'/nothing'")
    terminal.until("> ")
    # As of a terminal in Latin-1.
    terminal.type(b"\xe9\n")
    terminal.until("error: expected text in UTF-8, found other bytes")
    terminal.until("> ")
    terminal.type("Hello\n")
    # Without an end, it writes until Ctrl-C.
    terminal.until(answer[:4])
    terminal.type("\x03")
    terminal.until("stopped: Ctrl-C once more leaves")
    terminal.until("> ")
    # Of a line that is begun, it is the end.
    terminal.type("/qu")
    terminal.until("/qu")
    terminal.interrupt()
    terminal.until("> ")
    terminal.type("/memory\n")
    terminal.until("slots in use")
    terminal.until("> ")
    terminal.interrupt()
    terminal.until("Ctrl-C once more leaves.")
    terminal.interrupt()
    terminal.until("ovq: interrupted")
    terminal.process.join(60)
    assert terminal.process.exitcode == 130

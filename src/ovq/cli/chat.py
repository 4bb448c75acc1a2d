"""`ovq chat`: talk to a model in a terminal, or line by line through a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ovq.cli import options
from ovq.cli.common import as_text, check_file, check_model_path, out_console, read_text
from ovq.cli.conversation import Conversation
from ovq.cli.loading import check_generating_folder, load_any_model, load_tokenizer
from ovq.cli.signals import interrupt_flag
from ovq.prompts import chat_text, check_chat_template, document_ids, note_of_chat

if TYPE_CHECKING:
    from ovq.hf import Context

# Small enough that progress visibly moves: a converted model reads some hundred tokens per second.
_PIECE = 512

_HELP = """\
/save FILE   save what was said and read; ovq chat --context FILE goes on from there
/load FILE   go on from a saved chat, or after a file of ovq context build
/memory      what the model keeps
/help        this list
/quit        leave, as Ctrl-D does
Ctrl-C stops an answer. A message that begins with a slash needs a space before it."""


def chat(
    model: options.Model,
    document: Annotated[
        str | None, typer.Option(help="Text file that the model reads before the chat.")
    ] = None,
    context: Annotated[
        Path | None, typer.Option(help="Continue from a file of /save or of ovq context build.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[
        int, options.number_up_to(options.MOST_TOKENS, "Most tokens of an answer; 0 for no limit.")
    ] = 1024,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    num_slots: options.NumSlots = None,
    merge: options.MergeRule = None,
    logn_length: options.LognLength = None,
    state_dtype: options.StateDtype = None,
    weight_dtype: options.WeightDtype = None,
    seed: options.Seed = 0,
) -> None:
    """Talk to a model whose tokenizer has a chat template, after a document if one is given.

    Each turn continues from the model's state, so earlier messages are not read again unless their tokens
    are others in the new prompt, and memory does not grow with the chat. /help lists commands such as
    [bold]/save FILE[/bold]. If standard input is not a terminal, each of its lines is a message or a command.

    Example: [bold]ovq chat --model converted --document book.txt[/bold]
    """
    if document is not None and context is not None:
        raise ValueError("--document: expected no --context beside it, found both")
    if document == "-":
        raise ValueError("--document: expected a file, found -: messages come from standard input")
    text = None if document is None else read_text(document, flag="--document")
    system = None if system is None else as_text(system, flag="--system")
    check_generating_folder(model)
    if context is not None and not context.is_file():
        raise ValueError(f"--context: expected a file of /save or ovq context build, found no file {context}")
    tokenizer = load_tokenizer(model)
    check_chat_template(tokenizer, name="--model")
    if system is not None:
        # Some templates refuse it, and a document takes minutes to read.
        asked = [{"role": role, "content": system} for role in ("system", "user")]
        chat_text(asked, tokenizer, name="--system")

    from transformers import set_seed

    sampling = options.sampling_of(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    loaded = load_any_model(
        model,
        num_slots=num_slots,
        merge=merge,
        logn_length=logn_length,
        state_dtype=state_dtype,
        weight_dtype=weight_dtype,
    )
    set_seed(seed)
    conversation = Conversation(
        loaded, tokenizer, sampling=sampling, max_tokens=max_tokens, seed=seed, system=system
    )
    if text is not None:
        vocab_size = loaded.config.vocab_size
        ids, messages = document_ids(text, tokenizer, vocab_size=vocab_size, name="--document", system=system)
        read = _read(loaded, ids, f"read {document}")
        conversation.continue_from(dataclasses.replace(read, note=note_of_chat(messages, ids)))
    if context is not None and conversation.load(context).note and system is not None:
        raise ValueError("--system: expected none with a saved chat, which has its own, found one")
    _Terminal(conversation, document).run()


def _read(model: Any, ids: list[int], label: str) -> Context:
    """Read a document into a context, with a progress bar."""
    from ovq.hf import build_context
    from ovq.runtime.progress import Reporter

    begun = time.monotonic()
    with Reporter() as reporter:
        work = reporter.start(label, total=len(ids))

        def show(num_read: int) -> None:
            work.update(num_read, note=f"{num_read / (time.monotonic() - begun):,.0f} tokens/s")

        return build_context(model, ids, prefill_chunk_size=_PIECE, progress=show)


class _Terminal:
    """Reads messages and commands from standard input, prints answers; `document` is the file read before."""

    def __init__(self, conversation: Conversation, document: str | None) -> None:
        self._conversation, self._document = conversation, document
        self._is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        # For messages that are neither answers nor results; shown only on a terminal.
        self._notes = Console(
            stderr=True,
            quiet=not self._is_interactive,
            highlight=False,
            markup=False,
            emoji=False,
            style="dim",
        )
        self._was_interrupted = False

    def run(self) -> None:
        """Answer until the input ends."""
        num_read = self._conversation.cache.num_columns
        self._notes.print(f"{num_read:,} tokens read. /help lists commands, Ctrl-D leaves.", soft_wrap=True)
        # Ctrl-C at the wrong moment must not lose a chat.
        with interrupt_flag() if self._is_interactive else contextlib.nullcontext():
            for line in self._lines():
                if line.rstrip() == "/quit":
                    return
                try:
                    if line.startswith("/"):
                        command, _, rest = line.partition(" ")
                        self._run_command(command, rest.strip())
                    elif line.strip():
                        self._answer(line.strip())
                except (ValueError, OSError) as error:
                    # Neither must a mistake. A script, however, should fail.
                    if not self._is_interactive or isinstance(error, BrokenPipeError):
                        raise
                    self._notes.print(f"error: {error}", soft_wrap=True)

    def _lines(self) -> Iterator[str]:
        if not self._is_interactive:
            try:
                for line in sys.stdin:
                    yield line.rstrip("\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"standard input: expected text in UTF-8, found other bytes ({error})"
                ) from None
            return
        prompt = "> " if self._notes.no_color else "\x01\x1b[1;36m\x02> \x01\x1b[0m\x02"
        while True:
            try:
                line = _input_line(prompt)
            except EOFError:
                print()
                return
            except UnicodeDecodeError:
                self._notes.print("error: expected text in UTF-8, found other bytes")
                continue
            except KeyboardInterrupt as error:
                print()
                is_begun = isinstance(error, _LineInterrupted)
                if self._was_interrupted and not is_begun:
                    raise
                self._was_interrupted = not is_begun
                if self._was_interrupted:
                    self._notes.print("Ctrl-C once more leaves.")
                continue
            self._was_interrupted = False
            yield line

    def _answer(self, text: str) -> None:
        """Print the answer to a message as it is generated; Ctrl-C stops it."""
        conversation, begun = self._conversation, time.monotonic()
        with interrupt_flag() as is_stopped:
            for piece in conversation.answer(text, is_stopped):
                print(piece, end="", flush=True)
            print(flush=True)
            self._was_interrupted = is_stopped()
        rate = conversation.num_written / (time.monotonic() - begun)
        said = [f"{conversation.num_written} tokens, {rate:.1f} tokens/s"]
        said += ["stopped: Ctrl-C once more leaves"] if self._was_interrupted else []
        said += ["ended by --max-tokens"] if conversation.is_cut else []
        if conversation.num_reread:
            said.append(f"{conversation.num_reread} earlier tokens read again, as the prompt now has others")
        self._notes.print("; ".join(said))

    def _run_command(self, command: str, file: str) -> None:
        if command == "/help":
            out_console.print(_HELP, highlight=False)
        elif command == "/memory":
            out_console.print(_memory_summary(self._conversation), highlight=False)
        elif command == "/save" and file:
            self._save(Path(file).expanduser())
        elif command == "/load" and file:
            self._conversation.load(Path(file).expanduser())
            self._notes.print(f"{self._conversation.cache.num_columns:,} tokens read")
        else:
            found = f"{command} {file}".strip()
            raise ValueError(
                f"expected one of /save FILE, /load FILE, /memory, /help and /quit, found {found!r}"
            )

    def _save(self, path: Path) -> None:
        from ovq.hf import save_context

        check_file("/save", path, text=self._document)
        check_model_path("/save", path)
        if self._conversation.cache.num_columns == 0:
            raise ValueError("/save: expected a chat in which something was said or read, found none")
        save_context(self._conversation.as_context(), path)
        self._notes.print(f"saved in {path}", soft_wrap=True)


class _LineInterrupted(KeyboardInterrupt):
    """Ctrl-C while a line was being typed."""


def _input_line(prompt: str) -> str:
    """Read a line from a terminal, with line editing.

    Raises:
        EOFError: Ctrl-D.
        KeyboardInterrupt: Ctrl-C; `_LineInterrupted` if the line was not empty.
    """
    try:
        # Importing readline enables line editing in `input`. Windows has none; its terminal edits lines.
        from readline import get_line_buffer
    except ImportError:
        get_line_buffer = str

    def interrupt(*_: object) -> None:
        # Check now, as the line is lost once this is raised.
        raise _LineInterrupted if get_line_buffer() else KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return input(prompt)
    finally:
        signal.signal(signal.SIGINT, before)


def _memory_summary(conversation: Conversation) -> str:
    """Text about the model's memory, for `/memory`; rows are summed over all layers and heads."""
    from ovq.runtime.units import format_bytes

    cache = conversation.cache
    exact = used = slots = 0
    for layer in cache.layers:
        for state in layer.slot_states:
            summary, num_heads = state.summary(), state.count.shape[1]
            exact += summary.num_pending[0] * num_heads
            used, slots = used + summary.num_open[0] * num_heads, slots + summary.num_slots * num_heads
        if layer.keys is not None:
            exact += layer.keys.shape[1] * layer.keys.shape[2]
    size = format_bytes(cache.nbytes)
    return (
        f"{cache.num_columns:,} tokens read; {size}\n"
        f"rows of all heads: {exact:,} exact, {used:,} of {slots:,} slots in use"
    )

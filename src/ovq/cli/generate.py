"""`ovq generate`: continue a prompt with a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ovq.cli.common import check_model_folder, encode, load_model, load_tokenizer


def generate(
    model: Annotated[Path, typer.Option(help="Folder of a trained model.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text if the model has a tokenizer, else token ids: '12 7 33'.", show_default=False
        ),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="Read the prompt from a file; - for standard input.", show_default=False),
    ] = None,
    context: Annotated[
        Path | None,
        typer.Option(help="Continue from a file of ovq context build.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this total probability.")
    ] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of beam search.")] = 1,
    num_slots: Annotated[
        int | None, typer.Option(min=1, help="Another size of the dictionary.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Generate from a prompt and print tokens as they come (with beams: when the search is done).

    Example: [bold]ovq generate --model runs/ovq --prompt "12 7 33 1 12" --max-new-tokens 1[/bold]

    After a document read by [bold]ovq context build[/bold]: [bold]ovq generate --model DIR --context book.ctx
    --prompt "12 7"[/bold]

    With sampling: [bold]ovq generate --model DIR --prompt-file - --temperature 0.8 --top-p 0.95 <
    prompt.txt[/bold]
    """
    text = _read_prompt(prompt, prompt_file)
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p: expected a number above 0 and at most 1, found {top_p}")
    if top_p < 1 and temperature == 0:
        raise ValueError("--top-p: expected --temperature above 0 beside it, found 0, which does not sample")
    check_model_folder(model)
    if context is not None and not context.is_file():
        raise ValueError(f"--context: expected a file of ovq context build, found no file {context}")

    import torch
    from transformers import set_seed

    from ovq.hf import load_context

    tokenizer = load_tokenizer(model)
    loaded = load_model(model, num_slots=num_slots)
    vocab_size = loaded.config.vocab_size
    # What follows a document does not begin a text: no token says so.
    ids = encode(text, tokenizer, vocab_size=vocab_size, flag="--prompt", is_start=context is None)
    if context is None:
        inputs = {"input_ids": torch.tensor([ids], device=loaded.device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        inputs = load_context(context, loaded).inputs([ids])
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    set_seed(seed)
    output = loaded.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        streamer=_Streamer(tokenizer) if num_beams == 1 else None,
        **sampling,
    )
    if num_beams > 1:
        new_ids = output[0, len(ids) :].tolist()
        typer.echo(_decode(new_ids, tokenizer))


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from wherever it is to come."""
    if (prompt is None) == (prompt_file is None):
        raise ValueError("expected one of --prompt and --prompt-file, found both or neither")
    if prompt is not None:
        return prompt
    return sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text()


def _decode(ids: list[int], tokenizer: Any | None) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)


class _Streamer:
    """Prints what `generate` hands over, token by token, without the prompt."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._printed = ""
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """Take new token ids; the first call brings the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.reshape(-1).tolist()
        text = _decode(self._ids, self._tokenizer)
        # A character may be spread over several tokens and shows as a replacement mark until the last has
        # come.
        if not text.endswith("\ufffd"):
            self._print(text)

    def end(self) -> None:
        """Finish the line."""
        self._print(_decode(self._ids, self._tokenizer))
        typer.echo()

    def _print(self, text: str) -> None:
        # The whole text is decoded anew each time, as a tokenizer may join a token with the one before it.
        typer.echo(text[len(self._printed) :], nl=False)
        sys.stdout.flush()
        self._printed = text

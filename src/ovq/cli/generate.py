"""`ovq generate`: continue a prompt with a trained model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli import options
from ovq.cli.common import as_text, read_text
from ovq.cli.loading import check_generating_folder, load_any_model, load_tokenizer
from ovq.prompts import chat_ids, chat_of_note, check_chat_template, encode, ids_after

if TYPE_CHECKING:
    from ovq.hf import Context, OVQForCausalLM


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None,
        typer.Option(help="The prompt: text if the model has a tokenizer, else token ids such as '12 7 33'."),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="Read the prompt from a file; - for standard input.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt is a user's message: apply the tokenizer's chat template."),
    ] = False,
    context: Annotated[Path | None, typer.Option(help="Continue after a file of ovq context build.")] = None,
    max_new_tokens: Annotated[
        int,
        options.number_up_to(
            options.MOST_TOKENS, "Most tokens to generate; 0 for no limit but an end token."
        ),
    ] = 32,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")] = False,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that have occurred less likely.")
    ] = 1.0,
    num_beams: Annotated[
        int, typer.Option(min=1, help="Beams of beam search; above 1, all is printed at the end.")
    ] = 1,
    num_slots: options.NumSlots = None,
    merge: options.MergeRule = None,
    logn_length: options.LognLength = None,
    state_dtype: options.StateDtype = None,
    weight_dtype: options.WeightDtype = None,
    seed: options.Seed = 0,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token ids, and why it ended.")
    ] = False,
) -> None:
    """Generate from a prompt and print tokens as they come.

    Only the model's state is kept from token to token. With [bold]--max-new-tokens 0[/bold] a model without
    full attention therefore runs in constant memory until an end token, or until Ctrl-C.

    Example: [bold]ovq generate --model runs/ovq --prompt "12 7 33 1 12" --max-new-tokens 1[/bold]

    After a document read by [bold]ovq context build[/bold]: [bold]ovq generate --model DIR --context book.ctx
    --prompt "12 7"[/bold]

    With the merge rule of the best recall: [bold]ovq generate --model DIR --merge nearest
    --prompt "12 7"[/bold]

    With sampling: [bold]ovq generate --model DIR --prompt-file - --temperature 0.8 --top-p 0.95 <
    prompt.txt[/bold]
    """
    text, flag = _read_prompt(prompt, prompt_file)
    check_generating_folder(model)
    if context is not None and not context.is_file():
        raise ValueError(f"--context: expected a file of ovq context build, found no file {context}")
    if num_beams > 1 and max_new_tokens == 0:
        raise ValueError("--num-beams: expected --max-new-tokens above 0 beside it, as the search must end")

    import torch
    from transformers import set_seed

    from ovq.hf import load_context
    from ovq.hf.streaming import stream_text, stream_tokens

    sampling = options.sampling_of(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    loaded = load_any_model(
        model,
        num_slots=num_slots,
        merge=merge,
        logn_length=logn_length,
        state_dtype=state_dtype,
        weight_dtype=weight_dtype,
    )
    tokenizer = load_tokenizer(model)
    if chat:
        check_chat_template(tokenizer, name="--chat")
    document = None if context is None else load_context(context, loaded)
    messages, read = _chat_before(document, is_chat=chat)
    vocab_size = loaded.config.vocab_size
    if chat:
        asked = [*messages, {"role": "user", "content": text}]
        ids = ids_after(read, chat_ids(asked, tokenizer, vocab_size=vocab_size, name=flag), name=flag)
    else:
        # A prompt after a document does not begin a text, so it gets no begin token.
        ids = encode(text, tokenizer, vocab_size=vocab_size, name=flag, is_start=document is None)
    set_seed(seed)
    ends = None if ignore_eos else loaded.generation_config.eos_token_id
    if json_ and max_new_tokens == 0 and ends is None:
        raise ValueError("--json: expected --max-new-tokens above 0, or an end token, as the text must end")
    tokens: Iterable[int]
    if num_beams > 1:
        tokens = _search(
            loaded,
            ids,
            document,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            eos_token_id=ends,
            **sampling.options,
        )
    else:
        stream = stream_tokens(
            loaded,
            ids,
            cache=None if document is None else document.cache(),
            sampling=sampling,
            eos_token_id=ends,
            generator=torch.Generator(loaded.device).manual_seed(seed),
        )
        tokens = islice(stream, max_new_tokens or None)
    if not json_:
        _print(stream_text(tokens, tokenizer, prompt=ids))
        return
    found = list(tokens)
    is_end = bool(found) and found[-1] in (ends if isinstance(ends, list) else [ends])
    # Field names as in server responses.
    answer = {
        "text": "".join(stream_text(found, tokenizer, prompt=ids)),
        "token_ids": found,
        "finish_reason": "stop" if is_end else "length",
        "prompt_tokens": len(ids),
        "completion_tokens": len(found),
    }
    typer.echo(json.dumps(answer, indent=2))


def _read_prompt(prompt: str | None, prompt_file: str | None) -> tuple[str, str]:
    """The prompt, and the option that gave it, for errors."""
    if prompt is not None and prompt_file is None:
        return as_text(prompt, flag="--prompt"), "--prompt"
    if prompt is None and prompt_file is not None:
        return read_text(prompt_file, flag="--prompt-file"), "--prompt-file"
    raise ValueError("expected one of --prompt and --prompt-file, found both or neither")


def _chat_before(document: Context | None, *, is_chat: bool) -> tuple[list[dict[str, str]], list[int]]:
    """The messages that a context has read as a chat, and their tokens; none of a document."""
    if document is None:
        return [], []
    try:
        before = chat_of_note(document.note, num_tokens=document.num_tokens, is_chat=is_chat)
    except ValueError as error:
        raise ValueError(f"--context: {error}") from None
    if before[0] and not is_chat:
        raise ValueError("--context: expected --chat beside a file that has read a chat, found none")
    return before


def _search(model: OVQForCausalLM, ids: list[int], document: Context | None, **options: Any) -> list[int]:
    """The tokens of beam search after a prompt."""
    import torch

    prompt = torch.tensor([ids], device=model.device)
    inputs: dict[str, Any] = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if document is not None:
        inputs = document.inputs([ids])
    return model.generate(**inputs, **options)[0, len(ids) :].tolist()


def _print(pieces: Iterable[str]) -> None:
    """Print each piece at once, and end the line at the end, also after Ctrl-C."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)

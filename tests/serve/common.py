"""A server in a thread, and models small enough to be asked many things."""

import asyncio
import contextlib
import socket
import threading
import time

import openai
import torch
import uvicorn

from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.streaming import Sampling, stream_tokens
from ovq.serve.app import Service, create_app
from ovq.serve.limits import Limits
from ovq.serve.model import ServedModel
from ovq.serve.server import uvicorn_config
from ovq_lab.text import byte_tokenizer
from tests.convert.common import converted
from tests.hf.common import SIZES, left_padded, make_model

# Clients to close after a test: left to the garbage collector, they would warn in whatever test comes later.
CLIENTS: list[openai.OpenAI] = []
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def reading_service(seed=0, limits=None, **changes):
    """A model that reads token ids, in float64, so that rounding flips no choice."""
    model = make_model(seed, **changes)
    return Service(name="ids", served=ServedModel(model), limits=limits or Limits())


def converted_model():
    """A converted model in float64, whose answers do not end."""
    # Longer chunks are merged more seldom, which takes most of the time in float64.
    model = converted(window=[[16, 32], [16, 16]], chunk_size=16).double()
    model.generation_config.eos_token_id = None
    return model


def converted_service(limits=None):
    """The same, to be served."""
    return Service(name="converted", served=ServedModel(converted_model()), limits=limits or Limits())


def text_service(limits=None):
    """A model that reads bytes, with a chat template."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 257, "num_hidden_layers": 2, "mixer_types": ["sliding_attention", "ovq"]}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = OVQForCausalLM(OVQConfig(**sizes)).double().eval()
    return Service(name="text", served=ServedModel(model), tokenizer=tokenizer, limits=limits or Limits())


def greedy(model, prompt, num_tokens, before=()):
    """What `generate` gives after a prompt."""
    ids = torch.tensor([[*before, *prompt]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def greedy_batch(model, prompts, num_tokens):
    """The same for several prompts."""
    ids, mask = left_padded([torch.tensor(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return out[:, ids.shape[1] :].tolist()


def sampled(model, prompt, num_tokens, *, seed, **options):
    """What `ovq generate --seed` gives after a prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = stream_tokens(model, prompt, sampling=Sampling(**options), generator=generator)
    return [next(tokens) for _ in range(num_tokens)]


class Server(uvicorn.Server):
    """uvicorn in a thread, at a port of its own."""

    def __init__(self, service, **options):
        self.service = service
        app = create_app(service, **options)
        super().__init__(uvicorn_config(app, service.limits, shutdown_seconds=20, log_level="error"))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run, args=([self.socket],), daemon=True)

    async def startup(self, sockets=None):
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @property
    def num_tasks(self):
        return len(asyncio.all_tasks(self.loop))

    def stop(self):
        self.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(service, **options):
    server = Server(service, **options)
    server.thread.start()
    until(lambda: server.started)
    try:
        yield server
    finally:
        server.stop()
        server.socket.close()


def is_idle(server):
    engine = server.service.engine
    return (engine.scheduler.num_rows, engine.num_waiting, engine.scheduler.state_bytes) == (0, 0, 0)


def until(condition, seconds=30):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def client_of(server, **options):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)
    CLIENTS.append(client)
    return client


def complete(server, prompt, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client_of(server).completions.create(model=server.service.name, prompt=prompt, **options)


def answer_tokens(answer):
    return [[int(word) for word in choice.text.split()] for choice in answer.choices]

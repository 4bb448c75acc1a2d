"""The server as its users meet it: OpenAI's own client, many at once, over real connections."""

import concurrent.futures
import contextlib
import functools
import re
import time
import urllib.parse

import httpx
import openai
import pytest
import torch

from ovq import convert
from ovq.hf.streaming import stream_text
from ovq.serve.limits import Limits
from tests.hf.common import BASELINES, is_greedy, make_model, random_ids
from tests.serve.common import (
    answer_tokens,
    client_of,
    complete,
    converted_service,
    greedy,
    greedy_batch,
    is_idle,
    reading_service,
    running,
    sampled,
    until,
)

PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 5, 9, 23)]
DOCUMENT = random_ids(1, 61, seed=3)[0].tolist()


def test_the_models_that_there_are(ids):
    client = client_of(ids)
    assert [model.id for model in client.models.list()] == ["ids"]
    assert client.models.retrieve("ids").object == "model"
    with pytest.raises(
        openai.NotFoundError, match="model: expected 'ids', which is served here, found 'gpt'"
    ):
        client.models.retrieve("gpt")
    assert httpx.get(f"{ids.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/ids", "/v1/contexts"])
def test_whoever_asks_for_the_head_gets_it_alone(ids, path):
    """As health checks of containers do."""
    head, whole = httpx.head(ids.url + path), httpx.get(ids.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize("name", ["org/model", "org/part/a model: 100% \xe9 ?#"])
def test_a_model_is_found_by_the_name_it_is_listed_under(name):
    service = reading_service()
    service.name = name
    with running(service) as server:
        client = client_of(server)
        (listed,) = client.models.list()
        assert listed.id == name
        # By hand, as older clients quote nothing.
        for safe in ("/", ""):
            quoted = urllib.parse.quote(name, safe=safe)
            assert httpx.get(f"{server.url}/v1/models/{quoted}").json()["id"] == name
        assert complete(server, PROMPTS[0], max_tokens=1).model == name
        assert httpx.get(f"{server.url}/v1/models/org").status_code == 404


@pytest.mark.parametrize("changes", [{}, BASELINES], ids=["ovq", "baselines"])
def test_32_clients_at_once_get_what_generate_gives(changes, ids):
    model = ids.service.served.model if not changes else make_model(**changes)
    prompts = [random_ids(1, 1 + 3 * n % 17, seed=n)[0].tolist() for n in range(32)]
    sizes = [1 + 5 * n % 13 for n in range(32)]
    with running(reading_service(**changes)) as server, concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda p, n: complete(server, p, max_tokens=n), prompts, sizes))
        assert is_idle(server)
    expected = greedy_batch(model, prompts, max(sizes))
    for answer, prompt, size, tokens in zip(answers, prompts, sizes, expected, strict=True):
        assert answer_tokens(answer) == [tokens[:size]]
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), size)


def test_several_prompts_and_several_answers(ids):
    model, options = ids.service.served.model, {"temperature": 1.2, "top_p": 0.9}
    answer = complete(ids, PROMPTS[1:3], n=2, seed=5, max_tokens=6, **options)
    expected = [sampled(model, p, 6, seed=seed, **options) for p in PROMPTS[1:3] for seed in (5, 6)]
    assert answer_tokens(answer) == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len(PROMPTS[1]) + len(PROMPTS[2])
    words = " ".join(map(str, PROMPTS[1]))
    assert answer_tokens(complete(ids, [words])) == [greedy(model, PROMPTS[1], 12)]
    # OpenAI's default number of tokens.
    assert len(answer_tokens(complete(ids, words, max_tokens=None))[0]) == 16
    extra = {"top_k": 1}
    assert answer_tokens(complete(ids, words, temperature=1, extra_body=extra)) == [
        greedy(model, PROMPTS[1], 12)
    ]


def test_a_converted_model_is_served_like_any_other(tmp_path):
    service = converted_service()
    model = service.served.model
    path = tmp_path / "book.ctx"
    convert.save_context(convert.build_context(model, DOCUMENT), path)
    # Each in a thread of its own, after three contexts or none; windows of 16 and 32 are left far behind.
    asked = [(name, place) for name in (None, "file", "up", "built") for place in range(4)]
    with running(service) as server, concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        service.contexts.add("file", service.served.load_context(path))
        url, upload = f"{server.url}/v1/contexts", {"headers": {"Content-Type": "application/octet-stream"}}
        for content, status in ((path.read_bytes(), 201), (path.read_bytes()[:-1], 400)):
            found = httpx.post(f"{url}?name=up{status}", content=content, **upload)
            assert found.status_code == status
        built = httpx.post(url, json={"name": "built", "token_ids": DOCUMENT}).json()
        assert (built["num_tokens"], built["bytes"]) == (len(DOCUMENT), service.contexts.get("file").nbytes)

        def ask(name, place):
            context = {"context": "up201" if name == "up" else name} if name else {}
            chunks = complete(
                server, PROMPTS[place], max_tokens=6 + 9 * place, stream=True, extra_body=context
            )
            return "".join(choice.text for chunk in chunks for choice in chunk.choices).split()

        answers = list(pool.map(lambda a: ask(*a), asked))
        assert is_idle(server)
    found = {}
    for (name, place), answer in zip(asked, answers, strict=True):
        # The same after each of the contexts.
        assert found.setdefault((name is not None, place), answer) == answer, (name, place)
    for (is_after, place), answer in found.items():
        assert len(answer) == 6 + 9 * place
        text = torch.tensor([*(DOCUMENT if is_after else ()), *PROMPTS[place], *map(int, answer)])
        assert is_greedy(model, text, len(answer)), (is_after, place)


def test_a_stream_is_the_whole_in_pieces(text):
    options = {"prompt": "Say it", "max_tokens": 20, "n": 2, "temperature": 0.8, "seed": 3}
    whole = complete(text, **options)
    texts, reasons, usage = ["", ""], [None, None], None
    # Without counts, chunks do not have their field.
    assert not any("usage" in chunk.model_fields_set for chunk in complete(text, **options, stream=True))
    for chunk in complete(text, **options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert "usage" in chunk.model_fields_set
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length", "length"]
    assert usage == whole.usage
    tokens = sampled(text.service.served.model, list(b"Say it"), 20, seed=4, temperature=0.8)
    assert texts[1] == "".join(stream_text(tokens, text.service.texts._tokenizer, prompt=list(b"Say it")))
    assert texts[0] != texts[1]


def test_chats(text):
    client = client_of(text)
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a slot?"}],
        },
    ]
    create = functools.partial(
        client.chat.completions.create, model="text", messages=messages, max_tokens=9, temperature=0
    )
    answer = create(logprobs=True, top_logprobs=2)
    rendered = "system: Be brief.\nuser: What is a slot?\nassistant:"
    assert answer.choices[0].message.content == complete(text, rendered, max_tokens=9).choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(rendered)
    assert len(answer.choices[0].logprobs.content) == 9
    assert all(one.logprob == one.top_logprobs[0].logprob for one in answer.choices[0].logprobs.content)
    said = b"".join(bytes(one.bytes) for one in answer.choices[0].logprobs.content)
    assert said.decode(errors="replace") == answer.choices[0].message.content
    with create(stream=True) as chunks:
        deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == answer.choices[0].message.content
    assert create(max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    # Another name of the role of the system.
    messages[0]["role"] = "developer"
    assert create().choices[0].message.content == answer.choices[0].message.content


def test_a_chat_without_a_template_is_refused(ids):
    with pytest.raises(openai.BadRequestError, match="has a chat template, found no tokenizer: use /v1/comp"):
        client_of(ids).chat.completions.create(model="ids", messages=[{"role": "user", "content": "1"}])


def test_stop_sequences_end_an_answer_and_are_not_shown(ids):
    tokens = greedy(ids.service.served.model, PROMPTS[1], 12)
    stop = f" {tokens[4]} {tokens[5]}"
    shown = " ".join(map(str, tokens)).partition(stop)[0]
    assert 0 < len(shown.split()) <= 4
    until(lambda: is_idle(ids))
    counts = ids.service.engine.scheduler.counts
    finished, cancelled = counts.finished, counts.cancelled
    for is_stream in (False, True):
        answer = complete(ids, PROMPTS[1], stop=["nowhere", stop], max_tokens=4000, stream=is_stream)
        chunks = list(answer) if is_stream else [answer]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == shown
        assert chunks[-1].choices[0].finish_reason == "stop"
    assert answer is not None
    until(lambda: is_idle(ids))
    assert (counts.finished, counts.cancelled) == (finished + 2, cancelled)


def test_an_end_token_ends_an_answer_unless_it_is_ignored(text):
    model = text.service.served.model
    tokens = greedy(model, list(b"abc"), 30)
    end = next(token for token in tokens[3:] if tokens.index(token) >= 3)
    model.generation_config.eos_token_id = [end, 256]
    try:
        answer = complete(text, "abc", max_tokens=30)
        ignoring = complete(text, "abc", max_tokens=30, extra_body={"ignore_eos": True})
    finally:
        model.generation_config.eos_token_id = None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens.index(end) + 1
    assert (ignoring.choices[0].finish_reason, ignoring.usage.completion_tokens) == ("length", 30)


def test_logprobs_of_completions(ids):
    found = complete(ids, PROMPTS[1], max_tokens=4, logprobs=2).choices[0]
    assert found.logprobs.tokens == found.text.split()
    assert [max(top.values()) for top in found.logprobs.top_logprobs] == found.logprobs.token_logprobs
    assert all(len(top) == 2 for top in found.logprobs.top_logprobs)
    with torch.no_grad():
        expected = ids.service.served.model(torch.tensor([PROMPTS[1]])).logits[0, -1].log_softmax(-1).max()
    assert found.logprobs.token_logprobs[0] == pytest.approx(float(expected), abs=1e-5)


def test_fields_that_change_nothing_are_taken(ids):
    neutral = {"best_of": 1, "echo": False, "presence_penalty": 0, "logit_bias": None, "suffix": None}
    answer = complete(ids, PROMPTS[1], user="me", extra_body=neutral, max_tokens=2)
    assert answer_tokens(answer) == [greedy(ids.service.served.model, PROMPTS[1], 2)]


def test_null_stands_for_the_default(ids):
    names = ("temperature", "top_p", "n", "max_tokens", "stream", "stop", "logprobs", "top_k", "ignore_eos")
    body = {"model": "ids", "prompt": PROMPTS[1], "seed": 3}
    plain, nulls = (
        httpx.post(f"{ids.url}/v1/completions", json=body | fields) for fields in ({}, dict.fromkeys(names))
    )
    assert nulls.status_code == 200, nulls.text
    assert nulls.json()["choices"] == plain.json()["choices"]


def num_requests(server, *, status):
    """How many requests for completions the metrics count with this status."""
    found = re.findall(
        rf'ovq_requests_total{{route="/v1/completions",status="{status}"}} (.+)',
        server.service.metrics.text().decode(),
    )
    return float(found[0]) if found else 0


@pytest.mark.parametrize("is_stream", [True, False])
def test_clients_that_are_killed_leave_nothing(ids, is_stream):
    """Eight of them, some answered already and some waiting for their turn."""
    body = {"model": "ids", "prompt": [1], "max_tokens": 4000, "ignore_eos": True, "n": 8}
    cancelled = ids.service.engine.scheduler.counts.cancelled
    num_tasks, num_gone = ids.num_tasks, num_requests(ids, status=499)
    clients = [httpx.Client(timeout=0.5) for _ in range(8)]

    def ask(client):
        with (
            contextlib.suppress(httpx.TimeoutException),
            client.stream("POST", f"{ids.url}/v1/completions", json=body | {"stream": is_stream}) as answer,
        ):
            next(answer.iter_lines())
            time.sleep(0.2)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, clients))
    for client in clients:
        client.close()
    # Those that a busy server has yet to see count, too.
    until(lambda: ids.service.engine.scheduler.counts.cancelled == cancelled + 8)
    until(lambda: is_idle(ids))
    until(lambda: ids.num_tasks <= num_tasks)
    # Also those whose answers began with the status 200.
    until(lambda: num_requests(ids, status=499) == num_gone + 8)
    assert answer_tokens(complete(ids, PROMPTS[1])) == [greedy(ids.service.served.model, PROMPTS[1], 12)]


def test_metrics(ids):
    complete(ids, PROMPTS[1], max_tokens=3)
    httpx.get(f"{ids.url}/v1/contexts/none")
    lines = httpx.get(f"{ids.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    counts = ids.service.engine.scheduler.counts
    assert float(values["ovq_generated_tokens_total"]) == counts.generated_tokens > 0
    assert float(values["ovq_rows_running"]) == float(values["ovq_state_bytes"]) == 0
    assert float(values['ovq_requests_total{route="/v1/completions",status="200"}']) > 0
    # A name that a client makes up is no label.
    assert float(values['ovq_requests_total{route="/v1/contexts/{name}",status="404"}']) > 0
    assert float(values["ovq_first_token_seconds_count"]) > 0
    assert float(values["process_resident_memory_bytes"]) > 0


def test_a_full_queue_and_a_long_wait(monkeypatch):
    limits = Limits(max_rows=1, max_queue=1, request_seconds=1.5, max_body_bytes=3000)
    with running(reading_service(limits=limits)) as server:
        body = {"model": "ids", "prompt": [1], "max_tokens": 4000, "ignore_eos": True, "stream": True}
        ask = functools.partial(httpx.stream, "POST", f"{server.url}/v1/completions", timeout=20)
        with ask(json=body) as first:
            lines = first.iter_lines()
            next(lines)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                second = pool.submit(complete, server, [1], max_tokens=4000)
                until(lambda: server.service.engine.num_waiting == 1)
                with pytest.raises(openai.RateLimitError, match="at most 1 waiting prompts, found 2") as full:
                    complete(server, [1])
                assert full.value.response.headers["x-should-retry"] == "true"
                assert full.value.code == "queue_full"
                with pytest.raises(
                    openai.InternalServerError, match=r"not complete after 1\.5 seconds"
                ) as late:
                    second.result()
            assert late.value.response.status_code == 504
            assert late.value.response.headers["x-should-retry"] == "false"
            # A stream has begun with 200, so the error is its last event.
            assert '"code":"timeout"' in [line for line in lines if line][-1]
        until(lambda: is_idle(server))
        # Of the stream, too.
        until(lambda: num_requests(server, status=504) == 2)
        assert num_requests(server, status=200) == 0
        assert complete(server, [1], max_tokens=2).usage.completion_tokens == 2
        with pytest.raises(openai.APIStatusError, match="a body of at most 3000 bytes") as large:
            complete(server, [1] * 2000)
        assert large.value.status_code == 413
        chunked = httpx.post(
            f"{server.url}/v1/completions",
            content=(b" " * 1000 for _ in range(5)),
            headers={"Content-Type": "application/json"},
        )
        assert chunked.status_code == 413


def test_a_fault_is_answered_and_others_are_served(monkeypatch):
    with running(reading_service()) as server:
        rows = server.service.engine.scheduler._model
        start = rows.start

        def failing(context):
            raise RuntimeError("a secret of the machine")

        monkeypatch.setattr(rows, "start", failing)
        with pytest.raises(openai.InternalServerError, match="the server failed, see its log") as failed:
            complete(server, [1])
        assert "secret" not in str(failed.value)
        monkeypatch.setattr(rows, "start", start)
        assert complete(server, [1], max_tokens=2).usage.completion_tokens == 2


def test_a_server_that_ends_answers_what_it_has_begun():
    with running(reading_service()) as server:
        model = server.service.served.model
        chunks = complete(server, PROMPTS[1], max_tokens=60, stream=True)
        texts = [next(chunks).choices[0].text]
        server.should_exit = True
        texts += [chunk.choices[0].text for chunk in chunks]
        assert [int(word) for word in "".join(texts).split()] == greedy(model, PROMPTS[1], 60)
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert not server.service.engine.is_running
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")

"""What the server refuses, in the form of OpenAI's errors."""

import http.client
import json
import socket

import httpx
import pytest

from ovq.serve.bodies import parsed
from ovq.serve.chat import ChatRequest
from ovq.serve.errors import APIError
from ovq.serve.limits import Limits
from ovq.serve.schemas import CompletionRequest, ContextRequest
from tests.serve.common import reading_service, running

BAD = [
    ({"model": "other"}, 404, "model: expected 'ids'"),
    ({"prompt": None}, 400, "prompt: expected text, a list of token ids, or a list of either, found"),
    ({"prompt": [1, "2"]}, 400, "prompt: expected text, a list of token ids"),
    ({"prompt": []}, 400, "prompt: expected at least one token, found none"),
    ({"prompt": ""}, 400, "prompt: expected at least one token, found none"),
    ({"prompt": "12 x"}, 400, "prompt: expected token ids such as '12 7 33' (the model has no tokenizer)"),
    ({"prompt": [1, 48]}, 400, "prompt: expected token ids from 0 to 47, found 48"),
    ({"prompt": [-1]}, 400, "prompt: expected token ids from 0 to 47, found -1"),
    ({"prompt": [[1]] * 300}, 400, "prompt: expected at most 256 prompts, found 300"),
    ({"prompt": [[1], [1] * 65_537]}, 400, "prompt: expected at most 65536 tokens, found 65537"),
    ({"max_tokens": 0}, 400, "max_tokens: expected at least 1, found 0"),
    ({"max_tokens": 5000}, 400, "max_tokens: expected at most 4096, found 5000"),
    ({"max_tokens": "5"}, 400, "max_tokens: expected a valid integer, found '5'"),
    ({"n": 33}, 400, "n: expected at most 32, found 33"),
    ({"temperature": -1}, 400, "temperature: expected at least 0, found -1"),
    ({"temperature": 1e39}, 400, "temperature: expected 0, or from 1e-06 to 1e+06, found 1e+39"),
    ({"temperature": 1e999}, 400, "expected a body of JSON, found otherwise"),
    ({"top_p": 0}, 400, "top_p: expected more than 0, found 0"),
    ({"echo": True}, 400, "echo: expected False, as nothing else is supported, found True"),
    ({"best_of": 3}, 400, "best_of: expected 1, as nothing else is supported, found 3"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty: expected 0, as nothing else is supported"),
    (
        {"logit_bias": {"1": "x" * 999}},
        400,
        f"logit_bias: expected {{}}, as nothing else is supported, found {{'1': '{'x' * 73}...",
    ),
    (
        {"stop": ["x" * 999] * 17},
        400,
        f"stop: expected at most 16 sequences, none of them empty, found ['{'x' * 78}...",
    ),
    ({"temprature": 1}, 400, "temprature: expected fields of this request, found an unknown one"),
    ({"logprobs": 21}, 400, "logprobs: expected at most 20, found 21"),
    ({"stream_options": {}}, 400, "stream_options: expected stream true beside it, found false"),
    ({"stop": [""]}, 400, "stop: expected at most 16 sequences, none of them empty"),
    ({"context": "no"}, 404, "context: expected one of [], found 'no'"),
    ({"context": "../x"}, 404, "context: expected one of [], found '../x'"),
]


@pytest.mark.parametrize(("changes", "status", "expected"), BAD, ids=[str(row[0])[:30] for row in BAD])
def test_what_cannot_be_answered_is_refused_in_openai_s_form(ids, changes, status, expected):
    body = json.dumps({"model": "ids", "prompt": [1], "max_tokens": 2, **changes})
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{ids.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["message"].startswith(expected)
    assert len(answer.json()["error"]["message"]) < 300
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages: expected at least 1 item"),
        (
            [{"role": "robot", "content": "x"}],
            "messages.0.role: expected 'system', 'developer', 'user', 'ass",
        ),
        ([{"role": "user", "content": None}], "messages.0.content: expected text, found none"),
        ([{"role": "user", "content": 3}], "messages.0.content: expected text or a list of parts"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                }
            ],
            "messages.0.content: expected text or a list of parts of the type 'text', found something else",
        ),
    ],
    ids=["none", "role", "nothing", "number", "image"],
)
def test_messages_that_cannot_be_read(text, messages, expected):
    answer = httpx.post(f"{text.url}/v1/chat/completions", json={"model": "text", "messages": messages})
    assert answer.status_code == 400
    assert expected in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "name", "found"),
    [
        ({"max_tokens": 5000}, "max_tokens", 5000),
        ({"max_completion_tokens": 5000}, "max_completion_tokens", 5000),
        ({"max_tokens": 6000, "max_completion_tokens": 5000}, "max_completion_tokens", 5000),
    ],
)
def test_an_answer_that_is_too_long_is_refused_by_the_name_it_was_given(text, given, name, found):
    body = {"model": "text", "messages": [{"role": "user", "content": "x"}], **given}
    error = httpx.post(f"{text.url}/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["message"]) == (name, f"{name}: expected at most 4096, found {found}")


@pytest.mark.parametrize("logprobs", [None, False])
def test_likeliest_tokens_without_logprobs(text, logprobs):
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "text", "messages": messages, "max_tokens": 1, "logprobs": logprobs}
    answer = httpx.post(f"{text.url}/v1/chat/completions", json=body | {"top_logprobs": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_logprobs")
    assert answer.json()["error"]["message"] == "top_logprobs: expected logprobs true beside it, found false"
    # As many as there are without it.
    answer = httpx.post(f"{text.url}/v1/chat/completions", json=body | {"top_logprobs": 0})
    assert answer.json()["choices"][0]["logprobs"] is None


def test_a_default_is_not_above_the_limit():
    with running(reading_service(limits=Limits(max_tokens=8))) as server:
        ask = {"model": "ids", "prompt": [1], "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=ask)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 8)


@pytest.mark.parametrize(
    "field",
    [
        *({"prompt_cache_key": "a"}, {"safety_identifier": "a"}, {"service_tier": "auto"}),
        *({"prediction": None}, {"verbosity": "medium"}, {"web_search_options": None}),
    ],
    ids=str,
)
def test_fields_that_change_no_answer_are_ignored(text, field):
    ask = {"model": "text", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert httpx.post(f"{text.url}/v1/chat/completions", json=ask | field).status_code == 200


def test_routes_and_methods_there_are_not(ids):
    for method, path, status in (("GET", "/v1/nothing", 404), ("DELETE", "/v1/completions", 405)):
        answer = httpx.request(method, ids.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "sent", [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET /health HTTP/1.1\r\n\r\n"], ids=str
)
def test_what_is_no_request_gets_an_error_like_others(ids, sent):
    """As a client that speaks HTTPS gets it, or one that names no host."""
    with socket.create_connection(ids.socket.getsockname(), timeout=30) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        error = json.loads(answer.read())["error"]
        # The server closes the connection.
        assert connection.recv(1) == b""
    assert (answer.status, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == "expected an HTTP request, found otherwise"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": [0.5] * 999}),
        (CompletionRequest, {"prompt": [["a"] * 999]}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 999}),
        (ContextRequest, {"name": "a", "token_ids": ["1"] * 999}),
        (ChatRequest, {"messages": [1] * 999}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 999}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [1] * 999}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "tools": [1] * 99}),
    ],
    ids=["floats", "words", "stop", "context", "messages", "parts", "calls", "tools"],
)
def test_of_many_wrong_items_one_is_found(kind, fields):
    """A million errors take gigabytes, and the time of all clients."""
    model = {} if kind is ContextRequest else {"model": "a"}
    with pytest.raises(APIError, match="expected ") as refused:
        parsed(kind, json.dumps(model | fields).encode())
    # One of each alternative.
    assert refused.value.__cause__.error_count() <= 4

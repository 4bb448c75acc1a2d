"""What is refused before a request is looked at, without a network."""

import asyncio
import re
import socket
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ovq.serve.app import create_app
from ovq.serve.limits import Limits
from ovq.serve.metrics import Metered
from ovq.serve.server import bound_socket, is_loopback, url_of
from tests.serve.common import reading_service

HOSTS = ["localhost", "127.0.0.1", "[::1]"]


def ask(app, method, path, host="localhost", **options):
    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.fixture(scope="module")
def service():
    return reading_service(limits=Limits(read_seconds=0.2, request_seconds=0.2))


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        ("Basic secret", 401),
        ("Bearer secre", 401),
        ("Bearer s\xe9cret", 401),
        ("Bearer secret", 200),
        ("bearer secret", 200),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/contexts", "/metrics", "/openapi.json"])
def test_a_key_is_asked_for(service, path, header, status):
    app = create_app(service, api_key="secret")
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = ask(app, "GET", path, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "secret" not in answer.text


def test_health_needs_no_key_and_tells_whether_requests_are_answered(service):
    answer = ask(create_app(service, api_key="secret"), "GET", "/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "stopped"})


def test_a_client_that_got_no_answer_has_a_status_of_its_own(service):
    async def silent(scope, receive, send):
        return

    asyncio.run(Metered(silent, metrics=service.metrics)({"type": "http"}, None, None))
    assert b'ovq_requests_total{route="other",status="499"} 1.0' in service.metrics.text()


def test_refused_requests_are_counted_by_their_route():
    app = create_app(reading_service(limits=Limits(max_body_bytes=2)), api_key="secret", hosts=HOSTS)
    key = {"Authorization": "Bearer secret"}
    for host, headers, status in (
        ("evil.example", key, 421),
        ("localhost", {}, 401),
        ("localhost", key, 415),
        ("localhost", {**key, "Content-Type": "application/json"}, 413),
    ):
        answer = ask(app, "POST", "/v1/completions", host=host, content=b"{ }", headers=headers)
        assert answer.status_code == status
        counted = ask(app, "GET", "/metrics", headers=key).text
        assert f'ovq_requests_total{{route="/v1/completions",status="{status}"}} 1.0' in counted


def test_a_prompt_after_a_context_does_not_begin_a_text(service, monkeypatch):
    seen = []
    monkeypatch.setattr(service.texts, "encode", lambda *args, is_start, **_: seen.append(is_start) or [1])
    monkeypatch.setattr(service.contexts, "get", lambda name: SimpleNamespace(num_tokens=3, note=""))
    for context in (None, "book"):
        body = {"model": "ids", "prompt": [1], "context": context}
        ask(create_app(service), "POST", "/v1/completions", json=body)
    assert seen == [True, False]


def test_without_an_engine_requests_are_refused(service):
    body = {"model": "ids", "prompt": [1]}
    answer = ask(create_app(service), "POST", "/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST:1", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example:8000", 421),
    ],
)
def test_pages_of_other_sites_do_not_reach_a_server_without_a_key(service, host, status):
    """They can have a name of their own point at this machine, but cannot choose the header."""
    assert ask(create_app(service, hosts=HOSTS), "GET", "/v1/models", host=host).status_code == status
    assert ask(create_app(service), "GET", "/v1/models", host=host).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/contexts"])
def test_bodies_that_browsers_send_without_asking_are_refused(service, kind, path):
    answer = ask(create_app(service), "POST", path, content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert answer.json()["error"]["message"] == f"Content-Type: expected application/json, found {kind!r}"


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream", "text/plain"])
def test_a_method_that_a_route_has_not_is_refused_before_the_body(service, kind):
    app = create_app(service)
    paths = {route.path for route in app.routes}
    for path in paths:
        allow = {method for route in app.routes if route.path == path for method in route.methods}
        assert allow
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - allow:
            headers = {"Content-Type": kind}
            answer = ask(app, method, re.sub("{.*}", "a", path), content=b"{", headers=headers)
            assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, allow)
            assert f"expected {answer.headers['allow'].replace(', ', ' or ')}" in answer.text
    assert len(paths) > 6
    counted = ask(app, "GET", "/metrics").text
    assert 'ovq_requests_total{route="/v1/completions",status="405"}' in counted
    # An application that was added gets what is below its path.
    app.mount("/more", Starlette(routes=[Route("/{rest:path}", lambda request: PlainTextResponse("more"))]))
    assert ask(app, "GET", "/more/a").text == "more"


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream"])
def test_a_body_that_never_ends_is_given_up(service, kind):
    async def endless():
        yield b"{"
        await asyncio.sleep(30)

    answer = ask(
        create_app(service),
        "POST",
        "/v1/contexts?name=a",
        content=endless(),
        headers={"Content-Type": kind},
    )
    assert answer.status_code == 408
    assert answer.headers.get("connection", "close") == "close"


def test_an_unknown_path_is_told_in_short(service):
    answer = ask(create_app(service), "GET", f"/{'a' * 10_000}")
    assert (answer.status_code, len(answer.content) < 300) == (404, True)


def test_an_upload_that_is_too_large():
    app = create_app(reading_service(limits=Limits(max_upload_bytes=100)))
    headers = {"Content-Type": "application/octet-stream"}
    events = []

    async def body():
        events.append("read")
        yield b" " * 101

    async def noting(scope, receive, send):
        async def sent(message):
            events.append(message["type"])
            await send(message)

        await app(scope, receive, sent)

    # One that says its size is refused before it is read, so that curl does not send it.
    for own, first in (({}, "read"), ({"Content-Length": "101"}, "http.response.start")):
        events.clear()
        answer = ask(noting, "POST", "/v1/contexts?name=a", content=body(), headers=headers | own)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert events[0] == first


def test_contexts_beyond_the_limit_are_refused():
    service = reading_service(limits=Limits(max_contexts=1))
    with service.contexts.reserved("a"):
        body = {"name": "b", "token_ids": [1]}
        answer = ask(create_app(service), "POST", "/v1/contexts", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "too_many_contexts")


def test_addresses():
    for host, is_local in (("127.0.0.1", True), ("localhost", True), ("127.1", True), ("0.0.0.0", False)):
        with bound_socket(host, 0) as listener:
            assert is_loopback(listener) == is_local
    with bound_socket("127.0.0.1", 0) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname(), timeout=5)
        listener.listen()
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(ValueError, match=f"can listen on, found 127.0.0.1:{port}"):
            bound_socket("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"can listen on, found 192\.0\.2\.1:0"):
        bound_socket("192.0.2.1", 0)

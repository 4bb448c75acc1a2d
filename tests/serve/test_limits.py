"""No route takes a body of any size, and no client holds a connection for ever."""

import asyncio
import contextlib
import functools
import select
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

import ovq.serve.app
import ovq.serve.server
import ovq.serve.texts
from ovq.serve.app import create_app
from ovq.serve.limits import Limits
from ovq.serve.server import uvicorn_config
from tests.serve.common import reading_service, running, text_service, until

LIMITS = Limits(max_body_bytes=1000, max_upload_bytes=2000, read_seconds=0.3, request_seconds=0.3)
KINDS = [
    "application/json",
    "application/octet-stream",
    "text/plain",
    "multipart/form-data; boundary=x",
    None,
]


def routes_of(app):
    """Method and path of all that the application answers, with those it will have one day."""
    found = [
        (method, route.path.replace("{name}", "a").replace("{name:path}", "a/b") + "?name=a")
        for route in app.routes
        for method in sorted(route.methods)
    ]
    assert ("POST", "/v1/completions?name=a") in found
    assert ("GET", "/v1/models/a/b?name=a") in found
    assert not any("{" in path for _, path in found)
    # Those there are not.
    return [*found, ("POST", "/v1/nothing"), ("PUT", "/v1/completions"), ("POST", "/v1/contexts/")]


async def large():
    """More than any limit, of unknown length."""
    for _ in range(30):
        yield b" " * 100


async def endless():
    """A body that does not come."""
    yield b"{"
    await asyncio.sleep(60)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("body", "status"),
    [(lambda: b" " * 3000, 413), (large, 413), (endless, 408)],
    ids=["sized", "chunked", "slow"],
)
def test_every_route_has_a_limit_and_a_deadline(kind, body, status):
    app = create_app(reading_service(limits=LIMITS))

    async def ask_all():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {} if kind is None else {"Content-Type": kind}
            asked = routes_of(app)
            answers = [client.request(*route, content=body(), headers=headers) for route in asked]
            return zip(asked, await asyncio.gather(*answers), strict=True)

    for (method, path), answer in asyncio.run(ask_all()):
        # Refused for its type before it is read.
        is_foreign = method == "POST" and kind != "application/json"
        is_upload = (method, path, kind) == ("POST", "/v1/contexts?name=a", "application/octet-stream")
        expected = 405 if method == "PUT" else 415 if is_foreign and not is_upload else status
        assert answer.status_code == expected, (method, path)
        assert answer.headers["connection"] == "close"


class Client:
    """A connection, byte by byte."""

    def __init__(self, url, *sent):
        host, _, port = url.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        for part in sent:
            self.socket.sendall(part)
            if part == ASK:
                found = b""
                while not found.endswith(b"]}"):
                    found += self.socket.recv(2**16)

    def rest(self):
        """All that comes until the server closes the connection."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while data := self.socket.recv(2**16):
                found += data
        self.socket.close()
        return found


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
UPLOAD = HEAD.replace(b"completions", b"contexts?name=a").replace(b"json", b"octet-stream")
ASK = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
NINE = b"Content-Length: 9\r\n\r\n"
LATE = {
    "nothing": ([], b""),
    "part of a head": ([HEAD], b""),
    "part of a body": ([HEAD, NINE, b"{"], b"HTTP/1.1 408 "),
    "part of a chunk": ([HEAD, b"Transfer-Encoding: chunked\r\n\r\n", b"9\r\n{"], b"HTTP/1.1 408 "),
    "part of a body nobody wants": ([ASK[:-2], NINE, b"{"], b"HTTP/1.1 408 "),
    "part of an upload": ([UPLOAD, NINE, b"{"], b"HTTP/1.1 408 "),
    "part of what is refused": ([HEAD.replace(b"json", b"xml"), NINE, b"{"], b"HTTP/1.1 415 "),
    "part of the next head": ([ASK, HEAD], b""),
}


def test_clients_that_do_not_send_what_they_began_are_let_go():
    with running(reading_service(limits=LIMITS)) as server, httpx.Client() as patient:
        assert patient.get(f"{server.url}/v1/models").status_code == 200
        clients = {name: Client(server.url, *sent) for name, (sent, _) in LATE.items()}
        for name, client in clients.items():
            found, expected = client.rest(), LATE[name][1]
            assert found.startswith(expected) if expected else found == b"", name
        # One that waits for its next request is none of them, however long.
        until(lambda: len(server.server_state.connections) == 1)
        assert patient.get(f"{server.url}/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("head", "status"), [(HEAD, 413), (HEAD.replace(b"json", b"xml"), 415)], ids=["large", "type"]
)
def test_a_client_that_is_still_sending_gets_the_response(head, status):
    with running(reading_service(limits=Limits(max_body_bytes=1000))) as server:
        client = Client(server.url, head, b"Content-Length: 1000000\r\n\r\n")
        # The server has responded, and would have closed the connection.
        assert select.select([client.socket], [], [], 30)[0]
        for _ in range(10):
            client.socket.sendall(b" " * 100_000)
        found = client.rest()
        assert found.startswith(b"HTTP/1.1 %d " % status)
        assert found.endswith(b"}}")
        until(lambda: not server.server_state.connections)


def test_a_connection_too_many_is_refused_alone():
    with running(reading_service(limits=Limits(max_connections=2))) as server, httpx.Client() as client:
        ask = f"{server.url}/v1/models"
        assert client.get(ask).status_code == 200
        with socket.create_connection(server.socket.getsockname()):
            until(lambda: len(server.server_state.connections) == 2)
            refused = httpx.get(ask)
            assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "true")
            assert refused.json()["error"]["code"] == "too_many_connections"
            assert refused.headers["connection"] == "close"
            assert client.get(ask).status_code == 200
            assert httpx.get(f"{server.url}/health").status_code == 200
        until(lambda: len(server.server_state.connections) == 1)
        assert httpx.get(ask).status_code == 200


def test_idle_connections_too_many_are_closed(monkeypatch):
    """So that they do not take the files that the process may open."""
    monkeypatch.setattr(ovq.serve.server, "_MOST_REFUSED", 1)
    monkeypatch.setattr(ovq.serve.server, "_GRACE_SECONDS", 60)
    with running(reading_service(limits=Limits(max_connections=1))) as server:
        clients = []
        for num_open in (1, 2, 2):
            clients.append(Client(server.url))
            until(lambda num_open=num_open: len(server.server_state.connections) == num_open)
        # The last at once, and the one before after a while.
        assert clients[2].rest() == b""
        monkeypatch.setattr(ovq.serve.server, "_GRACE_SECONDS", 0.2)
        assert clients[1].rest() == b""
        assert len(server.server_state.connections) == 1
        clients[0].socket.close()


def test_a_byte_now_and_then_is_not_enough():
    stop = threading.Event()

    def trickle(client):
        with contextlib.suppress(OSError):
            while not stop.wait(0.02):
                client.socket.sendall(b"x")

    with running(reading_service(limits=LIMITS)) as server:
        for sent in ([b"GET /"], [HEAD, b"Content-Length: 999\r\n\r\n"]):
            client = Client(server.url, *sent)
            thread = threading.Thread(target=trickle, args=[client])
            thread.start()
            client.rest()
            stop.set()
            thread.join()
            stop.clear()
        until(lambda: not server.server_state.connections)


def test_a_client_that_does_not_read_is_let_go(monkeypatch):
    monkeypatch.setattr(ovq.serve.server, "_GRACE_SECONDS", 0.1)
    is_ended = threading.Event()

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b" " * 2**16, "more_body": True})
            if is_ended.is_set():
                return
            await asyncio.sleep(0)

    async def noting(scope, receive, send):
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        asking = asyncio.create_task(app(scope, receive, send))
        while (await receive())["type"] != "http.disconnect":
            pass
        is_ended.set()
        await asking

    server = uvicorn.Server(uvicorn_config(noting, LIMITS, log_level="critical"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started)
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", ASK[:-2], b"\r\n")
    assert is_ended.wait(30)
    assert client.socket.recv(9) == b"HTTP/1.1 "
    client.socket.close()
    server.should_exit = True
    thread.join(30)
    listener.close()
    assert not thread.is_alive()


def test_ctrl_c_pressed_many_times_leaves_no_answer_behind():
    server = ovq.serve.server.Server(uvicorn_config(None, LIMITS), on_ready=print, on_end=print)
    for _ in range(4):
        server.handle_exit(signal.SIGINT, None)
    assert (server.should_exit, server.force_exit) == (True, False)


@pytest.fixture
def slow_texts(monkeypatch):
    """Texts of 100 characters take until an event; those that have begun."""
    may_end, begun, encode = threading.Event(), [], ovq.serve.texts.encode

    def slow(text, tokenizer, **about):
        if len(text) > 100:
            begun.append(text)
            assert may_end.wait(30)
        return encode(text, tokenizer, **about)

    monkeypatch.setattr(ovq.serve.texts, "encode", slow)
    monkeypatch.setattr(ovq.serve.app, "LONG", 100)
    yield may_end, begun
    may_end.set()


def test_long_texts_take_turns_within_their_time_and_short_ones_do_not_wait(slow_texts):
    may_end, begun = slow_texts
    # More than asyncio has threads.
    num_long = 40
    with running(text_service(limits=Limits(request_seconds=2))) as server:
        ask = functools.partial(httpx.post, f"{server.url}/v1/completions", timeout=30)
        body = {"model": "text", "prompt": "a" * 200, "max_tokens": 1}
        assert ask(json=body | {"model": "other"}).status_code == 404
        assert not begun
        with ThreadPoolExecutor(num_long) as pool:
            answers = [pool.submit(ask, json=body) for _ in range(num_long)]
            until(lambda: begun)
            for prompt in ("hi", [65] * 300):
                assert ask(json=body | {"prompt": prompt}).status_code == 200
            assert {answer.result().json()["error"]["code"] for answer in answers} == {"timeout"}
        may_end.set()
        assert len(begun) == 1
        assert ask(json=body).status_code == 200


def test_a_text_whose_client_has_gone_is_not_waited_for(slow_texts):
    may_end, begun = slow_texts
    with running(text_service()) as server:
        ask = functools.partial(httpx.post, f"{server.url}/v1/completions")
        body = {"model": "text", "prompt": "a" * 200, "max_tokens": 1}
        for _ in range(3):
            with pytest.raises(httpx.TimeoutException):
                ask(json=body, timeout=0.5)
        until(lambda: b'status="499"} 3.0' in server.service.metrics.text())
        may_end.set()
        assert ask(json=body, timeout=30).status_code == 200
        # The first, which could not be stopped, and the last.
        assert len(begun) == 2

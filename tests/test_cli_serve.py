"""`ovq serve` from the command line."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from ovq import convert
from ovq.cli.serve import _api_key
from ovq.hf import build_context, save_context
from ovq.serve.server import bound_socket
from tests.convert.common import converted, original, tokens
from tests.hf.common import make_model, random_ids
from tests.processes import command
from tests.serve.common import greedy
from tests.test_cli import fail, run

PROMPT, DOCUMENT = random_ids(1, 5, seed=1)[0].tolist(), random_ids(1, 40, seed=2)[0].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = make_model()
    model.save_pretrained(folder)
    save_context(build_context(model, DOCUMENT), folder.parent / "book.ctx")
    return folder


def test_a_process_serves_until_it_is_told_to_end(folder, tmp_path, monkeypatch):
    """Its line says where, its key is asked for, and after SIGTERM it answers what it has begun."""
    arguments = ["serve", "--model", folder, "--port", "0", "--context", folder.parent / "book.ctx"]
    arguments += ["--context", f"again={folder.parent}/book.ctx"]
    monkeypatch.setenv("OVQ_API_KEY", "secret")
    os.mkfifo(tmp_path / "errors")
    process = command(arguments, output=os.devnull, errors=tmp_path / "errors")
    process.start()
    with (tmp_path / "errors").open() as errors:
        try:
            line = next(line for line in errors if line.startswith("ovq serve: "))
            url = line.split()[2]
            assert "| model tiny on cpu | contexts: again, book | 32 rows" in line
            assert "key: yes" in line
            assert "secret" not in line
            assert httpx.get(f"{url}/models").status_code == 401
            client = openai.OpenAI(base_url=url, api_key="secret")
            ask = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "extra_body": {"context": "book"}}
            chunks = client.completions.create(**ask, max_tokens=80, stream=True)
            texts = [next(chunks).choices[0].text]
            process.terminate()
            texts += [chunk.choices[0].text for chunk in chunks]
            client.close()
            expected = greedy(make_model(), PROMPT, 80, before=DOCUMENT)
            assert [int(word) for word in "".join(texts).split()] == expected
            process.join(60)
            assert process.exitcode == 128 + signal.SIGTERM
        finally:
            process.kill()
        assert "Traceback" not in errors.read()


def hear_hangups():
    """Handle SIGHUP as usual, also where tests run under `nohup`, which ignores it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("seconds", "signals", "most_seconds"), [(0, ["SIGTERM"], 5), (60, ["SIGHUP", "SIGTERM"], 30)], ids=str
)
def test_answers_that_take_too_long_end_with_an_error(folder, tmp_path, seconds, signals, most_seconds):
    """After `--shutdown-seconds`, or at a second signal: a 503, or an error at the end of a stream."""
    os.mkfifo(tmp_path / "errors")
    arguments = ["serve", "--model", folder, "--port", "0", "--shutdown-seconds", seconds]
    arguments += ["--max-tokens", 10**6]
    process = command(arguments, output=os.devnull, errors=tmp_path / "errors", before=hear_hangups)
    process.start()
    with (tmp_path / "errors").open() as errors, ThreadPoolExecutor() as pool:
        try:
            url = next(line for line in errors if line.startswith("ovq serve: ")).split()[2]
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10**6, "ignore_eos": True}
            whole = pool.submit(httpx.post, f"{url}/completions", json=body, timeout=60)
            with httpx.stream(
                "POST", f"{url}/completions", json={**body, "stream": True}, timeout=60
            ) as answer:
                lines = answer.iter_lines()
                next(lines)
                begun = time.monotonic()
                for name in signals:
                    os.kill(process.pid, getattr(signal, name))
                    time.sleep(0.5)
                *_, last = [line for line in lines if line]
            assert time.monotonic() - begun < most_seconds
            assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (
                503,
                "shutting_down",
            )
            assert "shutting_down" in last
            process.join(60)
            assert process.exitcode == 128 + getattr(signal, signals[0])
        finally:
            process.kill()
        assert "Traceback" not in errors.read()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "{folder}/no"], "found no such folder"),
        (["--model", "{folder}/empty"], "expected the folder of a saved model, found a file"),
        (["--context", "{folder}/no.ctx"], "--context: expected a file of ovq context build, found no file"),
        (["--context", ".x={folder}/config.json"], "expected a name of 1 to 64 letters"),
        (["--context", "a={folder}/config.json"], "config.json: expected a saved context"),
        (["--context", "a={book}", "--context", "a={book}"], "context 'a': expected a new name"),
        (["--api-key-file", "{folder}/empty"], "characters without spaces, found an empty one"),
        (["--api-key-file", "{folder}/no"], "--api-key-file: expected a text file, found none that can be"),
        (["--timeout", "0"], "--timeout: expected a finite number above 0, found 0.0"),
        (["--timeout", "inf"], "--timeout: expected a finite number above 0, found inf"),
        (["--read-timeout", "nan"], "--read-timeout: expected a finite number above 0, found nan"),
        (["--name", " "], "--name: expected a name, found ' '"),
        (["--merge", "best"], "--merge: expected rules among existing"),
        (["--host", "192.0.2.1"], "can listen on, found 192.0.2.1:0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_refused_in_one_line(folder, capsys, options, expected):
    (folder / "empty").write_text("\n")
    places = {"folder": folder, "book": folder.parent / "book.ctx"}
    options = [option.format(**places) for option in options]
    base = [] if "--model" in options else ["--model", str(folder)]
    assert expected in fail(capsys, "serve", "--port", "0", *base, *options)


def test_a_port_that_is_taken_while_the_model_is_loaded(folder, capsys, monkeypatch):
    with bound_socket("127.0.0.1", 0) as other:
        monkeypatch.setattr("ovq.cli.serve._add_contexts", lambda *_: other.listen())
        port = other.getsockname()[1]
        said = fail(capsys, "serve", "--model", folder, "--port", port)
    assert f"listen on, found 127.0.0.1:{port} (" in said
    assert "in use" in said


@pytest.mark.parametrize("host", ["127.2", "LocalHost"])
def test_whatever_names_this_machine_alone_is_guarded(folder, capsys, monkeypatch, host):
    """Many systems have the name of the machine stand for a loopback address."""
    found, urls = [], []
    monkeypatch.setattr("ovq.serve.app.create_app", lambda *_, hosts, **__: found.extend(hosts))
    monkeypatch.setattr("ovq.cli.serve._summary", lambda _, url, **__: urls.append(httpx.URL(url)))
    monkeypatch.setattr("ovq.serve.server.Server.run", lambda server, sockets: server._on_ready())
    run(capsys, "serve", "--model", folder, "--port", "0", "--host", host)
    assert {"localhost", "127.0.0.1", host.lower(), urls[0].host} <= set(found)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    (tmp_path / "key").write_text("secret\n", encoding="utf-8-sig")
    assert _api_key(tmp_path / "key") == "secret"


@pytest.mark.parametrize(("key", "found"), [("", "an empty one"), ("a b", "another one")])
def test_a_variable_that_holds_no_key_is_no_permission(folder, capsys, monkeypatch, key, found):
    monkeypatch.setenv("OVQ_API_KEY", key)
    expected = f"OVQ_API_KEY: expected a key of ASCII characters without spaces, found {found}"
    assert fail(capsys, "serve", "--model", folder, "--port", "0") == expected


def test_contexts_of_another_rule_are_served_by_that_rule(folder, tmp_path, capsys, monkeypatch):
    model = make_model()
    model.set_merge("nearest")
    save_context(build_context(model, DOCUMENT), tmp_path / "book.ctx")
    services = []
    monkeypatch.setattr("ovq.cli.serve._run", lambda service, *_, **__: services.append(service))
    command = ["serve", "--port", "0", "--model", folder, "--context", tmp_path / "book.ctx"]
    run(capsys, *command, "--merge", "nearest")
    assert services[0].contexts.get("book").num_tokens == len(DOCUMENT)
    assert "expected a context made with merge='existing'" in fail(capsys, *command)


def test_a_converted_model_is_served_with_its_contexts(tmp_path, capsys, monkeypatch):
    model = converted()
    model.save_pretrained(tmp_path / "small")
    convert.save_context(convert.build_context(model, tokens(40)), tmp_path / "book.ctx")
    services = []
    monkeypatch.setattr("ovq.cli.serve._run", lambda service, *_, **__: services.append(service))
    command = ["serve", "--port", "0", "--model"]
    run(capsys, *command, tmp_path / "small", "--context", tmp_path / "book.ctx")
    (service,) = services
    assert isinstance(service.served.model, convert.ConvertedMixin)
    assert (service.name, service.served.vocab_size, service.served.ends) == ("small", 64, frozenset({2}))
    assert service.contexts.get("book").num_tokens == 40
    error = fail(capsys, *command, tmp_path / "small", "--num-slots", 8)
    assert "--num-slots: expected none with a converted model, found 8" in error
    original().save_pretrained(tmp_path / "plain")
    error = fail(capsys, *command, tmp_path / "plain")
    assert "found 'llama'; other models must be converted first (ovq convert)" in error


def test_without_the_extra_it_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "found no module uvicorn: pip install 'ovq[serve]'" in fail(capsys, "serve", "--model", folder)

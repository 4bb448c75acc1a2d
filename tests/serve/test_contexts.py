"""Contexts on the server: built, uploaded, shared by requests, and gone on from by chats."""

import concurrent.futures
import dataclasses
import functools
import os
import tempfile

import httpx
import openai
import pytest
import torch

from ovq.hf import build_context, context_file, save_context
from ovq.prompts import document_ids, note_of_chat
from ovq.serve.model import ServedModel
from tests.disks import full_disk
from tests.hf.common import is_greedy, make_model, random_ids
from tests.serve.common import answer_tokens, client_of, complete

PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 5, 9, 23)]
DOCUMENT = random_ids(1, 61, seed=3)[0].tolist()


def test_contexts_are_built_uploaded_shared_and_forgotten(ids, tmp_path):
    model, client = ids.service.served.model, client_of(ids)
    save_context(build_context(model, DOCUMENT), tmp_path / "book.ctx")
    built = client.post("/contexts", body={"name": "built", "token_ids": DOCUMENT}, cast_to=object)
    words = " ".join(map(str, DOCUMENT))
    client.post("/contexts", body={"name": "words", "text": words}, cast_to=object)
    upload = {"params": {"name": "up"}, "headers": {"Content-Type": "application/octet-stream"}}
    url = f"{ids.url}/v1/contexts"
    uploaded = httpx.post(url, content=(tmp_path / "book.ctx").read_bytes(), **upload)
    assert uploaded.status_code == 201
    assert uploaded.json() == {**built, "id": "up", "created": uploaded.json()["created"]}
    assert [entry["id"] for entry in httpx.get(url).json()["data"]] == ["built", "up", "words"]
    assert httpx.get(f"{url}/up").json()["num_tokens"] == len(DOCUMENT)

    asked = [(name, place) for name in ("built", "up", "words") for place in range(4)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda a: complete(ids, PROMPTS[a[1]], extra_body={"context": a[0]}), asked))
    for answer, (_, place) in zip(answers, asked, strict=True):
        [tokens] = answer_tokens(answer)
        assert len(tokens) == 12
        assert is_greedy(model, torch.tensor([*DOCUMENT, *PROMPTS[place], *tokens]), 12)
        assert answer.usage.context_tokens == len(DOCUMENT)
        assert answer.usage.prompt_tokens == len(PROMPTS[place])

    again = httpx.post(url, content=b"", **upload)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "context_exists")
    # It goes on, although the name is given up meanwhile.
    chunks = complete(ids, PROMPTS[0], stream=True, max_tokens=60, extra_body={"context": "up"})
    next(chunks)
    for name in ("up", "built", "words"):
        assert httpx.delete(f"{url}/{name}").json() == {"id": name, "object": "context", "deleted": True}
    assert sum(len(chunk.choices) for chunk in chunks) > 30
    with pytest.raises(openai.NotFoundError, match=r"context: expected one of \[\], found 'up'"):
        complete(ids, PROMPTS[0], extra_body={"context": "up"})
    assert httpx.delete(f"{url}/up").status_code == 404


def test_what_is_no_context_of_the_model_is_refused_and_leaves_nothing(ids, tmp_path):
    url, headers = f"{ids.url}/v1/contexts", {"Content-Type": "application/octet-stream"}
    save_context(build_context(make_model(1), DOCUMENT), tmp_path / "other.ctx")
    other = (tmp_path / "other.ctx").read_bytes()
    for content, expected in (
        (other, "found one of other weights"),
        (other[:-9], "damaged or foreign"),
        (b"\x80\x04\x95 a pickle", "damaged or foreign"),
        (b"", "damaged or foreign"),
    ):
        answer = httpx.post(url, params={"name": "bad"}, content=content, headers=headers)
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400
        assert message.startswith("context 'bad': expected a ")
        assert expected in message
        # Where uploads are kept meanwhile concerns nobody.
        assert "/" not in message.replace("and/or", "")
    for name in ("", "../../etc/passwd", "a/b", "/tmp/x", "a" * 65, ".hidden"):
        assert httpx.post(url, params={"name": name}, content=other, headers=headers).status_code == 400
        built = httpx.post(url, json={"name": name, "token_ids": [1]})
        assert (built.status_code, built.json()["error"]["param"]) == (400, "name")
    for body in ({"name": "x"}, {"name": "x", "text": "1", "token_ids": [1]}, {"name": "x", "token_ids": []}):
        assert httpx.post(url, json=body).status_code == 400
    assert httpx.get(url).json()["data"] == []
    assert httpx.post(url, json={"name": "x", "token_ids": [1]}).status_code == 201
    assert httpx.delete(f"{url}/x").status_code == 200


def test_a_context_is_loaded_without_reading_all_weights_again(tmp_path, monkeypatch):
    model = make_model()
    served, other = ServedModel(model), ServedModel(make_model(seed=1))
    save_context(build_context(model, DOCUMENT), tmp_path / "book.ctx")
    for each in (served, other):
        each.prepare()
    monkeypatch.setattr(context_file, "weights_of", None)
    assert served.load_context(tmp_path / "book.ctx").num_tokens == len(DOCUMENT)
    with pytest.raises(ValueError, match="found one of other weights"):
        other.load_context(tmp_path / "book.ctx")


def test_an_upload_to_a_full_disk_is_answered(ids, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    headers = {"Content-Type": "application/octet-stream"}
    with full_disk(2**16):
        answer = httpx.post(f"{ids.url}/v1/contexts?name=full", content=b" " * 2**24, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "upload_not_stored")
    assert httpx.get(f"{ids.url}/v1/contexts/full").status_code == 404
    assert "File too large" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_upload_removes_what_a_killed_server_has_left(ids, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "ovq-upload-left"
    left.mkdir()
    (left / "upload").write_bytes(b"much")
    os.utime(left, (0, 0))
    headers = {"Content-Type": "application/octet-stream"}
    answer = httpx.post(f"{ids.url}/v1/contexts?name=a", content=b"no context", headers=headers)
    assert answer.status_code == 400
    assert not list(tmp_path.iterdir())


def test_a_chat_goes_on_from_a_context_that_has_read_its_beginning(text):
    served, messages = text.service.served.model, [{"role": "user", "content": "What is a slot?"}]
    ids, opening = document_ids(
        "A slot.", text.service.texts._tokenizer, vocab_size=257, name="text", system="Be brief."
    )
    notes = {
        "saved": note_of_chat(opening, ids),
        "other": note_of_chat(messages, ids),
        "long": note_of_chat(opening, [*ids, 1]),
        "free": "about slots",
        "infinite": '{"messages": [], "tokens": [Infinity]}',
        "deep": "[" * 200_000,
    }
    for name, note in notes.items():
        text.service.contexts.add(name, dataclasses.replace(build_context(served, ids), note=note))
    client, url = client_of(text), f"{text.url}/v1/contexts"
    about = {"name": "read", "text": opening[0]["content"], "chat": True}
    assert httpx.post(url, json=about).json()["num_tokens"] == len(ids)
    create = functools.partial(
        client.chat.completions.create, model="text", messages=messages, max_tokens=9, temperature=0
    )
    whole = create(messages=opening + messages)
    for name in ("saved", "read"):
        answer = create(extra_body={"context": name})
        assert answer.choices[0].message.content == whole.choices[0].message.content
        assert len(ids) + answer.usage.prompt_tokens == whole.usage.prompt_tokens
    for name, expected in (
        ("other", "expected messages that go on from those of the context as it read them"),
        ("long", f"context: expected a chat of {len(ids)} tokens at most, found {len(ids) + 1}"),
        *((name, "context: expected a chat that was saved") for name in ("free", "infinite", "deep")),
    ):
        with pytest.raises(openai.BadRequestError, match=expected):
            create(extra_body={"context": name})
    for name in ("saved", "read"):
        with pytest.raises(openai.BadRequestError, match="context: expected /v1/chat/completions with one"):
            complete(text, "What is a slot?", extra_body={"context": name})
    for name in ("long", "free", "infinite", "deep"):
        complete(text, "What is a slot?", extra_body={"context": name})
    for name in (*notes, "read"):
        assert httpx.delete(f"{url}/{name}").status_code == 200


def test_a_chat_keeps_the_context_that_it_began_with(text, monkeypatch):
    """Its prompt was cut for that one, so another one under the same name must not take its place."""
    url, texts, messages = f"{text.url}/v1/contexts", text.service.texts, [{"role": "user", "content": "Go"}]
    old = httpx.post(url, json={"name": "r", "text": "A slot.", "chat": True}).json()
    chat, create = texts.chat, client_of(text).chat.completions.create
    create = functools.partial(create, model="text", messages=messages, max_tokens=9, temperature=0)
    expected = create(extra_body={"context": "r"})

    def replacing(*args, **options):
        assert httpx.delete(f"{url}/r").status_code == 200
        assert httpx.post(url, json={"name": "r", "token_ids": [5] * 30}).status_code == 201
        return chat(*args, **options)

    monkeypatch.setattr(texts, "chat", replacing)
    answer = create(extra_body={"context": "r"})
    assert answer.usage.context_tokens == old["num_tokens"]
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert httpx.delete(f"{url}/r").status_code == 200


def test_only_a_text_is_read_as_the_beginning_of_a_chat(ids, text):
    for server, body, expected in (
        (text, {"token_ids": [1]}, "chat: expected a text, found token_ids"),
        (text, {"text": ""}, "text: expected at least one token, found none"),
        (
            ids,
            {"text": "1 2"},
            "chat: expected a model whose tokenizer has a chat template, found no tokenizer",
        ),
    ):
        answer = httpx.post(f"{server.url}/v1/contexts", json={"name": "x", "chat": True, **body})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, expected)

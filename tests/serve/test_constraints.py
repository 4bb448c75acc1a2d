"""Answers kept to JSON and to calls of tools: random weights write what a schema says, and nothing else."""

import concurrent.futures
import enum
import json
import sys
from typing import Annotated, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from ovq.serve import scheduler
from ovq.serve.grammars import Constraint, GrammarFault, Grammars, grammar_of
from ovq.serve.jobs import Generation, TokenEvent
from ovq.serve.limits import Limits
from ovq.serve.scheduler import Scheduler
from ovq.serve.texts import Texts
from ovq_lab.text import byte_tokenizer
from tests.serve.common import is_idle, running, text_service, until


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Colour(enum.Enum):
    RED = "rød"
    BLUE = 'b"l\\ue'


class Point(Closed):
    x: Annotated[int, Field(ge=-99, le=99)]
    is_near: bool


class Path(Closed):
    name: Annotated[str, Field(max_length=5)]
    points: Annotated[list[Point], Field(min_length=1, max_length=2)]
    colour: Colour | None


class Choice(Closed):
    kind: Literal["a", "b"]
    rest: Point | Annotated[str, Field(pattern=r"^[a-z]{3}$")]


class Nothing(Closed):
    pass


MODELS = [Point, Path, Choice, Nothing]


def tool(model):
    function = {"name": model.__name__, "parameters": model.model_json_schema()}
    return {"type": "function", "function": function}


TOOLS = [tool(model) for model in MODELS]
FREE = {"type": "function", "function": {"name": "Free", "parameters": {"type": "object"}}}


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def server():
    with running(text_service()) as server:
        yield server


def chat(server, text="Go", **options):
    options = {"max_tokens": 300, "temperature": 0, **options}
    messages = options.pop("messages", [{"role": "user", "content": text}])
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="text", messages=messages, **options)
        return list(answer) if options.get("stream") else answer


def test_answers_fit_their_schemas_and_do_not_disturb_others(server):
    plain = [{"max_tokens": 60}, {"max_tokens": 60, "temperature": 1, "seed": 5, "n": 2, "top_p": 0.9}]
    alone = [[one.message for one in chat(server, "plain", **options).choices] for options in plain]
    kept = [
        (model, {"n": n, "temperature": temperature, "seed": 3, "top_p": 0.9})
        for model in MODELS
        for n, temperature in ((1, 0), (3, 1.5))
    ]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        beside = [pool.submit(chat, server, "plain", **options) for options in plain * 2]
        asked = [
            pool.submit(chat, server, response_format=json_schema(model.model_json_schema()), **options)
            for model, options in kept
        ]
        for future, expected in zip(beside, alone * 2, strict=True):
            assert [one.message for one in future.result().choices] == expected
        answers = [future.result() for future in asked]
    for (model, options), answer in zip(kept, answers, strict=True):
        for one in answer.choices:
            assert one.finish_reason == "stop"
            model.model_validate_json(one.message.content, strict=False)
            # On one line, as Python writes it.
            said = json.dumps(json.loads(one.message.content), ensure_ascii=False)
            assert json.loads(said) == json.loads(one.message.content)
            assert "\n" not in one.message.content
        if options["temperature"] == 0:
            again = chat(server, response_format=json_schema(model.model_json_schema()), **options)
            assert again.choices[0].message == answer.choices[0].message
    # Seeds of their own.
    assert len({one.message.content for one in answers[3].choices}) == 3
    assert is_idle(server)


def test_any_json_and_what_is_cut_off(server):
    answer = chat(server, response_format={"type": "json_object"}).choices[0]
    assert isinstance(json.loads(answer.message.content), dict)
    answer = chat(server, response_format=json_schema({"type": "string", "minLength": 9}), max_tokens=9)
    assert answer.choices[0].message.content.startswith('"')
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 9)
    text = chat(server, response_format={"type": "text"}, max_tokens=9).choices
    assert text == chat(server, max_tokens=9).choices
    cut = chat(server, tools=[FREE], tool_choice="required", max_tokens=20)
    assert cut.choices[0].finish_reason == "length"
    assert cut.choices[0].message.content == '<tool_call>\n{"name":'
    assert cut.choices[0].message.tool_calls is None


@pytest.mark.parametrize(("choice", "temperature"), [("required", 1.3), ("Path", 0)])
def test_a_tool_is_called_where_one_must_be(server, choice, temperature):
    named = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    options = {"tools": TOOLS, "tool_choice": named, "temperature": temperature, "n": 2, "seed": 1}
    whole = chat(server, **options)
    found = {0: {}, 1: {}}
    reasons = {}
    for chunk in chat(server, **options, stream=True):
        for one in chunk.choices:
            assert not one.delta.content
            for call in one.delta.tool_calls or []:
                entry = found[one.index].setdefault(call.index, {"name": "", "arguments": "", "id": call.id})
                entry["name"] += call.function.name or ""
                entry["arguments"] += call.function.arguments or ""
            reasons[one.index] = one.finish_reason or reasons.get(one.index)
            # A call that comes with the reason would not be complete to OpenAI's client.
            assert one.finish_reason is None or not one.delta.model_dump(exclude_none=True)
    for one in whole.choices:
        (call,) = one.message.tool_calls
        assert (one.finish_reason, one.message.content) == ("tool_calls", None)
        assert choice in ("required", call.function.name)
        (model,) = [model for model in MODELS if model.__name__ == call.function.name]
        model.model_validate_json(call.function.arguments)
        (streamed,) = found[one.index].values()
        assert streamed["id"].startswith("call_")
        assert (streamed["name"], streamed["arguments"]) == (call.function.name, call.function.arguments)
        assert reasons[one.index] == "tool_calls"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "Go"}]
    with client, client.chat.completions.stream(model="text", messages=messages, **options) as events:
        done = [event.name for event in events if event.type == "tool_calls.function.arguments.done"]
    assert sorted(done) == sorted(one.message.tool_calls[0].function.name for one in whole.choices)
    until(lambda: is_idle(server))


WRITTEN = (
    'I look.\n<tool_call>\n{"name": "Point", "arguments": {"x": 1, "is_near": true}}\n</tool_call>\n'
    '<tool_call>\n{"name": "Nothing", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize(
    ("is_stream", "changes", "content", "names"),
    [
        (True, {}, "I look.", ["Point", "Nothing"]),
        (False, {"parallel_tool_calls": True}, "I look.", ["Point", "Nothing"]),
        (True, {"parallel_tool_calls": False}, "I look.", ["Point"]),
        (False, {"parallel_tool_calls": False}, "I look.", ["Point"]),
        (True, {"tool_choice": "auto", "stop": "\n<tool_call>"}, "I look.", []),
        (False, {"tool_choice": "none"}, WRITTEN, []),
        (True, {"tools": TOOLS[:1]}, "I look.\n" + WRITTEN.rpartition("\n<")[2].join(["<", ""]), ["Point"]),
        (False, {"tools": TOOLS[:1]}, "I look.\n" + WRITTEN.rpartition("\n<")[2].join(["<", ""]), ["Point"]),
    ],
    ids=["auto", "many", "one", "one, whole", "stop", "none", "unknown", "unknown, whole"],
)
def test_calls_that_a_model_writes_by_itself(server, monkeypatch, is_stream, changes, content, names):
    def spell(logits, choices):
        return [[*WRITTEN.encode(), 256][len(choice.tokens)] for choice in choices]

    monkeypatch.setattr(scheduler, "next_tokens", spell)
    monkeypatch.setattr(server.service.served.model.generation_config, "eos_token_id", 256)
    options = {"tools": TOOLS, **changes}
    if is_stream:
        chunks = [chunk.choices[0] for chunk in chat(server, **options, stream=True)]
        found = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        reason = chunks[-1].finish_reason
        assert [call.index for call in found] == list(range(len(found)))
    else:
        choice = chat(server, **options).choices[0]
        found, text = choice.message.tool_calls or [], choice.message.content
        reason = choice.finish_reason
    assert [call.function.name for call in found] == names
    assert reason == ("tool_calls" if names else "stop")
    if "tools" in changes:
        assert text == 'I look.\n<tool_call>\n{"name": "Nothing", "arguments": {}}\n</tool_call>'
    else:
        assert text == content
    until(lambda: is_idle(server))


def test_calls_and_results_are_read_again(server):
    first = chat(server, tools=TOOLS, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "done"}
    messages = [{"role": "user", "content": "Go"}, first.model_dump(), result]
    # As helpers of OpenAI's client return it, `parse` and streams.
    call = first.model_dump()["tool_calls"][0]
    function = call["function"] | {"parsed_arguments": {"a": 1}}
    helped = first.model_dump() | {"parsed": None, "tool_calls": [call | {"index": 0, "function": function}]}
    with_helpers = chat(server, messages=[messages[0], helped, result], tools=TOOLS, max_tokens=3)
    answer = chat(server, messages=messages, tools=TOOLS, max_tokens=3)
    assert answer.usage.prompt_tokens > len(str(TOOLS)) + len(first.tool_calls[0].function.arguments)
    assert with_helpers.usage == answer.usage
    # Without tools on offer, what has been called is told nevertheless.
    assert chat(server, messages=messages, max_tokens=3).usage.prompt_tokens > 60


def test_json_or_a_call_where_a_model_may_choose(server):
    schema = json_schema(Nothing.model_json_schema())
    seen = set()
    for seed in range(12):
        answer = chat(server, tools=TOOLS[-1:], response_format=schema, temperature=2, seed=seed).choices[0]
        seen.add((answer.message.content, answer.finish_reason))
    assert seen == {("{}", "stop"), (None, "tool_calls")}


BAD = [
    ({"response_format": {"type": "json_schema"}}, "expected a schema for the type 'json_schema' alone"),
    ({"response_format": {"type": "xml"}}, "response_format.type: expected 'text', 'json_object' or"),
    (
        {"response_format": json_schema({"type": "objekt"})},
        "that llguidance takes, found another one (Invalid type: objekt)",
    ),
    ({"response_format": json_schema({"$ref": "#"})}, "found another one (nothing fits it)"),
    (
        {"response_format": json_schema({"type": "string", "pattern": "("})},
        "(regex parse error: ( ^ error: unclosed group)",
    ),
    ({"response_format": json_schema({"$ref": "http://127.0.0.1/a"})}, "does not fetch resources"),
    ({"response_format": json_schema({"not": {}})}, 'Unimplemented keys: ["not"]'),
    (
        {"response_format": json_schema({"enum": ["x" * 70_000]})},
        "response_format: expected schemas of at most 65536 characters, found 70",
    ),
    ({"response_format": json_schema({}), "ignore_eos": True}, "ignore_eos: expected false for JSON"),
    ({"tool_choice": "required"}, "tools: expected at least one for this tool_choice, found none"),
    ({"tool_choice": "always"}, "tool_choice: expected 'none', 'auto', 'required' or {'type': 'function'"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}},
        "tool_choice: expected one of the tools ['Point', 'Path', 'Choice', 'Nothing'], found 'rm'",
    ),
    ({"tools": TOOLS[:1] * 2}, "tools: expected a name of its own for each, found ['Point', 'Point']"),
    ({"tools": [{"type": "custom"}]}, "tools.0.type: expected 'function', found 'custom'"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools.0.function.name: expected text that matches ",
    ),
    (
        {
            "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}],
            "tool_choice": "required",
        },
        "tools: expected parameters of the type 'object', found 'string' for 'a'",
    ),
    (
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        "response_format: expected the type 'text' where a tool must be called",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]},
        "messages.0.tool_call_id: expected it in messages of the role 'tool', found it in one of",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "b", "type": "function", "function": {"name": "c", "arguments": "[1]"}}
                    ],
                }
            ]
        },
        "messages.0.tool_calls.0.function.arguments: expected a JSON object, found '[1]'",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), BAD, ids=[row[1][:40] for row in BAD])
def test_what_cannot_be_kept_to_is_refused(server, changes, expected):
    body = {"model": "text", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3, **changes}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert expected in answer.json()["error"]["message"]


def test_without_llguidance_all_else_is_served(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with running(text_service()) as server:
        for options in (
            {"response_format": {"type": "json_object"}},
            {"tools": TOOLS, "tool_choice": "required"},
        ):
            with pytest.raises(
                openai.BadRequestError, match=r"no module llguidance: pip install 'ovq\[serve\]'"
            ):
                chat(server, **options)
        assert chat(server, tools=TOOLS, max_tokens=3).usage.completion_tokens == 3


def test_a_client_that_goes_leaves_nothing(server):
    counts = server.service.engine.scheduler.counts
    cancelled, num_tokens = counts.cancelled, counts.generated_tokens
    schema = json_schema({"type": "array", "items": {"type": "string", "minLength": 9}, "minItems": 999})
    body = {"model": "text", "messages": [{"role": "user", "content": "a"}], "response_format": schema}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}) as answer:
        # By a name: without one, the connection is closed with it.
        lines = answer.iter_lines()
        next(lines)
        until(lambda: counts.generated_tokens > num_tokens)
    until(lambda: counts.cancelled == cancelled + 1)
    until(lambda: is_idle(server))


def test_a_grammar_that_fails_ends_its_own_answer_alone(server, monkeypatch):
    push = Constraint.push

    def failing(self, token):
        push(self, token)
        if token == ord("x"):
            raise GrammarFault("too many states")

    monkeypatch.setattr(Constraint, "push", failing)
    alone = chat(server, max_tokens=40).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        beside = pool.submit(chat, server, max_tokens=40)
        with pytest.raises(openai.BadRequestError, match=r"one that is too much for it \(too many"):
            chat(server, response_format=json_schema({"const": "axa"}))
        assert beside.result().choices[0].message.content == alone
    until(lambda: is_idle(server))


def constraint(schema, vocab_size=257):
    texts = Texts(byte_tokenizer(), vocab_size=vocab_size)
    grammars = Grammars(texts, vocab_size=vocab_size, ends=frozenset())
    return grammars.compiled(grammar_of(schema, {}), param="response_format")


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_the_end_is_allowed_where_the_grammar_is_complete(vocab_size):
    found = constraint({"type": "integer"}, vocab_size)
    assert sorted(found.ends) == [256]
    before = found.allowed()
    assert before.shape == (vocab_size,)
    assert [chr(token) for token in before.nonzero()[0]] == list("-0123456789")
    other = found.copied()
    found.push(ord("7"))
    assert [*map(chr, found.allowed().nonzero()[0])] == [*"0123456789", chr(256)]
    assert not found.is_complete
    found.push(256)
    assert found.is_complete
    assert (other.allowed() == before).all()
    with pytest.raises(GrammarFault, match="doesn't satisfy the grammar"):
        other.push(ord("x"))


def test_rows_without_a_constraint_keep_every_bit():
    service = text_service(limits=Limits(prefix_bytes=0))
    # Where nothing is converted on the way, so that a mask could reach the model's own numbers.
    service.served.model.float()
    kept = constraint({"type": "string"})

    def written(constraint):
        events = []
        running = Scheduler(service.served, service.limits)
        prompt = list(b"abc")
        job = {"tokens": prompt, "max_tokens": 20, "num_logprobs": 5}
        running.add(Generation(deliver=events.extend, **job))
        others = []
        running.add(Generation(deliver=others.extend, constraint=constraint, **job))
        while running.step():
            pass
        return [[event for event in found if isinstance(event, TokenEvent)] for found in (events, others)]

    (free, same), (beside, quoted) = written(None), written(kept)
    assert free == beside == same
    assert quoted[0].token == ord('"') != free[0].token
    # Numbers are those of the model, which would have said something else.
    assert quoted[0].logprobs.top == free[0].logprobs.top

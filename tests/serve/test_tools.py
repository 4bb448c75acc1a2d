"""Calls of tools in text: what is one becomes one, and all else stays text, however it is cut into pieces."""

import json

from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from ovq.serve.chat import Tool
from ovq.serve.texts import Texts
from ovq.serve.tools import ToolCalls, tools_as_text
from ovq_lab.text import byte_tokenizer

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": [1, 2.5]}}\n</tool_call>'
NOW = '<tool_call>{"name": "now"}</tool_call>'
QUOTED = '<tool_call>{"name": "add", "arguments": {"a": "</tool_call> né"}}</tool_call>'
LIST = '<tool_call>[{"name": "now", "arguments": {}}, {"name": "add", "arguments": {"a": 1}}]</tool_call>'
CASES = [
    ("no call < at all", "no call < at all", []),
    (f"Well.\n{ADD}", "Well.", [("add", {"a": [1, 2.5]})]),
    (f"{ADD}\n{NOW} done", " done", [("add", {"a": [1, 2.5]}), ("now", {})]),
    (QUOTED, "", [("add", {"a": "</tool_call> né"})]),
    (LIST, "", [("now", {}), ("add", {"a": 1})]),
    # Strings that end where they seem not to, and openers far from their strings.
    (
        rf'<tool_call>{{{" " * 30}"name": "add", "arguments": {{"a": ["\\", "\"\u0041</tool_call>,", ":"]}}}}'
        "</tool_call>!",
        "!",
        [("add", {"a": ["\\", '"A</tool_call>,', ":"]})],
    ),
    # Without its end, but complete.
    ('x <tool_call>{"name": "now"}\n', "x", [("now", {})]),
    # Cut off, of another tool, no JSON, no object, no number of JSON, half a character.
    *(
        (text, text, [])
        for text in (
            f"a {ADD[:30]}",
            "a <tool_call>",
            " \n <tool",
            NOW.replace("now", "rm"),
            "<tool_call>add(1)</tool_call> ",
            '<tool_call>{"name": "add", "arguments": "1"}</tool_call>',
            '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
            '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>',
            r'<tool_call>{"name": "add", "arguments": {"a": "\ud800"}}</tool_call>',
            f"<tool_call>{'[' * 100_000}</tool_call>",
            '<tool_call>{"name": ["add"]}</tool_call>',
        )
    ),
    # One that is no call hides no other.
    *(
        (f"<tool_call>{wrong}</tool_call> {NOW}", f"<tool_call>{wrong}</tool_call>", [("now", {})])
        for wrong in (
            "oh",
            "\\",
            'he said "oh',
            '{"name": "add, "arguments": {"a": "1"}}',
            '{"name": "add" "',
            """{'name': 'add', "a: 1}""",
        )
    ),
]


def pushed(calls, pieces):
    shown, found = "", []
    for piece in pieces:
        text, new = calls.push(piece)
        shown, found = shown + text, found + new
    text, new = calls.finish()
    return shown + text, found + new


def cut(text, places):
    ends = [*sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@given(case=st.sampled_from(CASES), places=st.lists(st.integers(0, 300), max_size=30))
def test_calls_are_found_in_any_pieces(case, places):
    text, expected, calls = case
    # As the server gives them.
    names = dict.fromkeys(["add", "now"]).keys()
    shown, found = pushed(ToolCalls(names), cut(text, places))
    assert (shown, [(call.name, json.loads(call.arguments)) for call in found]) == (expected, calls)
    assert [call.index for call in found] == list(range(len(calls)))
    assert len({call.id for call in found}) == len(calls)


@given(text=st.text("<tol_ca>{ \n", max_size=40), places=st.lists(st.integers(0, 40), max_size=9))
@example(text="<<tool_call>", places=[1])
def test_text_without_calls_is_shown_as_it_is(text, places):
    assert pushed(ToolCalls(["add"]), cut(text, places)) == (text, [])


@given(places=st.lists(st.integers(0, 200), max_size=9))
def test_one_call_is_the_end_where_only_one_is_wanted(places):
    for text in (f"a{ADD}{NOW}b", f"a{LIST}b"):
        shown, found = pushed(ToolCalls(["add", "now"], is_single=True), cut(text, places))
        assert (shown, len(found)) == ("a", 1)


def test_a_call_is_parsed_twice_at_most_whatever_its_strings_hold(monkeypatch):
    parsed, parse = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **options: parsed.append(text) or parse(text, **options))
    for strings in (["</tool_call>" * 50], ["</tool_call>"] * 50):
        text = json.dumps({"name": "add", "arguments": {"a": strings}})
        _, [call] = pushed(ToolCalls(["add"]), list(f"<tool_call>{text}</tool_call>"))
        assert parse(call.arguments) == {"a": strings}
        # Once more at the first closing tag inside a string.
        assert parsed.pop() == text
        assert len(parsed) == 1
        parsed.clear()


def test_only_what_may_become_a_call_is_held_back():
    calls = ToolCalls(["add"])
    assert calls.push("a b <") == ("a b", [])
    assert calls.push("b") == (" <b", [])
    assert ToolCalls().push(ADD) == (ADD, [])


TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}
MESSAGES = [
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "Well.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "1", "tool_call_id": "call_1"},
    {"role": "tool", "content": "2", "tool_call_id": "call_1"},
]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
KNOWING = PLAIN + "{% if tools %}{{ tools | tojson }}{% endif %}"


def prompted(template, messages, tools):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return bytes(Texts(tokenizer, vocab_size=257).chat(messages, tools)).decode()


def test_the_template_alone_marks_the_beginning_of_a_chat():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    end = tokenizer.eos_token
    marking = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 256)])
    tokenizer.backend_tokenizer.post_processor = marking
    texts = Texts(tokenizer, vocab_size=257)
    assert texts.encode("go", param="prompt", is_start=True) == [256, *b"go"]
    assert texts.chat(MESSAGES[:1]) == [*b"user: go\n"]


def test_a_tool_without_parameters_takes_none():
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert Tool(type="function", function={"name": "now"}).schema_of_arguments == nothing


def test_a_template_that_knows_tools_gets_them():
    assert prompted(KNOWING, MESSAGES, [TOOL]).endswith(f"tool: 2\n{json.dumps([TOOL])}")
    assert prompted(KNOWING, MESSAGES[:1], []) == "user: go\n"


def test_a_template_that_knows_no_tools_gets_text():
    said = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    chat = f"user: go\nassistant: Well.\n{said}\n{said}\nuser: {results}\n"
    assert prompted(PLAIN, MESSAGES, []) == chat
    found = prompted(PLAIN, MESSAGES, [TOOL])
    assert found.startswith("system: # Tools\n\nYou may call")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in found
    assert found.endswith(f"</tool_call>\n{chat}")
    system = [{"role": "system", "content": "Be brief."}, *MESSAGES[:1]]
    assert prompted(PLAIN, system, [TOOL]).startswith("system: Be brief.\n\n# Tools\n\n")
    assert system[0]["content"] == "Be brief."
    assert tools_as_text(system, []) == system

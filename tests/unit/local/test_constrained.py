"""How requests with tools are constrained, and their outputs read: without a model."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.local.bounded import bounded
from app.local.constrained import OLD_RESULT_LENGTH, RESULT_LENGTH, STRING_LENGTH, Reader, constrained, plain

JSON = dict[str, Any]


def tool(name: str, parameters: Any = None) -> JSON:
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


TOOLS = [
    tool("search", {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}),
    tool("now"),
]
QUESTION = {"role": "user", "content": "What do camels drink?"}
CALL = {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"query": "camels"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "Water."}


def request(*messages: JSON, **fields: Any) -> JSON:
    return {"model": "m", "messages": [*messages], "tools": TOOLS, **fields}


def alternatives(asked: JSON) -> list[str]:
    """The tools that the schema allows, and `answer`."""
    made = constrained(asked)
    assert made is not None
    shapes = [alternative["properties"] for alternative in made.schema["anyOf"]]
    return [shape["name"]["const"] if "name" in shape else "answer" for shape in shapes]


def test_a_model_may_call_each_tool_or_answer() -> None:
    assert alternatives(request(QUESTION)) == ["search", "now", "answer"]
    assert alternatives(request(QUESTION, tool_choice="auto")) == ["search", "now", "answer"]


def test_a_call_can_be_demanded() -> None:
    assert alternatives(request(QUESTION, tool_choice="required")) == ["search", "now"]
    named = {"type": "function", "function": {"name": "now"}}
    assert alternatives(request(QUESTION, tool_choice=named)) == ["now"]


@pytest.mark.parametrize(
    "asked",
    [
        request(QUESTION, tool_choice="none"),
        request(QUESTION, tools=[]),
        request(QUESTION, response_format={"type": "json_schema", "json_schema": {"schema": {}}}),
        request(QUESTION, CALLED, RESULT),
        request(QUESTION, CALLED, RESULT, tool_choice="required"),
    ],
)
def test_nothing_is_constrained_without_tools_and_after_a_result(asked: JSON) -> None:
    """So a turn that calls a tool answers next, and never calls for ever."""
    assert constrained(asked) is None
    assert not {"tools", "tool_choice"} & plain(asked).keys()
    assert plain(asked).get("response_format") == asked.get("response_format")


def test_the_next_question_may_call_again() -> None:
    assert "search" in alternatives(
        request(QUESTION, CALLED, RESULT, {"role": "assistant", "content": "Water"}, QUESTION)
    )


def test_the_tools_are_told_in_the_system_message() -> None:
    made = constrained(request({"role": "system", "content": "Be brief."}, QUESTION))
    assert made is not None
    system, question = made.request["messages"]
    assert system["content"].startswith("Be brief.\n\n")
    assert "- search(query): Does search." in system["content"]
    assert question == QUESTION
    assert "tools" not in made.request


def test_calls_and_results_become_text_that_any_template_takes() -> None:
    long = {**RESULT, "content": [{"type": "text", "text": "x" * 2 * RESULT_LENGTH}]}
    messages = plain(request(QUESTION, CALLED, long, QUESTION, CALLED, long))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "user", "assistant", "user"]
    assert messages[1]["content"] == "I use search."
    results = [message["content"] for message in messages if message["content"].startswith("Result of search:\n")]
    assert [len(text) // 100 for text in results] == [OLD_RESULT_LENGTH // 100, RESULT_LENGTH // 100]


def test_strings_fit_into_the_tokens() -> None:
    for tokens, length in ((None, STRING_LENGTH), (164, 100), (10_000, STRING_LENGTH)):
        made = constrained(request(QUESTION, max_tokens=tokens))
        assert made is not None
        assert made.schema["anyOf"][0]["properties"]["arguments"]["properties"]["query"]["maxLength"] == length


NODE = {
    "type": "object",
    "properties": {"next": {"$ref": "#/$defs/node"}, "value": {"type": "integer"}},
    "required": ["value"],
}
SCHEMAS: list[tuple[Any, Any]] = [
    ({"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?=x)y$"}}, "required": ["a"]}, {"a": "?"}),
    ({"type": "object", "properties": {"a": {"type": "string", "format": "weird"}}}, {}),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/node"}}, "required": ["a"], "$defs": {"node": NODE}},
     {"a": {"value": 1}}),
    ({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}, {"a": "?"}),
    ({"type": "object", "properties": {"a": {"$ref": "https://x/y"}}, "required": ["a"]}, {"a": "?"}),
    ({"type": "object", "properties": {"a": {"type": "foo"}, "b": True}, "required": ["a", "c"]}, {"a": "?", "b": "?"}),
    ({"type": "object", "properties": {"a": {"type": ["integer", "null"]}}, "required": ["a"]}, {"a": None}),
    ({"type": "object", "properties": {"a": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}}}, {"a": True}),
    ({"type": "object", "properties": {"a": {"allOf": [{"type": "number"}, {"minimum": 3}]}}}, {"a": 1.5}),
    ({"type": "object", "properties": {"a": {"type": "array", "items": {"enum": ["x", 1]}}}}, {"a": ["x", 1]}),
    ({"type": "object", "properties": {"a": {"type": "array"}}}, {"a": ["?"]}),
    ({"type": "object", "properties": {"a": {"const": 7}, "b": {"type": "object"}}}, {"a": 7, "b": {}}),
    ({"type": "object", "properties": "wrong", "required": "wrong"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "valid"), SCHEMAS)
def test_any_schema_becomes_one_that_every_grammar_has(schema: JSON, valid: JSON) -> None:
    made = bounded(schema, 20)
    jsonschema.Draft202012Validator.check_schema(made)
    jsonschema.validate(valid, made)
    text = json.dumps(made)
    assert not any(word in text for word in ("pattern", "format", "$ref", "allOf", "minimum"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"of nobody": 1}, made)


def test_no_string_in_arguments_is_endless() -> None:
    made = bounded({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, 20)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"a": "x" * 21}, made)


def read(pieces: list[str]) -> tuple[str, Reader]:
    reader = Reader()
    return "".join(reader.feed(piece) for piece in pieces), reader


@given(st.text(), st.booleans(), st.integers(1, 9))
def test_an_answer_is_told_as_it_comes(answer: str, ascii_only: bool, size: int) -> None:
    """However it is escaped, and cut into pieces: never half a character."""
    said = json.dumps({"answer": answer}, ensure_ascii=ascii_only)
    reader = Reader()
    told = [reader.feed(said[start : start + size]) for start in range(0, len(said), size)]
    assert "".join(told) == answer
    for piece in told:
        piece.encode()  # a lone surrogate raises
    assert reader.call() is None
    assert reader.rest() == ""


def test_an_answer_is_told_before_its_end() -> None:
    assert read(['{"answer": "Cam', "els dr"])[0] == "Camels dr"


def test_a_call_is_told_whole() -> None:
    text, reader = read(['{"na', 'me":"sea"rch"'.replace('"rch', "rch"), ',"arguments":{"query":"a \\"b\\""}}'])
    assert text == ""
    assert reader.call() == ("search", '{"query":"a \\"b\\""}')
    assert reader.rest() == ""


def test_a_call_that_was_cut_off_keeps_what_there_is() -> None:
    assert read(['{"name":"search","arguments":{"query":"cam'])[1].call() == ("search", '{"query":"cam')


def test_what_is_neither_is_the_answer() -> None:
    """As of a model that was not held to the schema."""
    text, reader = read(["Camels ", "drink."])
    assert (text, reader.call(), reader.rest()) == ("", None, "Camels drink.")

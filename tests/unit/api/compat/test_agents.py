"""Client tools: a list of parameters before 0.3, a JSON Schema since."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.api.compat.agents import with_parameters, with_schemas
from app.api.compat.parameters import from_schema

LIQUID = {
    "name": "liquid",
    "parameter_type": "str",
    "description": "The liquid",
    "required": True,
    "default": None,
}
CELSIUS = {
    "name": "celsius",
    "parameter_type": "bool",
    "description": "In Celsius",
    "required": False,
    "default": True,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "liquid": {"type": "string", "description": "The liquid"},
        "celsius": {"type": "boolean", "description": "In Celsius", "default": True},
    },
    "required": ["liquid"],
}


def config(**tool: Any) -> dict[str, Any]:
    return {"model": "m", "client_tools": [{"name": "boil", **tool}]}


def test_parameters_become_a_schema() -> None:
    """Python's names of types become JSON Schema's."""
    assert with_schemas(config(parameters=[LIQUID, CELSIUS]))["client_tools"][0]["input_schema"] == SCHEMA


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("number", "number"),
        ("list", "array"),
        ("List", "array"),
        ("tuple", "array"),
        ("Dict", "object"),
        ("Optional", None),
        ("", None),
    ],
)
def test_a_type_that_json_schema_does_not_know_is_left_out(given: str, told: str | None) -> None:
    """Model servers refuse such a schema."""
    parameter = {"name": "a", "parameter_type": given, "description": "d"}
    schema = with_schemas(config(parameters=[parameter]))["client_tools"][0]["input_schema"]
    assert schema["properties"]["a"].get("type") == told
    assert schema["properties"]["a"].get("items") == ({} if told == "array" else None)
    assert schema["required"] == ["a"], "parameters are required unless they say otherwise"


def test_a_tool_without_parameters_takes_none() -> None:
    """An empty list is a schema without properties; no list at all is no schema."""
    assert with_schemas(config(parameters=[]))["client_tools"][0]["input_schema"]["properties"] == {}
    assert "input_schema" not in with_schemas(config())["client_tools"][0]


def test_a_schema_that_is_there_goes_first() -> None:
    """0.3's clients send it, and it stays as it is."""
    given = config(input_schema={"type": "object"}, parameters=[LIQUID])
    assert with_schemas(given)["client_tools"][0]["input_schema"] == {"type": "object"}


@pytest.mark.parametrize("wrong", [3, "x", [3], [{"description": "without a name"}], [{"name": 3}]])
def test_wrong_parameters_are_an_error(wrong: Any) -> None:
    """They are not dropped: the model would get a tool without them."""
    with pytest.raises(ValidationError):
        with_schemas(config(parameters=wrong))


@pytest.mark.parametrize("wrong", [None, 3, [], {}, {"client_tools": "x"}, {"client_tools": [3]}])
def test_what_is_no_configuration_is_left_to_the_validation(wrong: Any) -> None:
    """It says what is wrong."""
    assert with_schemas(wrong) == wrong


def test_an_agent_is_read_back_with_parameters() -> None:
    """For clients before 0.3; the types are JSON Schema's."""
    agent = {"agent_id": "a", "agent_config": config(input_schema=SCHEMA)}
    tool = with_parameters(agent)["agent_config"]["client_tools"][0]
    assert tool["input_schema"] == SCHEMA
    assert tool["parameters"] == [
        {**LIQUID, "parameter_type": "string"},
        {**CELSIUS, "parameter_type": "boolean"},
    ]


@pytest.mark.parametrize("schema", [None, {}, {"type": "string"}, {"properties": [1]}])
def test_a_schema_without_properties_has_no_parameters(schema: dict[str, Any] | None) -> None:
    """Whatever an MCP server says of its tools."""
    assert from_schema(schema) == []


def test_a_schema_that_is_no_simple_one_has_parameters_still() -> None:
    """Types that are lists, and properties that are `true`, are of any type."""
    told = from_schema({"properties": {"a": {"type": ["string", "null"]}, "b": True}})
    assert [(parameter["name"], parameter["parameter_type"]) for parameter in told] == [("a", "any"), ("b", "any")]

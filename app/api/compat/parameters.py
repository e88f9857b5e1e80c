"""A tool's parameters: a list in 0.1 and 0.2, JSON Schema (`input_schema`) since 0.3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

# What `client_tool` of 0.1 and 0.2 writes is the name of the Python type; `typing`'s begin with a capital.
_PYTHON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array"}
_PYTHON_TYPES |= {"dict": "object", "NoneType": "null", "List": "array", "Dict": "object", "tuple": "array"}
_SCHEMA_TYPES = frozenset({"string", "integer", "number", "boolean", "array", "object", "null"})


class Parameter(BaseModel):
    """One parameter of a tool, as clients of 0.1 and 0.2 declare it."""

    name: str
    parameter_type: str = ""
    description: str = ""
    required: bool = True
    default: Any = None
    items: dict[str, Any] | None = None
    title: str | None = None


def to_schema(parameters: Iterable[Parameter]) -> dict[str, Any]:
    """From clients before 0.3: the JSON Schema of an object with these parameters."""
    parameters = list(parameters)
    return {
        "type": "object",
        "properties": {parameter.name: _property(parameter) for parameter in parameters},
        "required": [parameter.name for parameter in parameters if parameter.required],
    }


def _property(parameter: Parameter) -> dict[str, Any]:
    """A type that JSON Schema does not know (`Optional`, say) is left out: model servers refuse it. So does OpenAI's
    an array that says nothing of its items."""
    kind = _PYTHON_TYPES.get(parameter.parameter_type, parameter.parameter_type)
    fields = {
        "type": kind if kind in _SCHEMA_TYPES else None,
        "description": parameter.description or None,
        "default": parameter.default,
        "items": parameter.items or ({} if kind == "array" else None),
        "title": parameter.title,
    }
    return {name: value for name, value in fields.items() if value is not None}


def from_schema(schema: dict[str, Any] | None) -> list[dict[str, Any]]:
    """For clients before 0.3: the parameters that a tool's JSON Schema declares; none if it is no object's."""
    properties = (schema or {}).get("properties")
    if not isinstance(properties, dict):
        return []
    required = (schema or {}).get("required")
    required = required if isinstance(required, list) else []
    return [
        _parameter(name, declared if isinstance(declared, dict) else {}, name in required)
        for name, declared in properties.items()
    ]


def _parameter(name: str, declared: dict[str, Any], required: bool) -> dict[str, Any]:
    kind = declared.get("type")
    return {
        "name": name,
        "parameter_type": kind if isinstance(kind, str) else "any",
        "description": str(declared.get("description") or ""),
        "required": required,
        "default": declared.get("default"),
    }

"""Any JSON schema in the part of JSON Schema that every grammar has, with an end to everything."""

from __future__ import annotations

from typing import Any

JSON = dict[str, Any]

MAX_DEPTH = 6
MAX_ITEMS = 8
_PLAIN = ("integer", "number", "boolean", "null")


def bounded(schema: Any, length: int, definitions: JSON | None = None, depth: int = 0) -> JSON:
    """What any JSON schema comes to in the part that every grammar has: types, properties, items, enumerations.

    Every string and array in it ends. What is not understood (a pattern, a format) is left out, so that what the model
    says may break it: then the tool says so. What cannot be resolved is a string, or an object without properties.
    """
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return {"type": "string", "maxLength": length}
    known = definitions if definitions is not None else schema

    def inner(each: Any) -> JSON:
        return bounded(each, length, known, depth + 1)

    if isinstance(reference := schema.get("$ref"), str):
        return inner(_resolved(reference, known))
    if choices := [value for value in _listed(schema, "enum") if not isinstance(value, dict | list)]:
        return {"enum": choices}
    if "const" in schema and not isinstance(schema["const"], dict | list):
        return {"const": schema["const"]}
    for name in ("anyOf", "oneOf"):
        if alternatives := _listed(schema, name):
            return {"anyOf": [inner(each) for each in alternatives]}
    if parts := _listed(schema, "allOf"):
        return inner(parts[0])
    kind = schema.get("type")
    if isinstance(kind, list) and kind:
        return {"anyOf": [inner({**schema, "type": each}) for each in kind]}
    if kind == "object" or (kind is None and isinstance(schema.get("properties"), dict)):
        properties = schema.get("properties")
        shapes = {name: inner(each) for name, each in properties.items()} if isinstance(properties, dict) else {}
        required = [name for name in _listed(schema, "required") if name in shapes]
        return {"type": "object", "properties": shapes, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": inner(schema.get("items")), "maxItems": MAX_ITEMS}
    if kind in _PLAIN:
        return {"type": kind}
    return {"type": "string", "minLength": 1, "maxLength": length}


def _listed(schema: JSON, name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _resolved(reference: str, definitions: JSON) -> Any:
    found: Any = definitions
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found

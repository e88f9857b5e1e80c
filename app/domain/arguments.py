"""The arguments of tool calls, which are whatever text a model wrote."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json


def parsed(text: str) -> dict[str, Any]:
    """As a tool is given them. Raises ValueError, with a sentence for the model: they are no JSON object (RFC 8259: NaN
    and infinity are no numbers), or one that is nested over 200 deep."""
    try:
        value = from_json(text, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
    except ValueError as error:
        raise ValueError(f"The arguments are not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError("The arguments are not a JSON object.")
    return value


def told(text: str) -> str:
    """As a model is told of its own earlier call: model servers refuse a history with arguments that are no object."""
    try:
        parsed(text)
    except ValueError:
        return json.dumps({"not_a_json_object": text})
    return text

"""Agent configurations: the client's tools, which had a list of parameters before 0.3."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from app.api.compat import parameters
from app.api.compat.parameters import Parameter

JSON = dict[str, Any]

_PARAMETERS = TypeAdapter(list[Parameter])


def with_schemas(config: Any) -> Any:
    """From clients before 0.3: an AgentConfig whose client tools have `input_schema`.

    Raises pydantic.ValidationError, a ValueError: `parameters` of a tool is no list of parameters. Anything else that
    is wrong is left for the validation of the configuration to refuse.
    """
    tools = config.get("client_tools") if isinstance(config, dict) else None
    return {**config, "client_tools": [_with_schema(tool) for tool in tools]} if isinstance(tools, list) else config


def _with_schema(tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("input_schema") is not None or tool.get("parameters") is None:
        return tool
    return {**tool, "input_schema": parameters.to_schema(_PARAMETERS.validate_python(tool["parameters"]))}


def with_parameters(agent: JSON) -> JSON:
    """For clients before 0.3: an Agent whose client tools have `parameters` beside `input_schema`."""
    config = agent["agent_config"]
    declared = config.get("client_tools") or ()  # null, if that was sent
    tools = [{**tool, "parameters": parameters.from_schema(tool["input_schema"])} for tool in declared]
    return {**agent, "agent_config": {**config, "client_tools": tools}}

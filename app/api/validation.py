"""What is wrong with a request though its shape is right, told before anything is stored."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import Request
from llama_stack.apis.agents import AgentConfig
from openai.types.responses import ResponseIncludable
from pydantic import BaseModel

from app.domain.errors import InvalidRequest
from app.domain.items import check_json

SHIELDS = ("input_shields", "output_shields")
MAX_SHIELDS = 16


def check_agent_config(config: AgentConfig) -> None:
    """Raises InvalidRequest, naming the field."""
    for field in SHIELDS:
        if len(getattr(config, field) or ()) > MAX_SHIELDS:
            raise InvalidRequest(f"agent_config.{field}: must be at most {MAX_SHIELDS}")
    names = [tool.name for tool in config.client_tools or []]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InvalidRequest(f"agent_config.client_tools: {', '.join(sorted(twice))} is there twice")
    if config.max_infer_iters is not None and config.max_infer_iters < 1:
        raise InvalidRequest("agent_config.max_infer_iters: must be at least 1")


def plain(body: BaseModel, *, exclude: set[str] | None = None) -> dict[str, Any]:
    """What is stored of a body, as JSON values.

    Raises InvalidRequest: pydantic reads deeper nesting than it writes, and Python reads what is no JSON. What holds
    such would be stored, and never again be sent: neither it nor a list that it is in.
    """
    try:
        value = body.model_dump(mode="json", exclude=exclude)
    except (ValueError, RecursionError):
        raise InvalidRequest("The body cannot be stored as JSON: it is nested too deeply") from None
    check_json(value, "body")
    return value


def check_text(field: str, text: str) -> None:
    """Raises InvalidRequest: Postgres stores no U+0000 in a name."""
    if "\0" in text:
        raise InvalidRequest(f"{field}: must not contain the character U+0000")


async def includes(request: Request) -> list[str]:
    """What `include` in the query asks for, however an SDK spells a list: repeated, with brackets, with commas.

    Items are stored whole, so that there is never anything to add. Raises InvalidRequest: there is no such value.
    """
    query = request.query_params
    asked = [part for name in ("include", "include[]") for given in query.getlist(name) for part in given.split(",")]
    known = get_args(ResponseIncludable)
    for value in asked:
        if value not in known:
            raise InvalidRequest(f"include: '{value}' is not supported; there are {', '.join(known)}", "include")
    return asked

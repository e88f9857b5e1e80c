"""A response's journal: its recorded steps, as stored, and the output items in them.

An output item is stored with its `output_index` in the stream, which counts all items that were ever begun: also those
of attempts that were lost, which are in no step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel

Item = dict[str, Any]


class IndexedItem(BaseModel):
    """An output item, whole."""

    output_index: int
    item: Item


class Call(BaseModel):
    """A tool call that the model asked for. `item_id`, `output_index`: of the output item that was begun for it."""

    call_id: str
    name: str
    arguments: str
    kind: Literal["function", "mcp", "file_search", "web_search", "approval"]
    item_id: str
    output_index: int

    @property
    def is_ours(self) -> bool:
        """Whether a worker makes it: not the client's, and approved where that is asked for."""
        return self.kind in ("mcp", "file_search", "web_search")


class ListStep(BaseModel):
    """The tools of one MCP server were listed: that of the request's tool at `tool_index`."""

    step_type: Literal["mcp_list_tools"] = "mcp_list_tools"
    step_id: str
    items: list[IndexedItem]
    tool_index: int
    annotations: dict[str, dict[str, Any]] = {}
    """MCP's `ToolAnnotations`, by tool."""


class ApprovedStep(BaseModel):
    """The calls that the request approves, of those that an earlier response asked approval for."""

    step_type: Literal["approved"] = "approved"
    step_id: str
    items: list[IndexedItem] = []
    calls: list[Call]


class InferenceStep(BaseModel):
    """One answer of the model."""

    step_type: Literal["inference"] = "inference"
    step_id: str
    items: list[IndexedItem]
    text: str
    calls: list[Call]
    finish_reason: str
    usage: dict[str, Any] | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the model was stopped in the middle, so that arguments of its calls may be missing."""
        return self.finish_reason in ("length", "content_filter")


class ToolStep(BaseModel):
    """One call was made; `content` is what the model is told of it."""

    step_type: Literal["tool_execution"] = "tool_execution"
    step_id: str
    items: list[IndexedItem]
    call_id: str
    content: str
    files: dict[str, str] = {}
    """Names of the files that the model may cite, by id."""


Step = ListStep | ApprovedStep | InferenceStep | ToolStep
_KINDS: dict[str, type[Step]] = {
    "mcp_list_tools": ListStep,
    "approved": ApprovedStep,
    "inference": InferenceStep,
    "tool_execution": ToolStep,
}


def read(stored: Iterable[Mapping[str, Any]]) -> list[Step]:
    """Steps as they are stored. Raises KeyError, pydantic.ValidationError."""
    return [_KINDS[step["step_type"]].model_validate(step) for step in stored]


def output(stored: Iterable[Mapping[str, Any]]) -> list[Item]:
    """The output items of steps as they are stored, in the order in which they were begun."""
    items = [indexed for step in stored for indexed in step["items"]]
    return [indexed["item"] for indexed in sorted(items, key=lambda indexed: indexed["output_index"])]


def kept(journal: Iterable[Step]) -> set[int]:
    """The output indexes of the items in these steps, and of the calls whose results will be items."""
    made = {item.output_index for step in journal for item in step.items}
    asked = (step.calls for step in journal if isinstance(step, InferenceStep | ApprovedStep))
    return made | {call.output_index for calls in asked for call in calls}


def unfinished(item: Item) -> Item:
    """An item that was begun and will not be whole."""
    if item["type"] == "mcp_list_tools":
        return {**item, "error": "The tools were not listed: the worker was lost."}
    status = "failed" if item["type"] == "web_search_call" else "incomplete"
    return {**item, "status": status} if "status" in item else item


def usage(stored: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`ResponseUsage` of all steps together; None where the model told nothing."""
    known = [step["usage"] for step in stored if step.get("usage")]
    if not known:
        return None

    def total(*path: str) -> int:
        return sum(_number(each, path) for each in known)

    return {
        "input_tokens": total("prompt_tokens"),
        "input_tokens_details": {"cached_tokens": total("prompt_tokens_details", "cached_tokens")},
        "output_tokens": total("completion_tokens"),
        "output_tokens_details": {"reasoning_tokens": total("completion_tokens_details", "reasoning_tokens")},
        "total_tokens": total("total_tokens"),
    }


def _number(value: Any, path: Sequence[str]) -> int:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, int) else 0

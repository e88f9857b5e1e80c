"""Steps and items of responses, in few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.domain.responses.steps import ApprovedStep, Call, IndexedItem, InferenceStep, Item, ListStep, ToolStep

MCP = {"type": "mcp", "server_label": "calc", "server_url": "http://mcp"}


def call(call_id: str, kind: Any = "mcp", index: int = 0, arguments: str = "{}") -> Call:
    return Call(
        call_id=call_id,
        name=f"do_{call_id}",
        arguments=arguments,
        kind=kind,
        item_id=f"i_{call_id}",
        output_index=index,
    )


def listed(tool_index: int = 0) -> ListStep:
    return ListStep(step_id="s", items=[], tool_index=tool_index)


def said(text: str = "", calls: Sequence[Call] = (), finish_reason: str = "stop", **more: Any) -> InferenceStep:
    return InferenceStep(
        step_id="s", items=more.pop("items", []), text=text, calls=list(calls), finish_reason=finish_reason, **more
    )


def made(call_id: str, content: str = "done") -> ToolStep:
    return ToolStep(step_id="s", items=[], call_id=call_id, content=content)


def approved(*calls: Call) -> ApprovedStep:
    return ApprovedStep(step_id="s", calls=list(calls))


def indexed(index: int, item: Item) -> IndexedItem:
    return IndexedItem(output_index=index, item=item)


def user(text: str) -> Item:
    return {"type": "message", "id": f"m_{text}", "role": "user", "content": [{"type": "input_text", "text": text}]}


def assistant(text: str) -> Item:
    parts = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": f"a_{text}", "role": "assistant", "content": parts}


def function_call(call_id: str) -> Item:
    return {"type": "function_call", "id": f"fc_{call_id}", "call_id": call_id, "name": "f", "arguments": "{}"}


def output(call_id: str, content: Any) -> Item:
    return {"type": "function_call_output", "id": f"o_{call_id}_{content}", "call_id": call_id, "output": content}


def request(request_id: str) -> Item:
    return {"type": "mcp_approval_request", "id": request_id, "server_label": "calc", "name": "f", "arguments": "{}"}


def answer(request_id: str, approve: bool = True, reason: str | None = None) -> Item:
    return {
        "type": "mcp_approval_response",
        "id": f"mcpa_{request_id}",
        "approval_request_id": request_id,
        "approve": approve,
        "reason": reason,
    }

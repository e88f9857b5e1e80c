"""Strategies: messages of a model, and what can follow from them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st
from llama_stack.apis.agents import AgentConfig, InferenceStep, ShieldCallStep, ToolExecutionStep
from llama_stack.apis.inference import CompletionMessage, StopReason, ToolCall, ToolResponse
from llama_stack.apis.safety import SafetyViolation, ViolationLevel

SERVER_TOOLS = ("add", "echo")
CLIENT_TOOLS = ("ask", "show")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def config(max_infer_iters: int = 10, **more: Any) -> AgentConfig:
    client_tools = [{"name": name} for name in CLIENT_TOOLS]
    return AgentConfig(model="m", instructions="", client_tools=client_tools, max_infer_iters=max_infer_iters, **more)


def call(tool: str, call_id: str = "c1") -> ToolCall:
    return ToolCall(call_id=call_id, tool_name=tool, arguments="{}")


def message(*calls: ToolCall, reason: StopReason | None = None, content: str = "") -> CompletionMessage:
    natural = StopReason.end_of_message if calls else StopReason.end_of_turn
    return CompletionMessage(content=content, stop_reason=reason or natural, tool_calls=list(calls))


def inference(given: CompletionMessage) -> InferenceStep:
    return InferenceStep(step_id="s", turn_id="t", model_response=given, started_at=NOW, completed_at=NOW)


def executed(*calls: ToolCall) -> ToolExecutionStep:
    return ToolExecutionStep(
        step_id="s", turn_id="t", tool_calls=list(calls), tool_responses=responses(*calls), started_at=NOW
    )


def shielded(refusal: str | None = None) -> ShieldCallStep:
    """`refusal`: what the violation tells the user; None: there is none."""
    violation = SafetyViolation(violation_level=ViolationLevel.ERROR, user_message=refusal) if refusal else None
    return ShieldCallStep(step_id="s", turn_id="t", violation=violation, started_at=NOW, completed_at=NOW)


def responses(*calls: ToolCall) -> list[ToolResponse]:
    return [ToolResponse(call_id=one.call_id, tool_name=one.tool_name, content="r") for one in calls]


# Ids are often empty or the same, as models give them.
calls: st.SearchStrategy[ToolCall] = st.builds(
    call, st.sampled_from((*SERVER_TOOLS, *CLIENT_TOOLS, "unknown")), st.sampled_from(("", "c1", "c2"))
)
messages: st.SearchStrategy[Any] = st.builds(
    lambda asked, reason: message(*asked, reason=reason),
    st.lists(calls, max_size=4),
    st.sampled_from((None, *StopReason)),
)

"""What a response does next: a pure function of what is recorded, as `app.domain.decide` is for agents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.domain.responses.steps import ApprovedStep, Call, InferenceStep, ListStep, Step, ToolStep

MAX_INFER_ITERS = 10


@dataclass(frozen=True)
class ListTools:
    """List the tools of the MCP server that is the request's tool at `tool_index`."""

    tool_index: int


@dataclass(frozen=True)
class Approve:
    """Record which calls the request approves."""


@dataclass(frozen=True)
class Infer:
    """Ask the model."""


@dataclass(frozen=True)
class RunCalls:
    """Make these calls of the step at `ordinal`, given as (index among that step's calls, call)."""

    ordinal: int
    calls: tuple[tuple[int, Call], ...]


@dataclass(frozen=True)
class Finish:
    """End the response. `reason`: why it is incomplete."""

    status: Literal["completed", "incomplete"]
    reason: str | None = None


Action = ListTools | Approve | Infer | RunCalls | Finish


def decide(request: Mapping[str, Any], journal: Sequence[Step], *, approves: bool = False) -> Action:
    """The next action of a response. `approves`: its input has approvals of calls."""
    listed = {step.tool_index for step in journal if isinstance(step, ListStep)}
    for index, tool in enumerate(request.get("tools") or ()):
        if tool["type"] == "mcp" and index not in listed:
            return ListTools(index)
    if approves and not any(isinstance(step, ApprovedStep) for step in journal):
        return Approve()
    ordinal = _last_asking(journal)
    if ordinal is None:
        return Infer()
    step = journal[ordinal]
    assert isinstance(step, InferenceStep | ApprovedStep)
    if isinstance(step, InferenceStep) and step.is_cut:
        # None of its calls is made: one that was cut off behind its name would be made without its arguments.
        return Finish("incomplete", "max_output_tokens" if step.finish_reason == "length" else "content_filter")
    ours = [(index, call) for index, call in enumerate(step.calls) if call.is_ours]
    answered = sum(isinstance(later, ToolStep) for later in journal[ordinal + 1 :])
    if answered < len(ours):
        return RunCalls(ordinal, tuple(ours[answered:]))
    if isinstance(step, ApprovedStep):
        return Infer()
    return _after_answer(request, journal, step)


def _after_answer(request: Mapping[str, Any], journal: Sequence[Step], step: InferenceStep) -> Action:
    if not step.calls or any(not call.is_ours for call in step.calls):
        return Finish("completed")
    iterations = sum(isinstance(each, InferenceStep) for each in journal)
    if iterations >= (request.get("max_infer_iters") or MAX_INFER_ITERS):
        return Finish("incomplete", "max_infer_iters")
    return Infer()


def _last_asking(journal: Sequence[Step]) -> int | None:
    asking = (i for i in range(len(journal) - 1, -1, -1) if isinstance(journal[i], InferenceStep | ApprovedStep))
    return next(asking, None)

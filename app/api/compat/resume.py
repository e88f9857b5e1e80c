"""Resuming a turn that has ended: how clients with a tool parser of their own go on (`ReActAgent` of 0.1 and 0.2).

They find tool calls in the text of a complete turn, run them, and post the responses as a resume of it. A turn that has
ended stays as it is here: what follows is the session's next turn, with the responses as its input messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.domain.turns import TurnStatus
from app.store.agents import SessionRow
from app.store.turns import TurnRow

JSON = dict[str, Any]


def goes_on(session: SessionRow, turn: TurnRow, responses: Sequence[JSON], *, repeated: bool) -> bool:
    """Whether these ToolResponses answer calls that the client found itself in the session's last turn.

    Serves 0.1 and 0.2. `repeated`: it may have been sent before, and what follows be the last turn by now. A resume of
    a turn that awaited input, sent twice, is none: its calls are the turn's own.
    """
    is_last = turn.number + 1 == session.next_number
    if turn.status is not TurnStatus.COMPLETED or not responses or not (is_last or repeated):
        return False
    asked = {
        call["call_id"]
        for step in turn.steps
        if step["step_type"] == "inference"
        for call in step["model_response"]["tool_calls"] or ()
    }
    return all(response["call_id"] not in asked for response in responses)


def as_messages(responses: Sequence[JSON]) -> list[JSON]:
    """The same as ToolResponseMessages."""
    return [{"role": "tool", "call_id": each["call_id"], "content": each["content"]} for each in responses]

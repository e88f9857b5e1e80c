"""Shows a turn's events as they come: each step, the model's text, tool calls and their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app.cli.errors import CommandError

_RESULT_CHARACTERS = 300


class Transcript:
    """Prints events (as JSON objects, in the shapes of the agents API, or of Responses) to standard output."""

    def __init__(self, *, show_steps: bool = False) -> None:
        self._show_steps = show_steps
        self._within_line = False
        self._within_step = False
        self.turn_id: str | None = None
        self.awaits_input = False

    def show(self, chunk: Mapping[str, Any]) -> None:
        """One event. Raises CommandError: it says that the turn failed or was cancelled."""
        if error := chunk.get("error"):
            self.end_line()
            if error.get("code") == "cancelled":
                raise CommandError("the turn was cancelled")
            raise CommandError(f"the turn failed: {error.get('message')} ({error.get('code')})")
        if "type" in chunk:
            self._show_of_response(chunk)
            return
        payload = chunk["event"]["payload"]
        match payload["event_type"]:
            case "step_start":
                if self._within_step:
                    self._line("the worker was lost or stopped: the step is made again")
                self._within_step = True
                self._step(f"{payload['step_type']} step begins")
            case "step_progress":
                self._delta(payload["delta"])
            case "step_complete":
                self._within_step = False
                self._complete(payload["step_details"])
            case "turn_complete" | "turn_awaiting_input" as kind:
                self.end_line()
                self.turn_id = payload["turn"]["turn_id"]
                self.awaits_input = kind == "turn_awaiting_input"
                self._step("the turn awaits tool responses" if self.awaits_input else "the turn is complete")

    def _show_of_response(self, event: Mapping[str, Any]) -> None:
        match event["type"].removeprefix("response."):
            case "output_text.delta" | "refusal.delta":
                self._delta({"type": "text", "text": event["delta"]})
            case "output_item.done" if event["item"].get("status") == "incomplete":
                self._within_step = False
                self._line("the worker was lost or the model stopped: this is not whole")
            case "output_item.added":
                self._within_step = event["item"]["type"] == "message"
            case "output_item.done":
                self._within_step = False
                self._item(event["item"])
            case "completed" | "incomplete":
                self.end_line()
                self._step(f"the response is {event['response']['status']}")
            case "failed":
                self.end_line()
                error = event["response"]["error"]
                raise CommandError(
                    f"the response failed: {error['message']}" if error else "the response was cancelled"
                )

    def _item(self, item: Mapping[str, Any]) -> None:
        self.end_line()
        if item["type"] in ("function_call", "mcp_call", "mcp_approval_request"):
            self._line(f"{item['type']}: {item['name']} {_compact(item['arguments'])}")
        if item.get("output") or item.get("error"):
            self._line(f"{item['name']} answers: {_compact(item['error'] or item['output'])}")

    def end_line(self) -> None:
        if self._within_line:
            print(flush=True)
            self._within_line = False

    def _delta(self, delta: Mapping[str, Any]) -> None:
        if delta["type"] == "text" and delta["text"]:
            print(delta["text"], end="", flush=True)
            self._within_line = True

    def _complete(self, step: Mapping[str, Any]) -> None:
        self.end_line()
        for call in (step.get("model_response") or {}).get("tool_calls") or []:
            self._line(f"calls {call['tool_name']} {_compact(call['arguments'])}")
        for response in step.get("tool_responses") or []:
            self._line(f"{response['tool_name']} answers: {_compact(response['content'])}")
        if violation := step.get("violation"):
            self._line(f"a shield objects: {violation.get('user_message')}")
        self._step(f"{step['step_type']} step is complete")

    def _step(self, text: str) -> None:
        if self._show_steps:
            self._line(text)

    def _line(self, text: str) -> None:
        self.end_line()
        print(f"  [{text}]", flush=True)


def _compact(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return text if len(text) <= _RESULT_CHARACTERS else f"{text[:_RESULT_CHARACTERS]}…"

"""One inference: asks the model, publishes its deltas as they come, gives the whole message.

The deltas are those of llama_stack's `convert_openai_chat_completion_stream`, without its models for every chunk.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from llama_stack.apis.inference import CompletionMessage, StopReason, ToolCall

from app.domain.errors import TurnFailure
from app.domain.events import StepProgress

Publish = Callable[[str], object]

_STOP_REASONS = {
    "stop": StopReason.end_of_turn,
    "length": StopReason.out_of_tokens,
    "tool_calls": StopReason.end_of_message,
}


@dataclass
class _CallBuffer:
    """A tool call whose pieces are still coming."""

    call_id: str
    name: str = ""
    arguments: str = ""


@dataclass
class Inference:
    """Collects one streamed answer. `publish` gets each delta as the data of a `step_progress` event."""

    progress: StepProgress
    publish: Publish
    taken_call_ids: set[str]
    content: str = ""
    calls: list[_CallBuffer] = field(default_factory=list)
    by_index: dict[int, _CallBuffer] = field(default_factory=dict)
    stop_reason: StopReason | None = None

    async def run(self, stream: AsyncIterator[Any]) -> CompletionMessage:
        async for chunk in stream:
            if chunk.choices:
                self._take(chunk.choices[0])
        tool_calls = [self._finish(buffer) for buffer in self.calls if buffer.name]
        return CompletionMessage(
            content="" if tool_calls else self.content,
            stop_reason=self.stop_reason or StopReason.end_of_turn,
            tool_calls=tool_calls,
        )

    def _take(self, choice: Any) -> None:
        self.stop_reason = _STOP_REASONS.get(choice.finish_reason or "", self.stop_reason)
        delta = choice.delta
        if delta.content:
            self.content += delta.content
            self.publish(self.progress.text(delta.content))
        for piece in delta.tool_calls or ():
            self._take_call(piece)

    def _take_call(self, piece: Any) -> None:
        buffer = self._buffer_of(piece)
        function = piece.function
        if function is None:
            return
        shown = ""
        if function.name:
            buffer.name = function.name
            shown = f"{buffer.name}("
        if function.arguments:
            buffer.arguments += function.arguments
            shown += function.arguments  # many servers send both at once; llama_stack drops the name then
        if shown:
            self.publish(self.progress.tool_call(shown, "in_progress"))

    def _buffer_of(self, piece: Any) -> _CallBuffer:
        """The call of its index, or the next one: some servers give all calls the same index, or none."""
        index = piece.index or 0
        buffer = self.by_index.get(index)
        named = piece.function is not None and piece.function.name
        if buffer is None or (named and piece.id and piece.id != buffer.call_id):
            buffer = self.by_index[index] = _CallBuffer(piece.id or "")
            self.calls.append(buffer)
        return buffer

    def _finish(self, buffer: _CallBuffer) -> ToolCall:
        self.publish(self.progress.tool_call(")", "in_progress"))
        call = ToolCall(call_id=self._unique(buffer.call_id), tool_name=buffer.name, arguments=buffer.arguments or "{}")
        self.publish(self.progress.tool_call(call.model_dump(mode="json"), "succeeded"))
        return call

    def _unique(self, call_id: str) -> str:
        """Models leave ids empty or use one twice; clients match their tool responses by them."""
        if not call_id or call_id in self.taken_call_ids:
            call_id = f"call_{uuid.uuid4().hex}"
        self.taken_call_ids.add(call_id)
        return call_id


def call_ids(messages: Iterable[Any]) -> set[str]:
    """The ids of all tool calls in a conversation."""
    return {call.call_id for message in messages for call in getattr(message, "tool_calls", None) or ()}


def model_failure(error: Exception) -> TurnFailure:
    """What the client is told when the model server fails: its status and its own words."""
    if isinstance(error, ValueError):
        return TurnFailure("invalid_request", str(error))  # llama_stack: there is no such model, or no such parameter
    status = getattr(error, "status_code", None)
    if isinstance(status, int):
        return TurnFailure("model_error", f"{status}: {error}", status)
    return TurnFailure("model_error", f"The model server failed (INFERENCE_URL): {str(error) or type(error).__name__}")

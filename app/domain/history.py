"""What the model is given: a session's turns as messages, with every tool call answered.

Follows `ChatAgent.turn_to_messages` of llama_stack 0.3.5. A call that never got an answer (its turn was cancelled,
failed, superseded or ran out of iterations) gets a synthetic one: model servers refuse a history without it. What a
shield refused, or no input shield has let pass, is not told to the model in later turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llama_stack.apis.agents import AgentConfig, InferenceStep, ShieldCallStep, Step, ToolExecutionStep
from llama_stack.apis.inference import (
    CompletionMessage,
    Message,
    SystemMessage,
    ToolResponseMessage,
    UserMessage,
)

from app.domain.decide import answers_client_calls, refusal

UNANSWERED = "The outcome of this tool call is unknown: the turn ended before it was answered."


def conversation(config: AgentConfig, turns: Iterable[tuple[Sequence[Message], Sequence[Step]]]) -> list[Message]:
    """The instructions, then each turn, given as (input messages, steps), the current one last.

    A turn may answer the calls of the one before it, by a tool response among its input messages.
    """
    messages: list[Message] = [SystemMessage(content=config.instructions)] if config.instructions else []
    told = list(turns)
    for input_messages, steps in told[:-1]:
        messages.extend(_past_turn(config, input_messages, steps))
    for input_messages, steps in told[-1:]:
        messages.extend(turn_messages(input_messages, steps))
    return complete(messages)


def _past_turn(config: AgentConfig, input_messages: Sequence[Message], steps: Sequence[Step]) -> list[Message]:
    """As far as the input shields got: the turn may have failed, or been cancelled, before they let its input pass."""
    if config.input_shields:
        if not steps:
            return []
        if answers_client_calls(config, steps[-1]):
            steps = steps[:-1]
    return turn_messages(input_messages, steps)


def turn_messages(input_messages: Sequence[Message], steps: Sequence[Step]) -> list[Message]:
    """One turn: its input, then each step's part of the conversation.

    Of one that a shield refused: the refusal in place of all that was said, or nothing, if it was the input.
    """
    answered = {
        response.call_id for step in steps if isinstance(step, ToolExecutionStep) for response in step.tool_responses
    }
    messages: list[Message] = [
        message.model_copy(update={"context": None}) if isinstance(message, UserMessage) else message
        for message in input_messages
        if not (isinstance(message, ToolResponseMessage) and message.call_id in answered)
    ]
    if refused := next((step for step in steps if isinstance(step, ShieldCallStep) and step.violation), None):
        asked = any(isinstance(step, InferenceStep) for step in steps)
        return [*messages, refusal(refused.violation)] if asked else []
    for step in steps:
        if isinstance(step, InferenceStep):
            messages.append(step.model_response)
        elif isinstance(step, ToolExecutionStep):
            messages.extend(ToolResponseMessage(call_id=r.call_id, content=r.content) for r in step.tool_responses)
    return messages


def complete(messages: Sequence[Message]) -> list[Message]:
    """Answers each tool call that no tool response follows before the next message that is not a tool response."""
    completed: list[Message] = []
    open_calls: list[str] = []
    for message in messages:
        if isinstance(message, ToolResponseMessage):
            if message.call_id in open_calls:
                open_calls.remove(message.call_id)
        else:
            completed.extend(_unknown(open_calls))
            open_calls = [call.call_id for call in message.tool_calls] if isinstance(message, CompletionMessage) else []
        completed.append(message)
    return completed + _unknown(open_calls)


def _unknown(call_ids: Iterable[str]) -> list[Message]:
    return [ToolResponseMessage(call_id=call_id, content=UNANSWERED) for call_id in call_ids]

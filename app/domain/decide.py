"""What a turn does next: a pure function of what is recorded.

Recovery is no special case: a new attempt calls the same function on the same journal. Behaviour follows llama_stack
0.3.5's `ChatAgent` (`agent_instance.py`), with the deviations that `tests/conformance` lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama_stack.apis.agents import AgentConfig, InferenceStep, ShieldCallStep, Step, ToolExecutionStep
from llama_stack.apis.inference import CompletionMessage, StopReason, ToolCall, ToolResponse
from llama_stack.apis.safety import SafetyViolation


@dataclass(frozen=True)
class RunShields:
    """Ask the agent's shields whether this leg may go on: its input shields about what the leg brought, or, with the
    message that the leg would end with, its output shields about that. `ordinal`: the step that said the message, or
    that what is asked about comes before."""

    shields: tuple[str, ...]
    ordinal: int
    message: CompletionMessage | None = None

    @property
    def touchpoint(self) -> str:
        """As llama_stack names it in the step's events."""
        return "user-input" if self.message is None else "assistant-output"


@dataclass(frozen=True)
class Infer:
    """Ask the model."""


@dataclass(frozen=True)
class RunTools:
    """Run these server tool calls of the inference step at `ordinal`, given as (index in its message, call)."""

    ordinal: int
    calls: tuple[tuple[int, ToolCall], ...]


@dataclass(frozen=True)
class RecordResponses:
    """Record the step of the client tool calls that the client answered."""

    calls: tuple[ToolCall, ...]
    responses: tuple[ToolResponse, ...]


@dataclass(frozen=True)
class AwaitInput:
    """End the leg: the client is asked to run the tool calls of `message`."""

    message: CompletionMessage


@dataclass(frozen=True)
class Finish:
    """End the turn with `message`."""

    message: CompletionMessage


Action = RunShields | Infer | RunTools | RecordResponses | AwaitInput | Finish


def decide(config: AgentConfig, journal: Sequence[Step], responses: Mapping[int, Sequence[ToolResponse]]) -> Action:
    """The next action of a turn.

    `journal`: the turn's recorded steps, in order. `responses`: the client's tool responses, by the ordinal (index in
    the journal) of the inference step that asked for them.
    """
    if refused := _refusal(journal):
        return Finish(refused)
    ordinal = _last_inference(journal)
    if ordinal is None:
        return _infer(config, journal, shielded=bool(journal))
    message = journal[ordinal].model_response
    iterations = sum(isinstance(step, InferenceStep) for step in journal)
    if iterations >= (config.max_infer_iters or 10):
        return _end(config, journal, ordinal, _settled(message, StopReason.end_of_turn))
    if message.stop_reason == StopReason.out_of_tokens:
        return _end(config, journal, ordinal, _settled(message, StopReason.out_of_tokens))
    if message.tool_calls:
        return _after_tool_calls(config, journal, ordinal, responses.get(ordinal))
    if message.stop_reason == StopReason.end_of_turn:
        return _end(config, journal, ordinal, Finish(message))
    return Infer()


def _after_tool_calls(
    config: AgentConfig, journal: Sequence[Step], ordinal: int, responses: Sequence[ToolResponse] | None
) -> Action:
    """Server tools first, in one parallel action; then the client's, all in one step; then the model again.

    Answered calls are told by counting steps, never by the model's call ids, which may be empty or repeat.
    """
    message = journal[ordinal].model_response
    client_calls, server_calls = split_calls(config, message)
    answered = sum(isinstance(step, ToolExecutionStep) for step in journal[ordinal + 1 :])
    if answered < len(server_calls):
        return RunTools(ordinal, tuple(server_calls[answered:]))
    if not client_calls:
        return Infer()
    if answered > len(server_calls):
        return _infer(config, journal, shielded=isinstance(journal[-1], ShieldCallStep))
    if responses is not None:
        return RecordResponses(tuple(client_calls), tuple(responses))
    asking = {"tool_calls": client_calls, "stop_reason": StopReason.end_of_message}
    return _end(config, journal, ordinal, AwaitInput(message.model_copy(update=asking, deep=True)))


def _infer(config: AgentConfig, journal: Sequence[Step], *, shielded: bool) -> RunShields | Infer:
    """At the beginning of a leg: its input comes before the shields, and then before the model."""
    shields = tuple(dict.fromkeys(config.input_shields or ()))
    return RunShields(shields, len(journal)) if shields and not shielded else Infer()


def _end(
    config: AgentConfig, journal: Sequence[Step], ordinal: int, action: AwaitInput | Finish
) -> RunShields | AwaitInput | Finish:
    """The end of a leg, once the output shields have seen its message."""
    shields = tuple(dict.fromkeys(config.output_shields or ()))
    shielded = any(isinstance(step, ShieldCallStep) for step in journal[ordinal + 1 :])
    return RunShields(shields, ordinal, action.message) if shields and not shielded else action


def _refusal(journal: Sequence[Step]) -> CompletionMessage | None:
    """What a shield that found a violation tells the user: the turn is over with it."""
    last = journal[-1] if journal else None
    if isinstance(last, ShieldCallStep) and last.violation:
        return refusal(last.violation)
    return None


def refusal(violation: SafetyViolation) -> CompletionMessage:
    """In place of what a shield refused."""
    return CompletionMessage(content=violation.user_message or "", stop_reason=StopReason.end_of_turn)


def tool_name(call: ToolCall) -> str:
    """The name as the model said it: llama_stack makes an enum member of `code_interpreter` and its like."""
    return str(getattr(call.tool_name, "value", call.tool_name))


def split_calls(config: AgentConfig, message: CompletionMessage) -> tuple[list[ToolCall], list[tuple[int, ToolCall]]]:
    """(the client's calls, the server's calls with their index in the message)."""
    client_tools = {tool.name for tool in config.client_tools or []}
    client = [call for call in message.tool_calls if tool_name(call) in client_tools]
    server = [(index, call) for index, call in enumerate(message.tool_calls) if tool_name(call) not in client_tools]
    return client, server


def answers_client_calls(config: AgentConfig, step: Step) -> bool:
    """Whether a step is that of the client's tool responses."""
    client_tools = {tool.name for tool in config.client_tools or []}
    return isinstance(step, ToolExecutionStep) and any(tool_name(call) in client_tools for call in step.tool_calls)


def _settled(message: CompletionMessage, stop_reason: StopReason) -> Finish:
    """The end of a turn that ran out of iterations or tokens: nobody will run the calls that are left."""
    return Finish(message.model_copy(update={"tool_calls": [], "stop_reason": stop_reason}, deep=True))


def _last_inference(journal: Sequence[Step]) -> int | None:
    return next((i for i in range(len(journal) - 1, -1, -1) if isinstance(journal[i], InferenceStep)), None)

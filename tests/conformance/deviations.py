"""Where our engine means to differ from `ChatAgent`, each with its reason.

A deviation turns what `ChatAgent` did into what ours is to do. It must change something, and ours must equal the
result: one that no longer shows, on either side, fails the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.conformance.scripts import ASK_USER, SHOW
from tests.conformance.transcripts import Json, Leg, Transcript, payload

Change = Callable[[Transcript, Transcript], None]
CLIENT_TOOLS = {ASK_USER["name"], SHOW["name"]}


@dataclass(frozen=True)
class Deviation:
    """`change` edits the reference's transcript, its first argument; the second is ours, to read."""

    reason: str
    change: Change


def _steps(leg: Leg) -> list[Json]:
    """Every copy of every step in a leg: completed, and in the turn that it ends with."""
    found = []
    for event in leg.events:
        content = payload(event)
        if content["event_type"] == "step_complete":
            found.append(content["step_details"])
        found += content.get("turn", {}).get("steps", [])
    return found


def _own_step_ids(reference: Transcript, _: Transcript) -> None:
    """A client's step is told by its tools, and in a script by its responses."""
    for leg in reference.legs:
        for event in leg.events:
            details = payload(event).get("step_details")
            if details and _is_clients(details):
                payload(event)["step_id"] = _own_id(details)
        for step in _steps(leg):
            if _is_clients(step):
                step["step_id"] = _own_id(step)


def _is_clients(step: Json) -> bool:
    return any(call["tool_name"] in CLIENT_TOOLS for call in step.get("tool_calls", []))


def _own_id(step: Json) -> str:
    return "|".join(response["content"] for response in step["tool_responses"])


def _no_open_calls(reference: Transcript, _: Transcript) -> None:
    for leg in reference.legs:
        last = payload(leg.events[-1])
        message = last["turn"]["output_message"]
        if message["tool_calls"] and message["stop_reason"] == "end_of_turn":
            last["event_type"] = "turn_complete"
            message["tool_calls"] = []


def _toolgroups_stay(reference: Transcript, _: Transcript) -> None:
    reference.requests[1]["tools"] = reference.requests[0]["tools"]
    if "tool_choice" in reference.requests[0]:
        reference.requests[1]["tool_choice"] = reference.requests[0]["tool_choice"]


def _open_calls_are_closed(reference: Transcript, ours: Transcript) -> None:
    messages, answered = reference.requests[-1]["messages"], ours.requests[-1]["messages"]
    asking = next(index for index, message in enumerate(messages) if message.get("tool_calls"))
    [call] = messages[asking]["tool_calls"]
    assert "outcome of this tool call is unknown" in answered[asking + 1]["content"]
    messages.insert(asking + 1, {**answered[asking + 1], "tool_call_id": call["id"]})


def _tool_trouble(reference: Transcript, ours: Transcript) -> None:
    """The reference stops at the call; ours goes on, with an error for the model."""
    [leg], [our_leg] = reference.legs, ours.legs
    assert leg.failed
    rest = our_leg.events[len(leg.events) :]
    [response] = payload(rest[0])["step_details"]["tool_responses"]
    assert payload(rest[-1])["event_type"] == "turn_complete"
    assert response["content"]
    assert len(ours.requests) == 2
    assert ours.requests[1]["messages"][-1]["content"] == response["content"]
    leg.events, leg.failed = our_leg.events, False
    reference.requests = ours.requests
    for (_name, arguments), (_our_name, our_arguments) in zip(reference.calls, ours.calls, strict=True):
        arguments["session_id"] = our_arguments["session_id"]


def _failed_turns_are_history(reference: Transcript, ours: Transcript) -> None:
    reference.requests[-1]["messages"].insert(0, reference.requests[0]["messages"][0])


def _no_session_for_mcp(reference: Transcript, _: Transcript) -> None:
    for _name, arguments in reference.calls:
        del arguments["session_id"]


def _resources_are_told(reference: Transcript, _: Transcript) -> None:
    for node in reference.nodes():
        if node.get("content") == [{"type": "text", "text": "see below"}]:
            node["content"].append({"type": "text", "text": "attached"})


def _builtin_names(reference: Transcript, _: Transcript) -> None:
    function = reference.requests[0]["tools"][0]["function"]
    assert function["name"] == "brave_search"
    function["name"] = "web_search"
    for leg in reference.legs:
        for event in leg.events:
            _replace(event, "brave_search", "web_search")


def _replace(value: object, old: str, new: str) -> None:
    """Every string that is `old`, in place."""
    if isinstance(value, dict):
        for key, item in value.items():
            if item == old:
                value[key] = new
            _replace(item, old, new)
    elif isinstance(value, list):
        for item in value:
            _replace(item, old, new)


def _unique_call_ids(reference: Transcript, _: Transcript) -> None:
    """The second call of a message, told by its tool, or one without an id, has an id of its own."""
    for node in reference.nodes():
        is_second = "echo" in (node.get("tool_name"), node.get("function", {}).get("name"))
        for key in ("call_id", "tool_call_id", "id"):
            if node.get(key) == "" or (node.get(key) == "same" and is_second):
                node[key] = f"new {node[key]}"
    for request in reference.requests:
        tool_messages = [message for message in request["messages"] if message.get("tool_call_id") == "same"]
        for message in tool_messages[1:]:
            message["tool_call_id"] = "new same"


def _no_arguments(reference: Transcript, _: Transcript) -> None:
    for node in reference.nodes():
        if node.get("arguments") == "":
            node["arguments"] = "{}"


def _input_not_mutated(reference: Transcript, ours: Transcript) -> None:
    for leg, our_leg in zip(reference.legs, ours.legs, strict=True):
        turn, our_turn = payload(leg.events[-1])["turn"], payload(our_leg.events[-1])["turn"]
        assert "The note says 42." not in str(our_turn["input_messages"])
        if "The note says 42." in str(turn["input_messages"]):
            turn["input_messages"] = our_turn["input_messages"]


def _tool_config_counts(reference: Transcript, _: Transcript) -> None:
    for request in reference.requests:
        request["tool_choice"] = "none"


def _stop_is_sent(reference: Transcript, _: Transcript) -> None:
    for request in reference.requests:
        request["stop"] = ["END"]


def _response_formats(reference: Transcript, ours: Transcript) -> None:
    [leg], [our_leg] = reference.legs, ours.legs
    assert leg.failed
    assert not reference.requests
    assert ours.requests[0]["response_format"]["json_schema"]["schema"]["properties"] == {"answer": {"type": "string"}}
    assert len(leg.events) == 1
    leg.events, leg.failed = our_leg.events, False
    reference.requests = ours.requests


def _refused_is_not_told(reference: Transcript, ours: Transcript) -> None:
    """Neither to the model nor to the guards, in the turn after."""
    for request, our_request in zip(reference.requests[-3:], ours.requests[-3:], strict=True):
        refused = ("GUARD User", "Assistant: hello", "'content': 'hello '")
        assert [any(text in str(each["messages"]) for text in refused) for each in (request, our_request)] == [
            True,
            False,
        ]
        request["messages"] = our_request["messages"]


def _guards_see_what_the_model_sees(reference: Transcript, ours: Transcript) -> None:
    for request, our_request in zip(reference.requests, ours.requests, strict=True):
        if "BEGIN CONVERSATION" in str(request["messages"]):
            request["messages"] = our_request["messages"]


DEVIATIONS: dict[str, Deviation] = {
    "own step ids": Deviation(
        "ChatAgent gives a client tool's step the id of the step before it, so that GET step shows the wrong one.",
        _own_step_ids,
    ),
    "no open calls at the end": Deviation(
        "When iterations or tokens run out, nobody runs the calls that are left: the turn completes without them. "
        "ChatAgent reports even server tools as awaiting input, and so the SDK tries to run them.",
        _no_open_calls,
    ),
    "toolgroups stay": Deviation(
        "ChatAgent forgets a turn's own toolgroups when the turn is resumed.", _toolgroups_stay
    ),
    "open calls are closed": Deviation(
        "Model servers refuse a history with a tool call that was never answered; ChatAgent sends it.",
        _open_calls_are_closed,
    ),
    "tool trouble is a response": Deviation(
        "A model can go on from a tool's error, a call of an unknown tool or bad arguments; ChatAgent fails the turn "
        "and forgets it.",
        _tool_trouble,
    ),
    "failed turns are history": Deviation(
        "ChatAgent never stores a turn that fails in an inference; ours is, so its input is part of the history.",
        _failed_turns_are_history,
    ),
    "no session for MCP": Deviation(
        "An MCP server gets just what the model said: its schema knows no session_id.", _no_session_for_mcp
    ),
    "resources are told": Deviation(
        "What an MCP tool gives besides text and images is told to the model; llama_stack leaves it out, or fails.",
        _resources_are_told,
    ),
    "builtin tools keep their names": Deviation(
        "ChatAgent tells the model of web_search as brave_search, whatever the provider, and refuses builtin tools "
        "that Llama models do not know.",
        _builtin_names,
    ),
    "call ids are unique": Deviation(
        "Models leave call ids empty or use one twice; clients and model servers match responses by them.",
        _unique_call_ids,
    ),
    "no arguments are {}": Deviation(
        "A call without arguments is one with none: an empty string is not JSON.", _no_arguments
    ),
    "input is not mutated": Deviation(
        "ChatAgent appends document text to the user's message itself, which the client then sees in its turn.",
        _input_not_mutated,
    ),
    "what was refused is not told": Deviation(
        "What a shield refused is kept from the model in later turns too; ChatAgent tells it, and behind a refused "
        "answer the refusal, a second message of the assistant's, which many model servers refuse.",
        _refused_is_not_told,
    ),
    "guards see what the model sees": Deviation(
        "ChatAgent's guards see neither the documents of the turn, nor its tool calls and what they gave: who brings a "
        "document, or has the model call a client's tool, gets round them.",
        _guards_see_what_the_model_sees,
    ),
    "a turn's tool_config counts": Deviation("ChatAgent ignores the tool_config of a turn.", _tool_config_counts),
    "stop is sent": Deviation("ChatAgent drops sampling_params.stop.", _stop_is_sent),
    "response formats work": Deviation(
        "ChatAgent passes the Llama Stack's response_format where OpenAI's is needed, and fails.", _response_formats
    ),
}

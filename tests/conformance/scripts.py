"""What is played to both engines: agents, and the legs that a client asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.conformance.world import schema

Json = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A new turn. `text` is the model's script."""

    text: Any
    documents: tuple[Json, ...] = ()
    toolgroups: tuple[Any, ...] = ()
    tool_config: Json | None = None


@dataclass(frozen=True)
class Answer:
    """A resume: each open call of a tool is answered with its content. `as_turn`: by a new turn, as clients before
    0.1.6 do."""

    contents: dict[str, str]
    as_turn: bool = False


@dataclass(frozen=True)
class Script:
    legs: tuple[Ask | Answer, ...]
    agent: Json = field(default_factory=dict)
    deviations: tuple[str, ...] = ()


ASK_USER = {"name": "ask_user", "description": "Asks.", "input_schema": schema(question="string")}
SHOW = {"name": "show", "input_schema": schema(what="string")}
CALC: Json = {"toolgroups": ["calc"]}
CLIENT: Json = {"client_tools": [ASK_USER, SHOW]}
SHIELDED: Json = {"input_shields": ["guard"], "output_shields": ["guard"]}
NOTE: Json = {"content": "The note says 42.", "mime_type": "text/plain"}
MORE: Json = {"content": {"type": "text", "text": "And more."}, "mime_type": "application/json"}
ADD = 'CALL add {"a": 1, "b": 2}'
ASK = 'CALL ask_user {"question": "Why?"}'


def one(text: Any, *deviations: str, **agent: Any) -> Script:
    return Script((Ask(text),), agent, deviations)


SCRIPTS: dict[str, Script] = {
    # Text
    "plain text": one("SAY Hello there, world"),
    "instructions": one("SAY ok", instructions="You are brief."),
    "unicode": one("UNICODE"),
    "an empty answer": one("PART"),
    "parts of content": one([{"type": "text", "text": "SAY one"}, {"type": "text", "text": "and two"}]),
    "two turns": Script((Ask("SAY one"), Ask("SAY two")), {"instructions": "Remember."}),
    # Server tools
    "a server tool": one(f"{ADD} | SAY three", **CALC),
    "text, then a call": one(f"PART Let me see | {ADD} | SAY three", **CALC),
    "parallel calls": one(f'PART Both | {ADD} & CALL echo {{"text": "naïve 🐫"}} | SAY done', **CALC),
    "several iterations": one(f'{ADD} | CALL echo {{"text": "x"}} | {ADD} | SAY done', **CALC),
    "a later turn after tools": Script((Ask(f"{ADD} | SAY three"), Ask("SAY two")), CALC),
    "one tool of a group": one('CALL echo {"text": "x"} | SAY done', toolgroups=["calc/echo"]),
    "toolgroup arguments": one(f"{ADD} | SAY x", toolgroups=[{"name": "calc", "args": {"unit": "m"}}]),
    "a turn's own toolgroups": Script((Ask(f"{ADD} | SAY x", toolgroups=("calc",)), Ask("SAY y"))),
    "an MCP tool": one('CALL count {"key": "it"} | SAY x', "no session for MCP", toolgroups=["mcp"]),
    "an MCP tool that fails": one(
        'CALL slow {"seconds": "many", "text": "x"} | SAY x', "no session for MCP", toolgroups=["mcp"]
    ),
    "an MCP tool of the group, and an attachment": one(
        "CALL attachment | TOOLS", "no session for MCP", "resources are told", toolgroups=["mcp/attachment"]
    ),
    "a builtin tool": one("TOOLS", "builtin tools keep their names", toolgroups=["builtin::websearch"]),
    # Client tools
    "a client tool": Script((Ask(f"{ASK} | SAY thanks"), Answer({"ask_user": "because"})), CLIENT, ("own step ids",)),
    "two client tools": Script(
        (Ask(f'{ASK} & CALL show {{"what": "a"}} | SAY thanks'), Answer({"ask_user": "because", "show": "shown"})),
        CLIENT,
        ("own step ids",),
    ),
    "client tools twice": Script(
        (Ask(f"{ASK} | {ASK} | SAY thanks"), Answer({"ask_user": "one"}), Answer({"ask_user": "two"})),
        CLIENT,
        ("own step ids",),
    ),
    "server and client tools in one message": Script(
        (Ask(f'{ADD} & {ASK} & CALL echo {{"text": "x"}} | SAY thanks'), Answer({"ask_user": "because"})),
        CALC | CLIENT,
        ("own step ids",),
    ),
    "a turn's own toolgroups and a client tool": Script(
        (Ask(f"{ASK} | SAY thanks", toolgroups=("calc",)), Answer({"ask_user": "because"})),
        CLIENT,
        ("own step ids", "toolgroups stay"),
    ),
    "a turn after one that awaits input": Script((Ask(ASK), Ask("SAY next")), CLIENT, ("open calls are closed",)),
    "a tool response as a new turn": Script(
        (Ask(f"{ASK}"), Answer({"ask_user": "because"}, as_turn=True)),
        CLIENT,
    ),
    # Shields
    "shields that let pass": one("SAY hello", **SHIELDED),
    "shields, instructions and history": Script((Ask("SAY one"), Ask("SAY two")), SHIELDED | {"instructions": "Hm."}),
    "an input shield that lets pass": one("SAY hello", input_shields=["guard"]),
    "two shields": one("SAY hello", input_shields=["guard", "other"], output_shields=["other"]),
    "input that a shield refuses": one("SAY hello\nGUARD User UNSAFE S1", **SHIELDED),
    "output that a shield refuses": one("SAY hello\nGUARD Assistant UNSAFE S1,S9", **SHIELDED),
    "output out of tokens that a shield refuses": one("LENGTH this is cut\nGUARD Assistant UNSAFE S1", **SHIELDED),
    "a turn after refused input": Script(
        (Ask("SAY hello\nGUARD User UNSAFE S1"), Ask("SAY next")), SHIELDED, ("what was refused is not told",)
    ),
    "a turn after refused output": Script(
        (Ask("SAY hello\nGUARD Assistant UNSAFE S1"), Ask("SAY next")), SHIELDED, ("what was refused is not told",)
    ),
    "shields and a server tool": one(f"{ADD} | SAY three", "guards see what the model sees", **SHIELDED, **CALC),
    "shields and documents": Script(
        (Ask("SAY x", documents=(NOTE,)),),
        SHIELDED,
        ("input is not mutated", "guards see what the model sees"),
    ),
    "shields and a client tool": Script(
        (Ask(f"{ASK} | SAY thanks"), Answer({"ask_user": "because"})),
        SHIELDED | CLIENT,
        ("own step ids", "guards see what the model sees"),
    ),
    "a client's call that a shield refuses": one(
        f"{ASK}\nGUARD Assistant UNSAFE S1", "guards see what the model sees", **SHIELDED, **CLIENT
    ),
    "a client's response that a shield refuses": Script(
        (Ask(f"{ASK}\nGUARD Tool UNSAFE S1"), Answer({"ask_user": "because"})),
        SHIELDED | CLIENT,
        ("own step ids", "guards see what the model sees"),
    ),
    "a guard that fails": one("SAY hello\nGUARD User ERR 500 no", **SHIELDED),
    "a guard that gives no verdict": one("SAY hello\nGUARD Assistant SAY perhaps", **SHIELDED),
    # Limits
    "out of iterations": one(f"{ADD} | {ADD} | SAY x", "no open calls at the end", max_infer_iters=2, **CALC),
    "out of iterations with a client tool": one(
        f"{ASK} | SAY x", "no open calls at the end", max_infer_iters=1, **CLIENT
    ),
    "out of iterations with text": one("SAY x", max_infer_iters=1),
    "a turn after one out of iterations": Script(
        (Ask(ADD), Ask("SAY next")),
        CALC | {"max_infer_iters": 1},
        ("no open calls at the end", "open calls are closed"),
    ),
    "iterations over two legs": Script(
        (Ask(f"{ASK} | {ASK} | SAY x"), Answer({"ask_user": "one"})),
        CLIENT | {"max_infer_iters": 2},
        ("own step ids", "no open calls at the end"),
    ),
    "out of tokens": one("LENGTH this is cut"),
    # Errors
    "an error before the stream": one("ERR 429 slow down"),
    "an error in mid-stream": one("PART some words | ERR 500 sorry"),
    "a connection that breaks": one("PART some words | DROP"),
    "an error after a step": one(f"{ADD} | ERR 500 sorry", **CALC),
    "a turn after one that failed": Script((Ask("ERR 400 no"), Ask("SAY next")), {}, ("failed turns are history",)),
    "a tool that fails": one("CALL fail | SAY on", "tool trouble is a response", toolgroups=["faulty"]),
    "a tool without content": one("CALL mute | SAY on", "tool trouble is a response", toolgroups=["faulty"]),
    "a tool that is not there": one("CALL nowhere | SAY on", "tool trouble is a response", **CALC),
    "arguments that are no JSON": one("CALLBAD add {oops | SAY on", "tool trouble is a response", **CALC),
    # Ids and arguments of calls
    "an empty call id": Script(
        (Ask('CALLID \'\' ask_user {"question": "Why?"} | SAY x'), Answer({"ask_user": "because"})),
        CLIENT,
        ("call ids are unique", "own step ids"),
    ),
    "one call id for two calls": one(
        'CALLID same add {"a": 1, "b": 2} & CALLID same echo {"text": "x"} | SAY x', "call ids are unique", **CALC
    ),
    "a call without arguments": Script(
        (Ask("CALLBAD ask_user | SAY x"), Answer({"ask_user": "because"})),
        CLIENT,
        ("no arguments are {}", "own step ids"),
    ),
    # Documents
    "documents": Script((Ask("SAY x", documents=(NOTE, MORE)),), {}, ("input is not mutated",)),
    "documents and parts": Script(
        (Ask([{"type": "text", "text": "SAY x"}], documents=(NOTE,)),), {}, ("input is not mutated",)
    ),
    "documents and one part": Script(
        (Ask({"type": "text", "text": "SAY x"}, documents=(NOTE,)),), {}, ("input is not mutated",)
    ),
    "documents over two legs": Script(
        (Ask(f"{ASK} | SAY x\n", documents=(NOTE,)), Answer({"ask_user": "because"})),
        CLIENT,
        ("input is not mutated", "own step ids"),
    ),
    "a turn after one with documents": Script(
        (Ask("SAY x\n", documents=(NOTE,)), Ask("SAY y")),
        {},
        ("input is not mutated",),
    ),
    # What the model is asked
    "tool choice required": one(f"{ADD} | SAY x", tool_config={"tool_choice": "required"}, **CALC),
    "tool choice none": one("SAY x", tool_config={"tool_choice": "none"}, **CALC),
    "tool choice auto": one("SAY x", tool_choice="auto", **CALC),
    "tool choice by name": one(f"{ADD} | SAY x", tool_config={"tool_choice": "add"}, **CALC),
    "tool choice without tools": one("SAY x", tool_config={"tool_choice": "required"}),
    "a turn's own tool choice": Script(
        (Ask("SAY x", tool_config={"tool_choice": "none"}),), CALC, ("a turn's tool_config counts",)
    ),
    "sampling": one(
        "SAY x",
        sampling_params={"strategy": {"type": "top_p", "temperature": 0.7, "top_p": 0.9}, "max_tokens": 50},
    ),
    "top k": one("SAY x", sampling_params={"strategy": {"type": "top_k", "top_k": 3}}),
    "stop sequences": one("SAY x", "stop is sent", sampling_params={"stop": ["END"]}),
    "a response format": one(
        "SAY x",
        "response formats work",
        response_format={"type": "json_schema", "json_schema": schema(answer="string")},
    ),
}

r"""A scripted OpenAI-compatible model server on a real socket: the only stand-in of the project.

It does what the request tells it to do, and knows nothing of who asks. The script is the text of the *last user
message*; the commands in it stand one per line, or are separated by ` | `. Lines that are no command are ignored, so
a script can stand in prose. A command that is written wrongly is answered with status 400.

    SAY words…              streams one chunk per word, each with a space after it, and ends the message (stop)
    LENGTH words…           the same, with finish_reason length
    CHUNKS n [ms]           streams n chunks `w0 w1 …`, ms milliseconds apart (0: all at once), and ends the message
    CALL tool [{json}]      one tool call and the end of the message (tool_calls): the name in one delta, the arguments,
                            as they are written, in two; its id is call_<hex>_<index>
    CALLID id tool [{json}] the same with an id of your own; '' is an empty one
    CALLBAD tool [text]     the same with arguments that need not be JSON
    CALL … & CALL …         parallel calls in one message; the three variants can be mixed
    HISTORY                 says, in one chunk, a compact JSON list of the messages received: role, content, and
                            tool_calls and tool_call_id where there are some
    SYSTEM                  says, in one chunk, the system messages
    TOOLS                   says, in one chunk, the names of the tools offered, joined by commas
    UNICODE                 says some text outside ASCII (`UNICODE_PIECES`), raw in UTF-8, U+2028 among it
    PART words…             streams words and leaves the message open; without words, an empty first chunk
    PARTS n [ms]            CHUNKS that leaves the message open
    DELAY ms                waits before what follows
    HOLD name               waits until POST /control/release/name; a released name stays open until a reset
    HANG                    never answers further
    ERR n[/s] [message]     fails with HTTP status n (and Retry-After: s); in a stream that has begun, with
                            `data: {"error": {…}}` in it
    ERRTIMES k n [message]  is ERR n the first k times that this very script gets here, and nothing from then on
    DROP                    closes the connection, in mid-stream without the final chunk

Commands down to the first that ends a message (SAY, LENGTH, CHUNKS, CALL, HISTORY, SYSTEM, TOOLS, UNICODE) script the
first assistant message after the user's; those after it script the second, and so on: the n assistant messages that
follow the user's say how far a turn has got. `CALL add {"a":1,"b":2} | DELAY 50 | SAY three` is a turn of two steps.

Where a script ends and nothing has been said: `The tool said: <result>`, word by word, if the last message is a
tool's; else `The script is over.` A script that ends after a PART ends the message (stop). SAY and LENGTH without
words make an empty message. Text without any command is echoed: `You said: <text>`.

A question of Llama Guard's (the prompt that asks for a safety assessment) is a script too: of the lines
`GUARD <Role> command` behind its last `User: `, those are performed whose role the assessment is to be of (`User`,
`Assistant`, `Tool`); UNSAFE ends a message too, and without any ending one it says `safe`.

    UNSAFE S1,S2            says `unsafe` and, on a second line, these categories

A history with a call whose arguments are no JSON object, nor empty, is answered with status 400.

HTTP headers are sent with the first chunk, so DELAY, HOLD and HANG hold them back too, unless a PART goes before.
Requests with `stream` false get the whole message. `stream_options.include_usage` adds the usage chunk. Any model id
is accepted. POST /v1/completions takes the script as its `prompt`. Embeddings have `DIMENSIONS` dimensions; texts that
share words are near to each other; a text with the word `UNEMBEDDABLE` is refused with status 503.

Text of programs that know no scripts can be given one: after POST /control/rehearse with `{text: script}`, a last user
message that contains the text is taken for its script (the first that fits), until a reset.

Control: GET /control/requests, /control/open_streams and /control/held/{name}, POST /control/rehearse, /control/reset
and /control/release/{name}.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import math
import re
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import quote, unquote

import httptools
import uvloop

from tests.support import PATIENCE_SECONDS, ServerProcess, exit_with_parent, wait_until

DIMENSIONS = 8
UNICODE_PIECES = ("naïve ", "Ωmega ", "日本語 ", "🐫🚐 ", "👩‍👩‍👧 ", "line\u2028separator ", "e\u0301 ", "עברית ")
RECORDS_KEPT = 20_000
CHUNKS_AT_ONCE = 500
ENDS_MESSAGE = {
    "SAY",
    "LENGTH",
    "CHUNKS",
    "CALL",
    "CALLID",
    "CALLBAD",
    "HISTORY",
    "SYSTEM",
    "TOOLS",
    "UNICODE",
    "UNSAFE",
}
LEAVES_OPEN = {"PART", "PARTS", "DELAY", "HOLD", "HANG", "ERR", "ERRTIMES", "DROP"}
RECORDED_HEADERS = {"authorization", "accept", "content-type", "user-agent", "traceparent", "tracestate", "baggage"}

_COMMAND = "(?:" + "|".join(sorted(ENDS_MESSAGE | LEAVES_OPEN)) + ")(?: |$)"
_IS_COMMAND = re.compile(_COMMAND)
_NEXT_COMMAND = re.compile(rf" \| (?={_COMMAND})")
_JUDGED = re.compile(r"safety assessment for ONLY THE LAST (\w+) message")
_NEXT_CALL = re.compile(r" & (?=CALL(?:ID|BAD)? )")

encode_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# --- the script ---


@dataclass(frozen=True)
class Command:
    """One command, and its place in the script it comes from."""

    name: str
    rest: str
    key: tuple[str, int]


@dataclass(frozen=True)
class ToolCall:
    """What the model asks for; the id is None where the server makes it."""

    name: str
    arguments: str
    id: str | None = None


def parse(script: str) -> list[list[Command]]:
    """The commands of each assistant message; the last list is the rest, which ends no message."""
    messages: list[list[Command]] = [[]]
    for place, line in enumerate(_command_lines(script)):
        name, _, rest = line.partition(" ")
        messages[-1].append(Command(name, rest.strip(), (script, place)))
        if name in ENDS_MESSAGE:
            messages.append([])
    return messages


def _command_lines(script: str) -> list[str]:
    pieces = (piece.strip() for line in script.split("\n") for piece in _NEXT_COMMAND.split(line.strip()))
    return [piece for piece in pieces if _IS_COMMAND.match(piece)]


def parse_calls(command: Command) -> list[ToolCall]:
    """Every call of one line; ValueError if arguments that ought to be JSON are not."""
    return [_parse_call(text) for text in _NEXT_CALL.split(f"{command.name} {command.rest}")]


def _parse_call(text: str) -> ToolCall:
    kind, _, rest = text.strip().partition(" ")
    call_id = None
    if kind == "CALLID":
        call_id, _, rest = rest.strip().partition(" ")
        call_id = "" if call_id == "''" else call_id
    tool, _, arguments = rest.strip().partition(" ")
    if not tool:
        raise ValueError(f"{kind} needs a tool")
    arguments = arguments.strip()
    if kind != "CALLBAD":
        arguments = arguments or "{}"
        json.loads(arguments)
    return ToolCall(tool, arguments, call_id)


def text_of(message: dict[str, Any]) -> str:
    """The text of a message whose content is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def words(text: str) -> list[str]:
    """Pieces that join to the text and one space."""
    return [f"{word} " for word in text.split(" ")] if text else []


def split_conversation(messages: Sequence[dict[str, Any]]) -> tuple[str, int]:
    """The text of the last user message, and how many assistant messages follow it."""
    after = 0
    for message in reversed(messages):
        if message["role"] == "user":
            return text_of(message), after
        after += message["role"] == "assistant"
    return "", after


def guard_script(prompt: str, role: str) -> str:
    """What a guard is told, who is asked about the last message, of this role."""
    last = prompt.rpartition("User: ")[2].split("\n")
    told = [line.partition(f"GUARD {role} ")[2] for line in last if line.startswith(f"GUARD {role} ")]
    return "\n".join([*told, "SAY safe"])


def check_history(messages: Sequence[dict[str, Any]]) -> None:
    """Raises Failed where vLLM does: a call that the history tells of has arguments, and they are no JSON object."""
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        try:
            valid = isinstance(json.loads(call["function"]["arguments"] or "{}"), dict)
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            raise Failed(400, f"arguments of {call['function']['name']} are no JSON object")


# --- answers ---


class Failed(Exception):
    """The script wants this request to fail."""

    def __init__(self, status: int, message: str, retry_after: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.status}
        return encode_json({"error": error}).encode()


class Dropped(Exception):
    """The script wants the connection to be cut."""


class Answer(ABC):
    """One assistant message on its way to the client."""

    def __init__(self, connection: Connection, request: dict[str, Any], prompt_tokens: int) -> None:
        self._connection = connection
        self._id = connection.model.new_id()
        self._model = str(request.get("model", "scripted"))
        self._prompt_tokens = prompt_tokens
        self.pieces_said = 0

    @abstractmethod
    async def say(self, pieces: Sequence[str]) -> None: ...

    @abstractmethod
    async def call(self, calls: Sequence[ToolCall]) -> None: ...

    @abstractmethod
    async def finish(self, reason: str) -> None: ...

    @abstractmethod
    async def fail(self, failure: Failed) -> None: ...

    def _call_ids(self, calls: Sequence[ToolCall]) -> list[str]:
        made = (f"call_{self._id[-8:]}_{index}" for index in itertools.count())
        return [generated if call.id is None else call.id for call, generated in zip(calls, made, strict=False)]

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": int(time.time()), "model": self._model}

    def _usage(self) -> dict[str, int]:
        asked, said = self._prompt_tokens, self.pieces_said
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


class StreamedAnswer(Answer):
    """Server-sent events, each in an HTTP chunk of its own."""

    _HEAD = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )

    def __init__(self, connection: Connection, request: dict[str, Any], prompt_tokens: int) -> None:
        super().__init__(connection, request, prompt_tokens)
        self._include_usage = bool((request.get("stream_options") or {}).get("include_usage"))
        self._base = encode_json(self._envelope("chat.completion.chunk"))[:-1]
        self._before_delta = f'data: {self._base},"choices":[{{"index":0,"delta":{{'.encode()
        self._after_delta = b'},"finish_reason":null}]}\n\n'
        self._frame = len(self._before_delta) + len(self._after_delta)
        self._begun = False

    async def say(self, pieces: Sequence[str]) -> None:
        if not pieces:
            return
        self.pieces_said += len(pieces)
        await self._send_deltas([b'"content":' + encode_json(piece).encode() for piece in pieces])

    async def call(self, calls: Sequence[ToolCall]) -> None:
        self.pieces_said += len(calls)
        for index, (call, call_id) in enumerate(zip(calls, self._call_ids(calls), strict=True)):
            function = {"name": call.name, "arguments": ""}
            deltas: list[dict[str, Any]] = [{"index": index, "id": call_id, "type": "function", "function": function}]
            half = len(call.arguments) // 2
            for text in filter(None, (call.arguments[:half], call.arguments[half:])):
                deltas.append({"index": index, "function": {"arguments": text}})
            await self._send_deltas([f'"tool_calls":[{encode_json(delta)}]'.encode() for delta in deltas])

    async def finish(self, reason: str) -> None:
        events = [f'data: {self._base},"choices":[{{"index":0,"delta":{{}},"finish_reason":"{reason}"}}]}}\n\n']
        if self._include_usage:
            events.append(f'data: {self._base},"choices":[],"usage":{encode_json(self._usage())}}}\n\n')
        events.append("data: [DONE]\n\n")
        await self._send(b"".join(_http_chunk(event.encode()) for event in events) + b"0\r\n\r\n")

    async def fail(self, failure: Failed) -> None:
        if self._begun:
            await self._send(_http_chunk(b"data: " + failure.body() + b"\n\n") + b"0\r\n\r\n")
        else:
            await self._connection.refuse(failure)

    async def _send_deltas(self, deltas: list[bytes]) -> None:
        if not self._begun:
            deltas[0] = b'"role":"assistant",' + deltas[0]
        before, after, frame = self._before_delta, self._after_delta, self._frame
        chunks = [b"%x\r\n%b%b%b\r\n" % (frame + len(delta), before, delta, after) for delta in deltas]
        await self._send(b"".join(chunks))

    async def _send(self, data: bytes) -> None:
        await self._connection.send(data if self._begun else self._HEAD + data)
        self._begun = True


class StreamedText(StreamedAnswer):
    """The same as chunks of a text completion."""

    def __init__(self, connection: Connection, request: dict[str, Any], prompt_tokens: int) -> None:
        super().__init__(connection, request, prompt_tokens)
        self._base = encode_json(self._envelope("text_completion"))[:-1]

    async def say(self, pieces: Sequence[str]) -> None:
        self.pieces_said += len(pieces)
        await self._send(b"".join(map(self._chunk, pieces)))

    def _chunk(self, text: str, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return _http_chunk(f'data: {self._base},"choices":{encode_json([choice])}}}\n\n'.encode())

    async def finish(self, reason: str) -> None:
        await self._send(self._chunk("", reason) + _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class WholeAnswer(Answer):
    """One JSON body."""

    def __init__(self, connection: Connection, request: dict[str, Any], prompt_tokens: int) -> None:
        super().__init__(connection, request, prompt_tokens)
        self._text: list[str] = []
        self._calls: list[dict[str, Any]] = []

    async def say(self, pieces: Sequence[str]) -> None:
        self.pieces_said += len(pieces)
        self._text += pieces

    async def call(self, calls: Sequence[ToolCall]) -> None:
        self.pieces_said += len(calls)
        for call, call_id in zip(calls, self._call_ids(calls), strict=True):
            function = {"name": call.name, "arguments": call.arguments}
            self._calls.append({"id": call_id, "type": "function", "function": function})

    async def finish(self, reason: str) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text)}
        if self._calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = self._calls
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        body = {**self._envelope("chat.completion"), "choices": [choice], "usage": self._usage()}
        await self._connection.respond(200, encode_json(body).encode())

    async def fail(self, failure: Failed) -> None:
        await self._connection.refuse(failure)


class WholeText(WholeAnswer):
    """The same as a text completion."""

    async def finish(self, reason: str) -> None:
        choice = {"index": 0, "text": "".join(self._text), "finish_reason": reason, "logprobs": None}
        body = {**self._envelope("text_completion"), "choices": [choice], "usage": self._usage()}
        await self._connection.respond(200, encode_json(body).encode())


# --- performing a script ---


class Performance:
    """Carries out the commands that stand for one assistant message. Each of its commands is a method of its name."""

    def __init__(self, model: Model, request: dict[str, Any], answer: Answer) -> None:
        self._model = model
        self._request = request
        self._messages: list[dict[str, Any]] = request["messages"]
        self._answer = answer

    async def run(self) -> None:
        check_history(self._messages)
        text, step = split_conversation(self._messages)
        script = self._model.script_of(text)
        if judged := _JUDGED.search(script):
            script = guard_script(script, judged[1])
        messages = parse(script)
        commands = messages[step] if step < len(messages) else []
        for command in commands:
            await self._perform(command)
            if command.name in ENDS_MESSAGE:
                return
        if not self._answer.pieces_said:
            await self._answer.say(words(self._default(script, is_script=messages != [[]])))
        await self._answer.finish("stop")

    def _default(self, script: str, is_script: bool) -> str:
        if self._messages and self._messages[-1]["role"] == "tool":
            return f"The tool said: {text_of(self._messages[-1])}".strip()
        return "The script is over." if is_script else f"You said: {script}".strip()

    async def _perform(self, command: Command) -> None:
        try:
            await _METHODS[command.name](self, command)
        except (ValueError, IndexError) as error:
            raise Failed(400, f"bad script: {command.name} {command.rest}: {error}") from error

    async def _say(self, command: Command) -> None:
        await self._answer.say(words(command.rest))
        await self._answer.finish("stop")

    async def _length(self, command: Command) -> None:
        await self._answer.say(words(command.rest))
        await self._answer.finish("length")

    async def _part(self, command: Command) -> None:
        await self._answer.say(words(command.rest) or [""])

    async def _chunks(self, command: Command) -> None:
        await self._parts(command)
        await self._answer.finish("stop")

    async def _parts(self, command: Command) -> None:
        count, milliseconds = [*map(float, command.rest.split()), 0.0][:2]
        if milliseconds:
            await self._say_slowly(int(count), milliseconds / 1000)
            return
        for first in range(0, int(count), CHUNKS_AT_ONCE):
            await self._answer.say([f"w{n} " for n in range(first, min(first + CHUNKS_AT_ONCE, int(count)))])
            await asyncio.sleep(0)

    async def _say_slowly(self, count: int, seconds: float) -> None:
        """Keeps to the clock, so that late wake-ups do not add up."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        for n in range(count):
            await self._answer.say([f"w{n} "])
            await asyncio.sleep(begin + (n + 1) * seconds - loop.time())

    async def _call(self, command: Command) -> None:
        await self._answer.call(parse_calls(command))
        await self._answer.finish("tool_calls")

    async def _history(self, _: Command) -> None:
        kept = ("role", "content", "tool_calls", "tool_call_id")
        shown = [{"content": None} | {key: one[key] for key in kept if key in one} for one in self._messages]
        await self._say_whole(encode_json(shown))

    async def _system(self, _: Command) -> None:
        roles = {"system", "developer"}
        await self._say_whole("\n".join(text_of(message) for message in self._messages if message["role"] in roles))

    async def _tools(self, _: Command) -> None:
        await self._say_whole(",".join(tool["function"]["name"] for tool in self._request.get("tools") or ()))

    async def _unsafe(self, command: Command) -> None:
        await self._say_whole(f"unsafe\n{command.rest}")

    async def _say_whole(self, text: str) -> None:
        await self._answer.say([text])
        await self._answer.finish("stop")

    async def _unicode(self, _: Command) -> None:
        await self._answer.say(UNICODE_PIECES)
        await self._answer.finish("stop")

    async def _delay(self, command: Command) -> None:
        await asyncio.sleep(float(command.rest) / 1000)

    async def _hold(self, command: Command) -> None:
        if not command.rest:
            raise ValueError("HOLD needs a name")
        await self._model.hold(command.rest)

    async def _hang(self, _: Command) -> None:
        await asyncio.get_running_loop().create_future()

    async def _err(self, command: Command) -> None:
        failure, _, message = command.rest.partition(" ")
        status, _, retry_after = failure.partition("/")
        raise Failed(int(status), message.strip() or f"scripted {status}", retry_after)

    async def _errtimes(self, command: Command) -> None:
        times, _, failure = command.rest.partition(" ")
        self._model.seen[command.key] += 1
        if self._model.seen[command.key] <= int(times):
            await self._err(Command("ERR", failure.strip(), command.key))

    async def _drop(self, _: Command) -> None:
        raise Dropped


_METHODS: dict[str, Callable[[Performance, Command], Awaitable[None]]] = {
    name: getattr(Performance, "_call" if name.startswith("CALL") else f"_{name.lower()}")
    for name in ENDS_MESSAGE | LEAVES_OPEN
}


# --- the model: what lasts longer than a request ---


@dataclass
class Record:
    """One chat completion request. `ended` is None while it is answered, then finished, failed, dropped (by the
    script) or client_closed."""

    headers: dict[str, str]
    raw_body: bytes
    at: float = field(default_factory=time.time)
    ended_at: float | None = None
    ended: str | None = None
    status: int | None = None

    def end(self, how: str, status: int | None) -> None:
        self.ended, self.status, self.ended_at = how, status, time.time()

    def shown(self) -> dict[str, Any]:
        timing = {"at": self.at, "ended_at": self.ended_at, "ended": self.ended, "status": self.status}
        return {"headers": self.headers, "body": json.loads(self.raw_body), **timing}


class Hold:
    """A name that streams wait for."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.waiting = 0


class Model:
    """What the server remembers: requests, holds, and how often a script was seen."""

    def __init__(self, model_ids: Sequence[str]) -> None:
        self.model_ids = tuple(model_ids)
        self.open_streams = 0
        self._ids = itertools.count(int(time.time() * 1000) % 0xFFFF << 16)
        self.reset()

    def reset(self) -> None:
        """Lets go of what is held, and forgets everything."""
        for hold in getattr(self, "_holds", {}).values():
            hold.released.set()
        self._holds: defaultdict[str, Hold] = defaultdict(Hold)
        self.records: deque[Record] = deque(maxlen=RECORDS_KEPT)
        self.seen: Counter[tuple[str, int]] = Counter()
        self._rehearsed: dict[str, str] = {}

    def rehearse(self, scripts: dict[str, str]) -> None:
        self._rehearsed |= scripts

    def script_of(self, text: str) -> str:
        """What was rehearsed for a text, or itself."""
        return next((script for part, script in self._rehearsed.items() if part in text), text)

    def new_id(self) -> str:
        """Its last eight characters are unique for a long time, across restarts too."""
        return f"chatcmpl-{next(self._ids) & 0xFFFFFFFF:08x}"

    async def hold(self, name: str) -> None:
        hold = self._holds[name]
        hold.waiting += 1
        try:
            await hold.released.wait()
        finally:
            hold.waiting -= 1

    def release(self, name: str) -> int:
        """How many streams were waiting."""
        self._holds[name].released.set()
        return self._holds[name].waiting

    def held(self, name: str) -> int:
        return self._holds[name].waiting if name in self._holds else 0


def embedding(text: str) -> list[float]:
    """The normalized sum of one vector per word, each made from the word's hash."""
    total = [0.0] * DIMENSIONS
    for word in text.lower().split() or [text]:
        numbers = struct.unpack(f">{DIMENSIONS}i", hashlib.sha256(word.encode()).digest())
        total = [one + number / 2**31 for one, number in zip(total, numbers, strict=True)]
    length = math.hypot(*total) or 1.0
    return [one / length for one in total]


def _embeddings_body(request: dict[str, Any]) -> dict[str, Any]:
    given = request["input"]
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    texts = [text if isinstance(text, str) else " ".join(map(str, text)) for text in ([given] if one else given)]
    if any("UNEMBEDDABLE" in text for text in texts):
        raise Failed(503, "scripted 503")
    vectors: Iterable[list[float] | str] = map(embedding, texts)
    if request.get("encoding_format") == "base64":
        vectors = (base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *embedding(text))).decode() for text in texts)
    tokens = sum(len(text.split()) for text in texts)
    return {
        "object": "list",
        "model": request.get("model", "scripted"),
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


# --- HTTP ---


@dataclass
class Request:
    """A request as the parser fills it."""

    target: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    method: str = ""
    keep_alive: bool = True


class Connection(asyncio.Protocol):
    """One client's connection: requests are answered one after the other; when the client goes, so does the answer."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._parser = httptools.HttpRequestParser(self)
        self._requests: asyncio.Queue[Request] = asyncio.Queue()
        self._request = Request()
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def connection_lost(self, _: Exception | None) -> None:
        self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._request = Request()

    def on_url(self, url: bytes) -> None:
        self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._request.body += body

    def on_message_complete(self) -> None:
        self._request.method = self._parser.get_method().decode()
        self._request.keep_alive = self._parser.should_keep_alive()
        self._requests.put_nowait(self._request)

    async def send(self, data: bytes) -> None:
        self._transport.write(data)
        if not self._writable.is_set():
            await self._writable.wait()

    async def respond(self, status: int, body: bytes, more: str = "") -> None:
        head = f"HTTP/1.1 {status} Scripted\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        await self.send(f"{head}{more}\r\n".encode() + body)

    async def refuse(self, failure: Failed) -> None:
        more = f"retry-after: {failure.retry_after}\r\n" if failure.retry_after else ""
        await self.respond(failure.status, failure.body(), more)

    async def _serve(self) -> None:
        try:
            while not self._transport.is_closing():
                request = await self._requests.get()
                await self._answer(request)
                if not request.keep_alive:
                    self._transport.close()
        except Dropped:
            self._transport.close()
        except BaseException:
            self._transport.abort()
            raise

    async def _answer(self, request: Request) -> None:
        path = httptools.parse_url(request.target).path.decode()
        try:
            if path.endswith("/completions"):
                await self._complete(request)
            else:
                await self.respond(200, encode_json(self._route(request, path)).encode())
        except Failed as failure:
            await self.refuse(failure)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            await self.respond(400, Failed(400, f"not understood: {error!r}").body())

    def _route(self, request: Request, path: str) -> Any:
        match (request.method, *map(unquote, path.strip("/").split("/"))):
            case "GET", "v1", "models":
                return {"object": "list", "data": [_model_body(model_id) for model_id in self.model.model_ids]}
            case "GET", "v1", "models", *model_id:
                return _model_body("/".join(model_id))
            case "POST", "v1", "embeddings":
                return _embeddings_body(_json_body(request))
            case "GET", "control", "requests":
                return [record.shown() for record in self.model.records]
            case "GET", "control", "open_streams":
                return self.model.open_streams
            case "GET", "control", "held", name:
                return self.model.held(name)
            case "POST", "control", "release", name:
                return self.model.release(name)
            case "POST", "control", "rehearse":
                return self.model.rehearse(_json_body(request))
            case "POST", "control", "reset":
                return self.model.reset()
        raise Failed(404, f"no route {request.method} {path}")

    async def _complete(self, request: Request) -> None:
        body = _json_body(request)
        if "prompt" in body:
            body["messages"] = [{"role": "user", "content": body["prompt"]}]
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise Failed(400, "messages must be a list of objects with a role")
        record = Record(_recorded(request.headers), request.body)
        self.model.records.append(record)
        self.model.open_streams += 1
        try:
            await self._perform(body, record)
        except Dropped:
            record.end("dropped", None)
            raise
        except asyncio.CancelledError:
            record.end("client_closed", None)
            raise
        finally:
            self.model.open_streams -= 1

    async def _perform(self, body: dict[str, Any], record: Record) -> None:
        kinds = (WholeText, StreamedText) if "prompt" in body else (WholeAnswer, StreamedAnswer)
        kind = kinds[bool(body.get("stream"))]
        answer = kind(self, body, prompt_tokens=len(record.raw_body) // 4)
        try:
            await Performance(self.model, body, answer).run()
            record.end("finished", 200)
        except Failed as failure:
            await answer.fail(failure)
            record.end("failed", failure.status)


def _json_body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(request.body)
    except ValueError as error:
        raise Failed(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Failed(400, "the body is not a JSON object")
    return body


def _model_body(model_id: str) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": 0, "owned_by": "tests"}


def _recorded(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name in RECORDED_HEADERS or name.startswith("x-")}


# --- the process ---


class ScriptedModel(ServerProcess):
    """Runs the model server in a subprocess: `with ScriptedModel() as model: … model.url` (it ends in /v1)."""

    module = "tests.support.scripted_model"

    def __init__(self, port: int = 0, host: str = "127.0.0.1", models: Sequence[str] = ("scripted",)) -> None:
        """`models` is what GET /v1/models lists; any model is answered."""
        super().__init__(port, host, [option for model in models for option in ("--model", model)])
        self._before_kill: list[dict[str, Any]] = []

    def requests(self) -> list[dict[str, Any]]:
        """Each chat completion request, in order, those before a kill too: `body`, `headers` (some, in lower case),
        `at` and `ended_at` (seconds since the epoch), `status`, and `ended`: None (still answered), finished, failed,
        dropped, client_closed, or killed."""
        return self._before_kill + (self.control("GET", "requests") if self.pid else [])

    def reset(self) -> None:
        """Forgets requests, released names, what was rehearsed and the counts of ERRTIMES; lets go of what is held."""
        self._before_kill = []
        if self.pid:
            self.control("POST", "reset")

    def rehearse(self, scripts: Mapping[str, str]) -> None:
        """Scripts for what programs say that know none: where a last user message contains the key."""
        self.control("POST", "rehearse", scripts)

    def release(self, name: str) -> int:
        """Lets every HOLD of this name go on, now and until a reset; how many were waiting."""
        return int(self.control("POST", f"release/{quote(name, safe='')}"))

    def held(self, name: str) -> int:
        """How many streams wait at HOLD name."""
        return int(self.control("GET", f"held/{quote(name, safe='')}"))

    def wait_held(self, name: str, count: int = 1, timeout: float = PATIENCE_SECONDS) -> None:
        """Waits, blocking, until so many streams wait at HOLD name (seconds)."""
        wait_until(lambda: self.held(name) >= count, timeout)

    def open_streams(self) -> int:
        """How many chat completions are being answered, those not begun and not streamed included."""
        return int(self.control("GET", "open_streams"))

    def kill(self) -> None:
        """An outage; the requests so far are kept, the counts of ERRTIMES and the released names are not."""
        with contextlib.suppress(OSError):  # it may have died by itself
            self._before_kill = [{**record, "ended": record["ended"] or "killed"} for record in self.requests()]
        super().kill()


async def serve(host: str, port: int, model_ids: Sequence[str]) -> None:
    """Listens for ever."""
    model = Model(model_ids)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(model), host, port, family=socket.AF_INET, backlog=4096)
    async with server:
        bound = server.sockets[0].getsockname()[1]
        print(f"ready http://{host}:{bound}/v1", flush=True)
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted OpenAI-compatible model server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--model", action="append", help="an id to list under /v1/models; may be repeated")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input ends")
    arguments = parser.parse_args()
    if arguments.exit_with_parent:
        exit_with_parent()
    uvloop.run(serve(arguments.host, arguments.port, arguments.model or ["scripted"]))


if __name__ == "__main__":
    main()

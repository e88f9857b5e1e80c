"""An attempt at a response: decide, do, record.

On our engine and not on llama_stack's Responses, whose loop cannot go on from the middle
(`docs/decisions/0014-responses-on-our-engine.md`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from llama_stack.apis.inference import OpenAIChatCompletionRequestWithExtraBody
from pydantic import ValidationError

from app.domain.errors import TurnFailure
from app.domain.events import EventKind
from app.domain.responses import context, shape, steps
from app.domain.responses.context import Entry, Past
from app.domain.responses.decide import Approve, Finish, Infer, ListTools, RunCalls, decide
from app.domain.responses.events import Begun, event, item_event
from app.domain.responses.steps import ApprovedStep, Call, IndexedItem, InferenceStep, Item, ListStep, Step, ToolStep
from app.domain.turns import TurnStatus
from app.store import responses
from app.store.claims import Claim, LegEnd, StoredItem
from tasks.engine.attempt import Attempt, Outcome, Tools
from tasks.engine.ledger import Made, ServerCall
from tasks.engine.responding import Answer, CallItem, new_id
from tasks.engine.response_tools import ResponseTools


class Response(Attempt):
    """Raises what pydantic raises: the response cannot be read."""

    def __init__(self, given: Tools, claim: Claim) -> None:
        super().__init__(given, claim)
        self._id = shape.response_id(claim.turn_id)
        self._request = claim.request
        self._journal: list[Step] = steps.read(claim.steps)
        chain = [Past(context.entries(turn.messages), steps.read(turn.steps)) for turn in claim.past]
        conversation = [Entry(item, result) for item, result in claim.items]
        self._past = [*chain, Past(conversation)] if conversation else chain
        self._begun = Begun()
        self._next_index = 0
        self._approved: list[Item] = []

    async def _leg(self) -> Outcome:
        self._tools = ResponseTools(self._given, self._claim, self._journal, self._secrets, self._mcp)
        came_before = [item for past in self._past for item in _items(past)]
        self._approved = context.approved_calls(self._request["input"], came_before)
        if self._claim.fence > 1:
            await self._take_up()
        if not self._begun.in_progress:
            self._say("in_progress", response=self._snapshot("in_progress"))
        while True:
            if handed := await self._between_steps():
                return handed
            match decide(self._request, self._journal, approves=bool(self._approved)):
                case ListTools(tool_index):
                    await self._list_tools(tool_index)
                case Approve():
                    await self._approve()
                case Infer():
                    if ended := await self._infer():
                        return ended
                case RunCalls(ordinal, calls):
                    await self._run_calls(ordinal, calls)
                case Finish() as finish:
                    return await self._end(finish)

    async def _take_up(self) -> None:
        """Goes on behind an earlier attempt: items that it began and that are in no recorded step end as unfinished.

        OpenAI's SDK refuses a response that completes with an item that is not done. Its SDK for Node.js takes the
        output of `response.in_progress` for its own, and Llama Stack's `Agent` forgets a call of a function by it.
        """
        self._begun = await self._persistently(responses.items_begun, self._claim.turn_id)
        begun, kept = self._begun, steps.kept(self._journal)
        self._next_index = begun.next_index
        lost = {index: steps.unfinished(item) for index, item in begun.items.items() if index not in kept}
        if not lost.keys() - begun.done:
            return
        recorded = {each.output_index: each.item for step in self._journal for each in step.items}
        output = [recorded.get(index) or lost.get(index) or item for index, item in sorted(begun.items.items())]
        self._say("in_progress", response={**self._snapshot("in_progress"), "output": output})
        for index in sorted(lost.keys() - begun.done):
            self._progress(item_event("done", self._id, index, lost[index]), EventKind.RESPONSE)

    def _say(self, type_: str, **fields: Any) -> None:
        self._progress(event(type_, **fields), EventKind.RESPONSE)

    def _begin(self, item: Item | None, output_index: int) -> None:
        self._progress(item_event("added", self._id, output_index, item), EventKind.ITEM_ADDED)

    async def _list_tools(self, tool_index: int) -> None:
        """Raises TurnFailure: the MCP server cannot be used."""
        item_id, output_index = f"mcpl_{uuid.uuid4().hex}", self._take_index()
        where: dict[str, Any] = {"item_id": item_id, "output_index": output_index}
        label = self._request["tools"][tool_index]["server_label"]
        item: Item = {"type": "mcp_list_tools", "id": item_id, "server_label": label, "error": None, "tools": []}
        self._begin(item, output_index)
        self._say("mcp_list_tools.in_progress", **where)
        try:
            listed = await self._tools.list_tools(tool_index)
        except TurnFailure:
            self._say("mcp_list_tools.failed", **where)
            raise
        self._say("mcp_list_tools.completed", **where)
        done = IndexedItem(output_index=output_index, item=item | {"tools": listed.tools})
        await self._record_step(
            ListStep(step_id=_step_id(), items=[done], tool_index=tool_index, annotations=listed.annotations)
        )

    async def _approve(self) -> None:
        calls = []
        for request in self._approved:
            self._tools.check_approved(request)
            call = CallItem(
                call_id=f"call_{uuid.uuid4().hex}",
                name=request["name"],
                arguments=request["arguments"],
                kind="mcp",
                item_id=new_id("mcp"),
                output_index=self._take_index(),
            )
            self._begin(self._tools.begun(call), call.output_index)
            calls.append(call.whole())
        await self._record_step(ApprovedStep(step_id=_step_id(), calls=calls))

    async def _infer(self) -> Outcome | None:
        """One inference step. If the response ends with it, both are recorded at once."""
        answer = Answer(
            self._id, self._progress, self._tools.kind_of, self._tools.begun, self._call_ids(), self._next_index
        )
        try:
            await self._ask(self._chat_request(), answer.take)
        finally:
            self._next_index = answer.next_index
        step = InferenceStep(
            step_id=_step_id(),
            items=[self._tools.cited(item) for item in answer.items],
            text=answer.text,
            calls=answer.calls,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
        )
        step.items = sorted([*step.items, *self._asked(step)], key=lambda indexed: indexed.output_index)
        following = decide(self._request, [*self._journal, step], approves=bool(self._approved))
        if isinstance(following, Finish):
            return await self._end(following, step)
        calls = following.calls if isinstance(following, RunCalls) else ()
        started = [(len(self._journal), index) for index, _ in calls]
        await self._record_step(step, started_calls=started)
        self._ledger.started(started)
        return None

    def _asked(self, step: InferenceStep) -> list[IndexedItem]:
        """The items of the calls that no worker makes.

        An approval is asked for with the whole call, so its item is begun here, when the arguments are there.
        """
        if step.is_cut:
            return [self._tools.cut(call) for call in step.calls if call.kind != "approval"]
        for call in step.calls:
            if call.kind == "approval":
                call.output_index = self._take_index()
                self._begin(self._tools.asked(call), call.output_index)
        theirs = [call for call in step.calls if not call.is_ours]
        return [IndexedItem(output_index=call.output_index, item=self._tools.asked(call)) for call in theirs]

    def _chat_request(self) -> OpenAIChatCompletionRequestWithExtraBody:
        request, offered = self._request, self._tools.offered()
        told = context.messages(request.get("instructions"), self._past, request["input"], self._journal)
        fields = {
            "tools": offered or None,
            "tool_choice": self._tools.choice() if offered else None,
            "response_format": _response_format(request.get("text")),
            "temperature": request.get("temperature"),
            "top_p": request.get("top_p"),
            "max_tokens": request.get("max_output_tokens"),
            "frequency_penalty": request.get("frequency_penalty"),
            "presence_penalty": request.get("presence_penalty"),
            "parallel_tool_calls": request.get("parallel_tool_calls") if offered else None,
            "user": request.get("user"),
            "reasoning_effort": (request.get("reasoning") or {}).get("effort"),
            "verbosity": (request.get("text") or {}).get("verbosity"),
            "safety_identifier": request.get("safety_identifier"),
            "prompt_cache_key": request.get("prompt_cache_key"),
        }
        try:
            return OpenAIChatCompletionRequestWithExtraBody(
                model=request["model"],
                messages=told,
                stream=True,
                stream_options={"include_usage": True},
                **{name: value for name, value in fields.items() if value is not None},
            )
        except ValidationError as error:
            message = f"input: this cannot be told to a model: {error.errors(include_url=False)[0]['msg']}"
            raise TurnFailure("invalid_request", message) from error

    async def _run_calls(self, ordinal: int, calls: Sequence[tuple[int, Call]]) -> None:
        made_before = sum(isinstance(step, ToolStep) for step in self._journal)
        limit = self._request.get("max_tool_calls")
        to_make = [
            ServerCall(
                index,
                repeatable=self._tools.repeatable(call),
                make=partial(self._tools.make, call, ignored=limit is not None and made_before + place >= limit),
                unknown=self._tools.unknown(),
            )
            for place, (index, call) in enumerate(calls)
        ]
        asked = dict(calls)

        async def record(index: int, running: asyncio.Task[Made]) -> None:
            await self._tool_step(ordinal, index, asked[index], running)

        await self._ledger.run(ordinal, to_make, record)

    async def _tool_step(self, ordinal: int, index: int, call: Call, running: asyncio.Task[Made]) -> None:
        where: dict[str, Any] = {"item_id": call.item_id, "output_index": call.output_index}
        for progress in self._tools.progress(call):
            self._say(progress, **where)
        made = await running
        self._say(self._tools.outcome(call, made.result), **where)
        step = ToolStep(
            step_id=_step_id(),
            items=[IndexedItem(output_index=call.output_index, item=self._tools.done(call, made.result))],
            call_id=call.call_id,
            content=made.result["content"],
            files=made.result.get("files") or {},
        )
        await self._record_step(step, result=(ordinal, index, made.result))

    async def _record_step(self, step: Step, **more: Any) -> None:
        self._stage_items(step)
        await self._record(step=step.model_dump(mode="json"), **more)
        self._journal.append(step)

    def _stage_items(self, step: Step) -> None:
        for done in step.items:
            data = item_event("done", self._id, done.output_index, done.item)
            self._writer.stage(EventKind.RESPONSE, data)

    async def _end(self, finish: Finish, step: InferenceStep | None = None) -> Outcome:
        completed_at = datetime.now(UTC)
        journal = self._claim.steps
        if step is not None:
            self._stage_items(step)
            journal = [*journal, step.model_dump(mode="json")]
        response = self._snapshot(finish.status, journal=journal, reason=finish.reason, completed_at=completed_at)
        self._writer.stage(EventKind.TURN_COMPLETE, event(finish.status, response=response))
        end = LegEnd(
            TurnStatus.COMPLETED,
            {"status": finish.status, "reason": finish.reason},
            completed_at=completed_at,
            items=self._for_conversation([*self._journal, *([step] if step else [])]),
        )
        await self._record(step=journal[-1] if step is not None else None, end=end)
        return "completed"

    def _for_conversation(self, journal: Sequence[Step]) -> list[StoredItem]:
        """The input, and the output with what the model was told of each call."""
        if not self._request.get("conversation"):
            return []
        told = [(each, step.content if isinstance(step, ToolStep) else None) for step in journal for each in step.items]
        told.sort(key=lambda pair: pair[0].output_index)
        return [(item, None) for item in self._request["input"]] + [(each.item, content) for each, content in told]

    def _snapshot(self, status: str, **more: Any) -> dict[str, Any]:
        assert self._claim.created_at is not None
        return shape.response(
            turn_id=self._claim.turn_id,
            request=self._request,
            status=status,
            created_at=self._claim.created_at,
            **more,
        )

    def _take_index(self) -> int:
        self._next_index += 1
        return self._next_index - 1

    def _call_ids(self) -> set[str]:
        """All that this response and what came before it used."""
        journals = [*(past.steps for past in self._past), self._journal]
        in_steps = {
            call.call_id
            for journal in journals
            for step in journal
            if isinstance(step, InferenceStep | ApprovedStep)
            for call in step.calls
        }
        items = [entry.item for past in self._past for entry in past.entries] + self._request["input"]
        items += self._begun.items.values()
        return in_steps | {item["call_id"] for item in items if item.get("call_id")} | {item["id"] for item in items}


def _items(past: Past) -> list[Item]:
    """Input and output of what came before."""
    return [entry.item for entry in past.entries] + [each.item for step in past.steps for each in step.items]


def _step_id() -> str:
    return str(uuid.uuid4())


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    """`text.format` in the chat completions' spelling."""
    wanted = (text or {}).get("format") or {"type": "text"}
    if wanted["type"] == "json_schema":
        schema = {
            name: wanted[name] for name in ("name", "schema", "description", "strict") if wanted.get(name) is not None
        }
        return {"type": "json_schema", "json_schema": schema}
    return None if wanted["type"] == "text" else {"type": wanted["type"]}

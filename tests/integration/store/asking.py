"""Responses to test with, asked for as the API asks."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from app.domain import events
from app.domain.events import START, Event, EventKind
from app.domain.items import checked, conversation_id, with_ids
from app.domain.responses.events import event
from app.domain.turns import TurnStatus
from app.store import admission, conversations, responses
from app.store.admission import Accepted, ResponseSubmission
from app.store.claims import Claim, LegEnd, StoredItem
from app.store.responses import ResponseRow
from tests.integration.store.seeds import NO_CAPS, OWNER, Json, Seeds, next_event


def opening() -> list[Event]:
    return events.number(START, 0, [(EventKind.RESPONSE, event("created", response={}))], 1)


class Asking:
    """Makes responses, in a conversation if `talk` is its session."""

    def __init__(self, seeds: Seeds) -> None:
        self.seeds = seeds
        self.store = seeds.store

    def conversation(self) -> str:
        session_id = str(uuid.uuid4())
        self.store.transact(conversations.create, OWNER, session_id, {}, [])
        return session_id

    def submission(
        self, text: str = "hello", talk: str | None = None, previous: str | None = None, **changes: Any
    ) -> ResponseSubmission:
        request: Json = {"model": "m", "input": with_ids(checked([{"role": "user", "content": text}]))}
        request |= {"conversation": conversation_id(talk)} if talk else {}
        submission = ResponseSubmission(
            owner=OWNER,
            turn_id=str(uuid.uuid4()),
            session_id=talk or str(uuid.uuid4()),
            in_conversation=talk is not None,
            request=request,
            request_hash=hashlib.sha256(json.dumps([text, talk, previous]).encode()).digest(),
            caps=NO_CAPS,
            opening=opening(),
            previous_turn_id=previous,
        )
        return replace(submission, **changes)

    def submit(self, submission: ResponseSubmission) -> Accepted:
        return self.store.transact(admission.accept_response, submission)

    def ask(self, text: str = "hello", talk: str | None = None, previous: str | None = None, **changes: Any) -> str:
        return self.submit(self.submission(text, talk, previous, **changes)).turn_id

    def claimed(self, *asked: Any, **more: Any) -> Claim:
        return self.seeds.claimed(self.ask(*asked, **more))

    def end(self, claim: Claim, *items: StoredItem, output: Sequence[Json] = ()) -> Claim:
        """Completes it with one step of these output items."""
        indexed = [{"output_index": index, "item": item} for index, item in enumerate(output)]
        step = {"step_type": "inference", "step_id": str(uuid.uuid4()), "items": indexed}
        end = LegEnd(
            TurnStatus.COMPLETED, {"status": "completed", "reason": None}, completed_at=datetime.now(UTC), items=items
        )
        return self.seeds.record(claim, [next_event(claim, EventKind.TURN_COMPLETE)], step=step, end=end)

    def ended(self, *asked: Any, **more: Any) -> str:
        return self.end(self.claimed(*asked, **more)).turn_id

    def get(self, turn_id: str) -> ResponseRow:
        return self.store.transact(responses.get_response, OWNER, turn_id)

    def delete(self, turn_id: str) -> list[str]:
        return self.store.transact(responses.mark_response_deleted, OWNER, turn_id)

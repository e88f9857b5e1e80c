"""Files that the code of a turn made."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from app.api.documentation import header_docs
from app.api.identifiers import AgentId, SessionId, TurnId
from app.api.service import CurrentService, Owner
from app.api.turns import TURN_PATH
from app.domain.attachments import OTHER_TYPE, SAFE_TYPES, media_type
from app.domain.errors import NotFound
from app.store import agents, session_files

router = APIRouter(tags=["Agents"])

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Disposition": "attachment",
    "Content-Security-Policy": "default-src 'none'; sandbox",
}
"""Whatever code wrote into the file, a browser that opens it here runs none of it."""

_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file",
        "content": {kind: {} for kind in sorted({*SAFE_TYPES.values(), OTHER_TYPE})},
        "headers": header_docs({name: f"`{value}`" for name, value in HEADERS.items()}),
    }
}


@router.get(TURN_PATH + "/{turn_id}/attachments/{attachment_name:path}", responses=_FILE, response_class=Response)
async def get_attachment(
    agent_id: AgentId,
    session_id: SessionId,
    turn_id: TurnId,
    attachment_name: Annotated[str, Path(description="As in the turn's `output_attachments`")],
    service: CurrentService,
    owner: Owner,
) -> Response:
    """Fetch a file that the turn's code made, as the turn left it."""
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    if not attachment_name.isprintable():
        raise NotFound("Attachment", attachment_name)
    content = await service.store.run(session_files.left_by_turn, session_id, turn_id, attachment_name)
    return Response(content, media_type=media_type(attachment_name), headers=HEADERS)

"""`caravan turns`: turns as Postgres has them, one turn's events as they come, and its end."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.chat import URL, KeyOption, UrlOption
from app.cli.errors import CommandError, refused
from app.domain.responses.shape import PREFIX, response_id
from app.domain.turns import ENDED, TurnKind, TurnStatus

if TYPE_CHECKING:
    from app.store.turns import TurnRow

READ_TIMEOUT_SECONDS = 60.0
REJOIN_SECONDS = 60.0
"""How long a stream that was cut may be without a server to join again: a restart, or a deployment."""

application = typer.Typer(help="List turns, show one, follow one, or cancel one.", no_args_is_help=True)

TurnId = Annotated[str, typer.Argument(help="Id of the turn, or of the response (resp_…) that it is.", metavar="ID")]


@application.command("list")
def list_turns(
    status: Annotated[TurnStatus | None, typer.Option(help="Only turns of this status.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=10_000)] = 20,
) -> None:
    """List the newest turns of the database at DATABASE_URL."""
    from app.store.turns import recent_turns

    found = _ask(recent_turns, status, limit)
    print(f"{'TURN':<36}  {'STATUS':<14}  {'CREATED':<19}  {'WORKER':<24}  AGENT")
    for turn, agent_id in found:
        created = turn.created_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        whose = agent_id or "a response"
        print(f"{turn.turn_id:<36}  {turn.status.value:<14}  {created}  {turn.worker or '-':<24}  {whose}")


@application.command()
def show(turn_id: TurnId) -> None:
    """Show one turn of the database at DATABASE_URL, with its steps, as JSON."""
    turn, agent_id = _find(turn_id)
    print(json.dumps(_shape(turn, agent_id), indent=2, ensure_ascii=False))


@application.command()
def follow(turn_id: TurnId, url: UrlOption = URL, api_key: KeyOption = None) -> None:
    """Print a turn's text from its start, and then as it comes, until its end. Needs the key of the turn's owner."""
    from app.cli.transcript import Transcript

    turn, agent_id = _find(turn_id)
    transcript = Transcript()
    path = f"/agents/{agent_id}/session/{turn.session_id}/turn/{turn.turn_id}/events"
    if turn.kind == TurnKind.RESPONSE:
        path = f"/responses/{response_id(turn.turn_id)}"
    try:
        for event in _events(f"{url.rstrip('/')}/v1{path}", api_key):
            transcript.show(event)
    finally:
        transcript.end_line()


@application.command()
def cancel(turn_id: TurnId) -> None:
    """Cancel a turn of the database at DATABASE_URL, whoever it belongs to."""
    turn, _ = _find(turn_id)
    from app.endings import open_endings
    from app.settings import get_settings

    with open_endings(get_settings(), "cli") as endings:
        status = endings.cancel(turn.turn_id)
    if status == TurnStatus.RUNNING:
        print(f"turn {turn.turn_id} runs: its worker is asked to cancel it")
    elif turn.status in ENDED:
        print(f"turn {turn.turn_id} had ended before: it is {turn.status.value}")
    else:
        print(f"turn {turn.turn_id} is {status.value if status else 'gone'}")


def _events(url: str, api_key: str | None) -> Iterator[dict[str, Any]]:
    """All of a turn's events. A stream that is cut is joined again behind the last one, for REJOIN_SECONDS."""
    import httpx

    last_id, give_up_at = "", 0.0
    while True:
        try:
            for event_id, event in _joined(url, api_key, last_id):
                last_id, give_up_at = event_id, time.monotonic() + REJOIN_SECONDS
                yield event
            return
        except httpx.HTTPError as error:
            if time.monotonic() > give_up_at:
                raise CommandError(f"no answer from {url}: {error}") from None
        time.sleep(1)


def _joined(url: str, api_key: str | None, last_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, event) of one connection. Raises httpx.HTTPError: it was cut, or the server is not there for the moment."""
    import httpx

    headers = {"Last-Event-ID": last_id, **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    # A response's stream; of a turn's events, these say nothing.
    place = {"stream": "true", **({"starting_after": last_id} if last_id.isdigit() else {})}
    with httpx.stream("GET", url, params=place, headers=headers, timeout=READ_TIMEOUT_SECONDS) as response:
        if response.status_code == httpx.codes.UNAUTHORIZED:
            response.read()
            raise CommandError(refused(url, response.json()["detail"]))
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise httpx.TransportError(f"{response.status_code}: {response.read().decode(errors='replace')}")
        if response.status_code != httpx.codes.OK:
            raise CommandError(f"{url} answered {response.status_code}: {response.read().decode(errors='replace')}")
        event_id = ""
        for line in response.iter_lines():
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                yield str(event.get("sequence_number", event_id)), event


def _find(turn_id: str) -> tuple[TurnRow, str | None]:
    from app.store.turns import find_turn

    try:
        identifier = str(uuid.UUID(turn_id.removeprefix(PREFIX)))
    except ValueError:
        raise CommandError(f"{turn_id} is not the id of a turn") from None
    return _ask(find_turn, identifier)


def _ask[T](query: Callable[..., T], *arguments: Any) -> T:
    """One transaction on the database at DATABASE_URL."""
    from app.settings import get_settings
    from app.store import Store, migrate

    migrate.require_head(get_settings().sqlalchemy_url)
    store = Store(get_settings().sqlalchemy_url, pool_size=2, name="cli")
    try:
        return store.transact(query, *arguments)
    finally:
        store.close()


def _shape(turn: TurnRow, agent_id: str | None) -> dict[str, Any]:
    moments = {name: getattr(turn, name) for name in ("created_at", "started_at", "completed_at")}
    response = turn.kind == TurnKind.RESPONSE
    return {
        "turn_id": turn.turn_id,
        **({"response_id": response_id(turn.turn_id)} if response else {"agent_id": agent_id}),
        "session_id": turn.session_id,
        "number": turn.number,
        "status": turn.status.value,
        "worker": turn.worker,
        "fence": turn.fence,
        "last_event": str(turn.last),
        **{name: moment.isoformat() if moment else None for name, moment in moments.items()},
        "error": turn.error,
        **({"input": turn.request["input"]} if response else {"input_messages": turn.request.get("messages")}),
        "steps": turn.steps,
        "output_message": turn.output_message,
    }

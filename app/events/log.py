"""The log of a turn in Redis: every key, every script.

`caravan:{turn}:log`, a hash: `fence`, the attempt that may append; `lf` and `ln`, fence and number of the last event;
`lost`, from when a fence was raised without anything known until something is appended: an attempt that dies meanwhile
must not hide from the next one that there may have been events.
`caravan:{turn}:tail`, a stream: the events since the last recorded segment; an entry's id is the event's, `a` the id
that it follows, `k` its kind, `d` its data.
`caravan:{turn}`, a channel: batches of events, one `after id kind data` a line.
`caravan:cancel`, a channel: ids of running turns that are to be cancelled, for whichever worker runs them.

Both keys live for `TTL_SECONDS` from the last append (a worker also refreshes those of its silent turns), and for
`ENDED_TTL_SECONDS` once the turn has ended. The hash tag puts a turn's keys in one slot of a cluster.
Run Redis with `maxmemory-policy noeviction`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from app.domain.events import Event, EventId, EventKind, trusted_id

TTL_SECONDS = 7200
ENDED_TTL_SECONDS = 60
CONNECT_TIMEOUT_SECONDS = 2.0
SOCKET_TIMEOUT_SECONDS = 5.0
PIPELINE = 200  # appends of different turns that go to Redis in one round trip

CANCEL_CHANNEL = "caravan:cancel"
AppendOutcome = Literal["ok", "missing", "stale"]

_APPEND = """
-- ARGV: channel, fence, ttl ms, id to trim through ('' for none), then id, after, kind, data of each event
local function parse(id) local f, n = string.match(id, '(%d+)-(%d+)'); return tonumber(f), tonumber(n) end
local function later(f1, n1, f2, n2) return f1 > f2 or (f1 == f2 and n1 > n2) end
local state = redis.call('HMGET', KEYS[1], 'fence', 'lf', 'ln')
if not state[1] then return 'missing' end
local fence = tonumber(ARGV[2])
if tonumber(state[1]) > fence then return 'stale' end
if tonumber(state[1]) < fence then return 'missing' end
local lf, ln = tonumber(state[2]), tonumber(state[3])
local lines = {}
for i = 5, #ARGV, 4 do
  local f, n = parse(ARGV[i])
  if later(f, n, lf, ln) then
    local af, an = parse(ARGV[i + 1])
    if later(af, an, lf, ln) then return 'missing' end
    redis.call('XADD', KEYS[2], ARGV[i], 'a', ARGV[i + 1], 'k', ARGV[i + 2], 'd', ARGV[i + 3])
    lines[#lines + 1] = ARGV[i + 1] .. ' ' .. ARGV[i] .. ' ' .. ARGV[i + 2] .. ' ' .. ARGV[i + 3]
    lf, ln = f, n
  end
end
if #lines > 0 then
  redis.call('HSET', KEYS[1], 'lf', string.format('%.0f', lf), 'ln', string.format('%.0f', ln))
  redis.call('HDEL', KEYS[1], 'lost')
  redis.call('PUBLISH', ARGV[1], table.concat(lines, '\\n'))
end
if ARGV[4] ~= '' then
  local f, n = parse(ARGV[4])
  redis.call('XTRIM', KEYS[2], 'MINID', string.format('%.0f-%.0f', f, n + 1))
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 'ok'
"""

_RAISE = """
-- ARGV: fence, fence and number of the last recorded event, ttl ms, a higher fence to take back ('' for none)
local state = redis.call('HMGET', KEYS[1], 'fence', 'lf', 'ln', 'lost')
local fence, rf, rn = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if state[1] and tonumber(state[1]) > fence and state[1] ~= ARGV[5] then return {'stale', {}} end
redis.call('HSET', KEYS[1], 'fence', ARGV[1])
local known = state[4] and 'none' or 'tail'
if not state[1] then
  known = 'none'
  redis.call('HSET', KEYS[1], 'lost', '1')
  redis.call('DEL', KEYS[2])
end
local lf, ln = tonumber(state[2] or '0'), tonumber(state[3] or '0')
if not state[1] or rf > lf or (rf == lf and rn > ln) then
  redis.call('HSET', KEYS[1], 'lf', ARGV[2], 'ln', ARGV[3])
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {known, redis.call('XRANGE', KEYS[2], '(' .. ARGV[2] .. '-' .. ARGV[3], '+')}
"""


def _log(turn_id: str) -> str:
    return f"caravan:{{{turn_id}}}:log"


def _tail(turn_id: str) -> str:
    return f"caravan:{{{turn_id}}}:tail"


def channel(turn_id: str) -> str:
    return f"caravan:{{{turn_id}}}"


@dataclass(frozen=True)
class Tail:
    """What Redis has of a turn: the id of its last event (None: nothing is known), and the events asked for."""

    last: EventId | None
    events: list[Event]


def _append_arguments(
    turn_id: str, fence: int, events: Sequence[Event], trim: EventId | None, ttl_seconds: float
) -> list[Any]:
    arguments: list[Any] = [channel(turn_id), fence, int(ttl_seconds * 1000), str(trim) if trim else ""]
    for event in events:
        arguments += (str(event.id), str(event.after), event.kind.value, event.data)
    return arguments


def _events(entries: Any) -> list[Event]:
    return [
        Event(trusted_id(identifier), trusted_id(fields["a"]), EventKind(fields["k"]), fields["d"])
        for identifier, fields in entries
    ]


def _raised(answer: Any) -> list[Event] | None:
    """XRANGE from inside a script comes as [[id, [field, value, …]], …]."""
    known, entries = answer
    if known != "tail":
        return None
    return _events((identifier, dict(zip(flat[::2], flat[1::2], strict=True))) for identifier, flat in entries)


class SyncLog:
    """The log for those who have no event loop: raise the fence of a turn, and publish its end. Never waits long.

    After a failure it does not ask Redis for twice the time that this took, so that one that hangs does not hold up
    everyone who ends many turns.
    """

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=1.0,
            socket_connect_timeout=1.0,
            retry=redis.retry.Retry(NoBackoff(), 1, (RedisConnectionError,)),
        )
        self._append = self._redis.register_script(_APPEND)
        self._raise = self._redis.register_script(_RAISE)
        self._silent_until = 0.0

    def raise_fence(self, turn_id: str, fence: int, last: EventId) -> list[Event] | None:
        """The events after `last` that a dead attempt left; None: Redis is down, or knows nothing of the turn."""
        return self._answer(lambda: _raised(self._raise_to(turn_id, fence, last)))

    def publish_end(self, turn_id: str, events: Sequence[Event]) -> bool:
        """Publishes the recorded last events of a turn; False if Redis is down: followers find them in Postgres."""
        fence, last = events[-1].id.fence, events[0].after
        arguments = _append_arguments(turn_id, fence, events, None, ENDED_TTL_SECONDS)

        def publish() -> bool:
            self._raise_to(turn_id, fence, last)
            self._append(keys=[_log(turn_id), _tail(turn_id)], args=arguments)
            return True

        return bool(self._answer(publish))

    def ask_to_cancel(self, turn_id: str) -> bool:
        """Tells the workers at once; False if Redis is down: the turn's worker learns it with its next renewal."""
        return self._answer(lambda: self._redis.publish(CANCEL_CHANNEL, turn_id)) is not None

    def _raise_to(self, turn_id: str, fence: int, last: EventId) -> Any:
        arguments: list[str | int] = [fence, last.fence, last.n, TTL_SECONDS * 1000, ""]
        return self._raise(keys=[_log(turn_id), _tail(turn_id)], args=arguments)

    def _answer[T](self, ask: Callable[[], T]) -> T | None:
        """None: Redis is down."""
        started = time.monotonic()
        if started < self._silent_until:
            return None
        try:
            return ask()
        except RedisError:
            now = time.monotonic()
            self._silent_until = now + 2 * (now - started)
            return None

    def ping(self) -> None:
        """Raises redis.exceptions.RedisError."""
        self._redis.ping()

    def close(self) -> None:
        self._redis.close()


class EventLog:
    """The log on an event loop, for writers and followers. Methods raise redis.exceptions.RedisError or OSError."""

    def __init__(self, url: str, *, max_connections: int = 64) -> None:
        self._pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            decode_responses=True,
            max_connections=max_connections,
            timeout=SOCKET_TIMEOUT_SECONDS,
            socket_timeout=SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            health_check_interval=0,
            # A pooled connection may have died unseen: everything here may be asked twice, so it is, once.
            retry=redis.asyncio.retry.Retry(NoBackoff(), 1, (RedisConnectionError,)),
        )
        self.redis = redis.asyncio.Redis(connection_pool=self._pool)
        self._append = self.redis.register_script(_APPEND)
        self._raise = self.redis.register_script(_RAISE)
        self._queue: list[tuple[list[Any], asyncio.Future[AppendOutcome]]] = []
        self._sender: asyncio.Task[None] | None = None
        # A subscriber waits for as long as nothing is published: no timeout, and so no timer for every message.
        self.subscriber = redis.asyncio.Redis.from_url(
            url,
            decode_responses=True,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            socket_keepalive=True,
            retry=redis.asyncio.retry.Retry(NoBackoff(), 0),  # a loss must show: what was published meanwhile is missed
        )

    async def append(
        self,
        turn_id: str,
        fence: int,
        events: Sequence[Event],
        *,
        trim: EventId | None = None,
        ttl_seconds: float = TTL_SECONDS,
    ) -> AppendOutcome:
        """Appends and publishes events that follow the log's last one; skips those that are there already.

        `trim`: forget the tail through this recorded event. "missing": Redis does not know this fence, or not the
        event that these follow; "stale": another attempt has raised the fence.
        """
        arguments = _append_arguments(turn_id, fence, events, trim, ttl_seconds)
        return await self._batched([_log(turn_id), _tail(turn_id), *arguments])

    async def _batched(self, arguments: list[Any]) -> AppendOutcome:
        """One pipeline for the appends of all turns that came while the last one was in flight."""
        appended: asyncio.Future[AppendOutcome] = asyncio.get_running_loop().create_future()
        self._queue.append((arguments, appended))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_queued(), name="appends")
        return await appended

    async def _send_queued(self) -> None:
        while self._queue:
            batch, self._queue = self._queue[:PIPELINE], self._queue[PIPELINE:]
            try:
                answers = await self._send([arguments for arguments, _ in batch])
            except Exception as error:  # whatever it is, somebody waits for each answer
                answers = [error] * len(batch)
            for (_, appended), answer in zip(batch, answers, strict=True):
                if appended.cancelled():
                    continue
                if isinstance(answer, Exception):
                    appended.set_exception(answer)
                else:
                    appended.set_result(answer)

    async def _send(self, batch: list[list[Any]]) -> list[Any]:
        pipeline = self.redis.pipeline(transaction=False)
        for arguments in batch:
            pipeline.execute_command("EVALSHA", self._append.sha, 2, *arguments)
        answers = await pipeline.execute(raise_on_error=False)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await self.redis.script_load(_APPEND)
            return await self._send(batch)  # what was appended already is skipped by its id
        return answers

    async def fence(self, turn_id: str) -> int | None:
        """The attempt that may append; None: nothing is known."""
        found = await self.redis.hget(_log(turn_id), "fence")
        return None if found is None else int(found)

    async def raise_fence(
        self, turn_id: str, fence: int, last: EventId, *, instead_of: int | None = None
    ) -> list[Event] | None:
        """Lets only `fence` append from now on; gives what is in the tail after `last`, None if nothing is known.

        A higher fence stays, unless it is `instead_of`: one that was raised for nothing.
        """
        arguments = [fence, last.fence, last.n, TTL_SECONDS * 1000, "" if instead_of is None else instead_of]
        return _raised(await self._raise(keys=[_log(turn_id), _tail(turn_id)], args=arguments))

    async def read(self, turn_id: str, cursor: EventId, limit: int | None = None) -> Tail:
        """The tail's events after `cursor`, at most `limit` of them."""
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.hmget(_log(turn_id), "lf", "ln")
        pipeline.xrange(_tail(turn_id), f"({cursor}", "+", limit)
        (fence, n), entries = await pipeline.execute()
        return Tail(EventId(int(fence), int(n)) if fence else None, _events(entries))

    async def lasts(self, turn_ids: Sequence[str]) -> dict[str, EventId]:
        """The id of each turn's last event, for those that Redis knows: one round trip."""
        pipeline = self.redis.pipeline(transaction=False)
        for turn_id in turn_ids:
            pipeline.hmget(_log(turn_id), "lf", "ln")
        answers = await pipeline.execute()
        return {
            turn_id: EventId(int(fence), int(n))
            for turn_id, (fence, n) in zip(turn_ids, answers, strict=True)
            if fence is not None
        }

    async def touch(self, turn_ids: Sequence[str]) -> None:
        """Keeps the logs of running turns alive while they are silent."""
        pipeline = self.redis.pipeline(transaction=False)
        for turn_id in turn_ids:
            pipeline.expire(_log(turn_id), TTL_SECONDS)
            pipeline.expire(_tail(turn_id), TTL_SECONDS)
        await pipeline.execute()

    async def close(self) -> None:
        await self.subscriber.aclose()
        await self.redis.aclose()
        await self._pool.disconnect()

"""Streams over real sockets: two web processes, a worker, and a Redis of their own to flush, stop and restart."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg2
import pytest
from celery import Celery

from app.local.server import answers_http
from app.local.valkey import Valkey
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.nodes import TURN_POOL, Process, web_process, worker_node
from tests.support.scripted_model import ScriptedModel
from tests.support.wire import FINAL_CHUNK, Wire, body_of, events, last_id

SEND_TIMEOUT = 2.0
MANY = 1000
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class System:
    env: dict[str, str]
    redis: Valkey
    urls: tuple[str, str]
    webs: tuple[Process, Process]

    def log(self) -> str:
        """What the first web process has printed."""
        return self.webs[0].output()

    def sql(self, statement: str, *parameters: str) -> list[tuple[object, ...]]:
        connection = psycopg2.connect(self.env["DATABASE_URL"])
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement, parameters)
                return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()


class Session:
    """A session of an agent of its own; paths and turns."""

    def __init__(self, url: str) -> None:
        self.url = url
        with httpx.Client(base_url=url, timeout=60) as http:
            agent_id = http.post("/v1/agents", json={"agent_config": {"model": "scripted", "instructions": "x"}})
            path = f"/v1/agents/{agent_id.json()['agent_id']}/session"
            self.path = f"{path}/{http.post(path, json={'session_name': 'x'}).json()['session_id']}"

    def post(self, script: str) -> Wire:
        body = {"messages": [{"role": "user", "content": script}], "stream": True}
        return Wire(self.url, "POST", f"{self.path}/turn", body=body)

    def events_path(self, wire: Wire) -> str:
        """Of the turn that `wire` posted."""
        wire.wait_for(b"\r\n\r\n")
        return f"{self.path}/turn/{wire.header('x-turn-id')}/events"


@pytest.fixture(scope="module")
def system(
    environment: dict[str, str], migrated_database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("streams")
    with ExitStack() as stack:
        redis = stack.enter_context(Valkey(directory))
        env = {
            **environment,
            "DATABASE_URL": migrated_database("caravan_streams"),
            "REDIS_URL": redis.url,
            "PING_SECONDS": "1",
            "STREAM_SEND_TIMEOUT_SECONDS": str(SEND_TIMEOUT),
            "EVENT_LOG_MAX_BYTES": str(100 * MEGABYTE),
        }
        started = [web_process(env, directory / f"web{n}.log") for n in range(2)]
        for _, web in started:
            web.start()
            stack.callback(web.stop)
        worker = worker_node(TURN_POOL, env, directory / "worker.log", Celery(broker=redis.url), name="streams")
        stack.callback(worker.teardown)
        for _, web in started:
            web.wait_ready()
        for url, _ in started:
            wait_until(lambda: answers_http(f"{url}/v1/health"))  # noqa: B023
        assert worker.ready()
        yield System(env, redis, (started[0][0], started[1][0]), (started[0][1], started[1][1]))


@pytest.fixture
def session(system: System, model: ScriptedModel) -> Session:
    return Session(system.urls[0])


@pytest.fixture(autouse=True)
def no_tracebacks(system: System) -> Iterator[None]:
    """Nothing that happens to a stream is an accident to the web process."""
    yield
    for web in system.webs:
        assert "Traceback" not in web.output()


def whole(url: str, path: str, after: str = "", timeout: float = PATIENCE_SECONDS) -> bytes:
    """The events of a stream that ends by itself, as they came, without comments."""
    with Wire(url, "GET", path, headers={"Last-Event-ID": after}) as wire:
        wait_until(lambda: wire.ended_cleanly or wire.over.is_set(), timeout)
        assert wire.ended_cleanly
        return b"\n\n".join(events(wire.body))


def live(wire: Wire, timeout: float = PATIENCE_SECONDS) -> bytes:
    """The same of a stream that is open already."""
    wait_until(lambda: wire.ended_cleanly or wire.over.is_set(), timeout)
    assert wire.ended_cleanly, wire.raw[-300:]
    return b"\n\n".join(events(wire.body))


def test_a_reader_joins_from_any_event_on_any_web_process(
    system: System, session: Session, model: ScriptedModel
) -> None:
    """While the turn runs and after it: what came before the event and what comes after it is the whole, once."""
    gate = uuid.uuid4().hex
    with session.post(f"PART a b c | CALL none {{}} | PART d | HOLD {gate} | SAY e") as first, ExitStack() as stack:
        first.wait_for(b'"text":"d "')
        path, so_far = session.events_path(first), events(first.body)
        cursors = ["", *(event.partition(b"\n")[0].removeprefix(b"id: ").decode() for event in so_far)]
        joined = [
            (cursor, stack.enter_context(Wire(url, "GET", path, headers={"Last-Event-ID": cursor})))
            for cursor in cursors
            for url in system.urls
        ]
        for _, wire in joined:
            wire.wait_for(b"\r\n\r\n")
        model.release(gate)
        all_events = live(first).split(b"\n\n")
        for cursor, wire in joined:
            assert live(wire).split(b"\n\n") == all_events[cursors.index(cursor) :]
    for index, event in enumerate(all_events[:-1], 1):
        cursor = event.partition(b"\n")[0].removeprefix(b"id: ").decode()
        assert whole(system.urls[index % 2], path, cursor) == b"\n\n".join(all_events[index:])


def test_many_readers_of_a_turn_share_one_subscription(system: System, session: Session, model: ScriptedModel) -> None:
    """However many watch a turn, a web process listens once; with the last reader it stops."""
    gate = uuid.uuid4().hex
    with session.post(f"PART a | HOLD {gate} | SAY b") as first, ExitStack() as stack:
        first.wait_for(b'"text":"a "')
        path = session.events_path(first)
        readers = [stack.enter_context(Wire(system.urls[n % 2], "GET", path)) for n in range(40)]
        for reader in readers:
            reader.wait_for(b'"text":"a "')
        name = "caravan:{" + path.split("/")[-2] + "}"
        wait_until(lambda: subscriptions(system.redis, name) == 2)
        model.release(gate)
        heard = live(first)
        assert all(live(reader) == heard for reader in readers)
        wait_until(lambda: subscriptions(system.redis, name) == 0)


def subscriptions(redis: Valkey, name: str) -> int:
    return int(redis.ask(f"PUBSUB NUMSUB {name}").rpartition(b":")[2])


def test_replay_equals_live_byte_for_byte(system: System, session: Session, model: ScriptedModel) -> None:
    """During the turn, after it, and when Redis has forgotten it."""
    gate = uuid.uuid4().hex
    script = f'CALL none {{"a": "\\u00e9"}} | PART a b | HOLD {gate} | UNICODE'
    with session.post(script) as first:
        first.wait_for(b'"text":"a "')
        path = session.events_path(first)
        with Wire(system.urls[1], "GET", path) as during:
            during.wait_for(b'"text":"a "')
            model.release(gate)
            heard = live(first)
            assert live(during) == heard
    assert b"turn_complete" in heard
    assert [whole(url, path) for url in system.urls] == [heard] * 2
    system.redis.flush()
    assert [whole(url, path) for url in system.urls] == [heard] * 2


@pytest.mark.slow
@pytest.mark.thorough
def test_readers_that_do_not_read_cost_little_and_hold_nobody_up(system: System, model: ScriptedModel) -> None:
    """They are cut off after STREAM_SEND_TIMEOUT_SECONDS, leave nothing behind, and can join again where they were.

    Round after round in one process: what a cut stream leaves shows only in the sum.
    """
    web = psutil.Process(system.webs[0].pid)
    before, peaks = web.memory_info().rss, []
    for n in range(1, ROUNDS + 1):
        peaks.append(deaf_round(system, model, web, system.log().count(CUT_OFF) + DEAF, rejoin=n == ROUNDS))
    shown = [f"{peak / MEGABYTE:.0f}" for peak in peaks]
    assert max(peaks) - before < DEAF * 10 * MEGABYTE, shown
    assert peaks[-1] - peaks[1] < 60 * MEGABYTE, shown  # a buffer of each, left behind, would be 20 a round


DEAF, ROUNDS = 20, 8
CUT_OFF = "the client took nothing for"


def deaf_round(system: System, model: ScriptedModel, web: psutil.Process, cuts: int, *, rejoin: bool) -> int:
    """A turn of 12 MB with `DEAF` readers that take nothing; the most memory that the web process had (bytes).

    Ends when its log tells of so many `cuts`. Meanwhile another turn streams, and a reader that reads gets everything.
    """
    gate, url = uuid.uuid4().hex, system.urls[0]
    session, other, most = Session(url), Session(url), 0
    with session.post(f"HOLD {gate} | CHUNKS 60000") as first, ExitStack() as stack:
        path = session.events_path(first)
        deaf = [stack.enter_context(Wire(url, "GET", path, receive_buffer=4096, read=False)) for _ in range(DEAF)]
        wait_until(lambda: system.log().count(f'"GET {path}') == DEAF)
        model.release(gate)
        with other.post("SAY quick") as quick:
            live(quick, 60)

        def all_are_cut() -> bool:
            nonlocal most
            most = max(most, web.memory_info().rss)
            return first.ended_cleanly and system.log().count(CUT_OFF) == cuts

        wait_until(all_are_cut, 60)
        heard = live(first)
        assert len(heard) > 10 * MEGABYTE
        for wire in deaf[:3] if rejoin else []:
            wire.start_reading()
            wire.wait_over()
            assert not wire.ended_cleanly
            assert heard == b"\n\n".join(events(wire.body)) + b"\n\n" + whole(url, path, last_id(wire.body))
    return most


def test_a_slow_reader_gets_everything(system: System, session: Session) -> None:
    """Also an event that it takes longer for than STREAM_SEND_TIMEOUT_SECONDS: what counts is that it goes on."""
    with session.post("SAY " + "x" * 2 * MEGABYTE) as first:
        heard, path = live(first), session.events_path(first)
    with Wire(system.urls[0], "GET", path, receive_buffer=262_144, read=False) as wire:
        pieces = []
        while piece := wire.take(65_536):
            pieces.append(piece)
            time.sleep(0.04)  # that is what makes it slow
            if piece.endswith(FINAL_CHUNK):
                break
        wire.raw = b"".join(pieces)
        assert wire.ended_cleanly
        assert b"\n\n".join(events(wire.body)) == heard


def test_a_silent_stream_has_comments_and_no_end(system: System, session: Session, model: ScriptedModel) -> None:
    """While the model thinks: longer than any timeout of the connection."""
    gate = uuid.uuid4().hex
    with session.post(f"PART a | HOLD {gate} | SAY b") as wire:
        wait_until(lambda: wire.body.count(b": ping\n") >= 7)
        model.release(gate)
        live(wire)
        assert b": ping\n\n" not in wire.body


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_stream_whose_turn_is_gone_is_cut(
    system: System, session: Session, model: ScriptedModel, status: str
) -> None:
    """Its rows are deleted: no final chunk, and one line in the log."""
    gate = uuid.uuid4().hex
    with session.post(f"PART a | HOLD {gate}") as running:
        running.wait_for(b'"text":"a "')
        with session.post("SAY b") as queued:
            wire = queued if status == "queued" else running
            turn_id = session.events_path(wire).split("/")[-2]
            system.sql("DELETE FROM turns WHERE turn_id = %s", turn_id)
            wire.wait_over()
            assert not wire.ended_cleanly
            wait_until(lambda: f"Turn '{turn_id}'" in system.log())
            model.release(gate)


def test_streams_outlive_redis(system: System, session: Session, model: ScriptedModel) -> None:
    """While it is down they get what is recorded, afterwards they are live again: nothing missing, nothing twice."""
    one, two, three = (uuid.uuid4().hex for _ in range(3))
    script = f"PART a | HOLD {one} | CALL none {{}} | PART b | HOLD {two} | PART c | HOLD {three} | SAY d"
    with session.post(script) as wire, ExitStack() as stack:
        wire.wait_for(b'"text":"a "')
        path = session.events_path(wire)
        other = stack.enter_context(Wire(system.urls[1], "GET", path))
        system.redis.kill()
        model.release(one)
        wire.wait_for(b'"step_type":"tool_execution"')
        late = stack.enter_context(Wire(system.urls[0], "GET", path))
        late.wait_for(b'"step_type":"tool_execution"')
        system.redis.start()
        model.release(two)
        wire.wait_for(b'"text":"c "')
        model.release(three)
        heard = live(wire)
        assert live(other) == live(late) == heard == whole(system.urls[1], path)
    assert "Redis is not available (REDIS_URL)" in system.log()
    wait_until(lambda: "Redis is available again" in system.log())


def test_a_cut_subscription_is_made_anew(system: System, session: Session) -> None:
    """Only the pub/sub connections break, again and again, while events are published."""
    with session.post("CHUNKS 2000 1") as wire:
        for _ in range(3):
            seen = len(wire.raw)
            system.redis.ask("CLIENT KILL TYPE pubsub")
            wait_until(lambda: len(wire.raw) > seen + 20_000 or wire.ended_cleanly)  # noqa: B023
        heard = live(wire)
        path = session.events_path(wire)
    assert heard == whole(system.urls[1], path)
    assert heard.count(b"step_progress") == 2000


def test_a_redis_that_hangs_is_noticed(system: System, session: Session) -> None:
    """Nothing breaks, nothing answers: the log says so, and streams go on when it does again."""
    pid = system.redis.pid
    assert pid
    with session.post("CHUNKS 5000 1") as wire:
        wire.wait_for(b'"text":"w100 "')
        before = system.log().count("Redis is not available (REDIS_URL)")
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: system.log().count("Redis is not available (REDIS_URL)") > before)
            time.sleep(3)  # the new connection hangs as well
        finally:
            os.kill(pid, signal.SIGCONT)
        heard = live(wire, 60)
        path = session.events_path(wire)
    assert heard == whole(system.urls[1], path)
    assert heard.count(b"step_progress") == 5000
    wait_until(lambda: system.log().rfind("is available again") > system.log().rfind("is not available (REDIS_URL)"))


def test_an_early_failure_is_told_at_once(system: System, session: Session) -> None:
    """A turn that failed before its reader joined: the error, then the end."""
    with session.post("ERR 400 no such thing") as wire:
        heard = live(wire)
        path = session.events_path(wire)
    assert b'{"error":' in heard
    for url in system.urls:
        assert whole(url, path) == heard
        assert whole(url, path, last_id(heard + b"\n\n")) == b""


def test_turns_posted_at_once_lose_no_first_event(system: System, model: ScriptedModel) -> None:
    """The doorbell is rung before anybody listens; every stream has everything from its first event on."""
    sessions = [Session(system.urls[n % 2]) for n in range(16)]
    start = threading.Barrier(len(sessions))

    def run(session: Session) -> tuple[bytes, bytes]:
        start.wait()
        with session.post("SAY a b") as wire:
            heard = live(wire)
            return heard, whole(system.urls[0], session.events_path(wire))

    with ThreadPoolExecutor(len(sessions)) as pool:
        for heard, replayed in pool.map(run, sessions):
            assert heard == replayed
            assert heard.startswith(b"id: 1-1\n")
            assert heard.count(b"id: ") == 5


@pytest.mark.slow
def test_a_thousand_streams_share_connections(system: System, model: ScriptedModel) -> None:
    """Half of them on one turn, half on many: connections to Redis and Postgres stay as operations.md says.

    For Redis that is 64 for the log, one for subscriptions, and a few for the queue.
    """
    gate, sessions = uuid.uuid4().hex, [Session(system.urls[0]) for _ in range(26)]
    with ExitStack() as stack:
        posted = [stack.enter_context(one.post(f"PART a | HOLD {gate} | SAY b")) for one in sessions]
        paths = [one.events_path(wire) for one, wire in zip(sessions, posted, strict=True)]
        for wire in posted:
            wire.wait_for(b'"text":"a "')
        chosen = [paths[0]] * (MANY // 2) + [paths[1 + n % 25] for n in range(MANY // 2)]
        with watching(system) as most:
            answers = asyncio.run(read_all(system.urls[0], chosen, lambda: model.release(gate)))
        heard = dict(zip(paths, map(live, posted), strict=True))
    assert all(b"\n\n".join(events(body_of(raw))) == heard[path] for path, raw in zip(chosen, answers, strict=True))
    assert most["redis"] <= 64 + 1 + 4
    assert most["postgres"] <= 2 * 5 + 2


async def read_all(url: str, paths: list[str], when_all_are_open: Callable[[], object]) -> list[bytes]:
    """Opens all streams, waits for the first events of each, and gives what came on the wire."""
    place, opened = urlsplit(url), 0

    async def read(path: str) -> bytes:
        nonlocal opened
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode())
        raw = await reader.readuntil(b'"text":"a "')
        opened += 1
        raw += await reader.readuntil(FINAL_CHUNK)
        writer.close()
        return raw

    reading = asyncio.gather(*map(read, paths))
    while opened < len(paths) and not reading.done():  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    await asyncio.to_thread(when_all_are_open)
    return await reading


@contextmanager
def watching(system: System) -> Iterator[dict[str, int]]:
    """The most connections that the first web process had: to Redis, and to Postgres."""
    most, done = {"redis": 0, "postgres": 0}, threading.Event()
    ports = {"redis": system.redis.port, "postgres": urlsplit(system.env["DATABASE_URL"]).port}

    def watch() -> None:
        while not done.wait(0.1):
            connections = psutil.Process(system.webs[0].pid).net_connections("tcp")
            for name, port in ports.items():
                count = sum(one.raddr.port == port for one in connections if one.raddr and one.status == "ESTABLISHED")
                most[name] = max(most[name], count)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield most
    done.set()
    watcher.join()

"""A web process is told to stop: a grace for what is open, then cut connections, and the process ends."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from celery import Celery

from app.local.server import answers_http
from tests.support import ROOT, wait_until
from tests.support.nodes import READY_SECONDS, TURN_POOL, Process, web_process, worker_node
from tests.support.scripted_model import ScriptedModel
from tests.support.wire import Wire, events, last_id

SOON = 60.0
"""Seconds within which a process that has nothing to wait for ends, on a busy machine."""
LONG = 100.0
"""A grace that no test waits for."""


@pytest.fixture(scope="module")
def worker(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    log = tmp_path_factory.mktemp("shutdown") / "worker.log"
    node = worker_node(TURN_POOL, environment, log, Celery(broker=environment["REDIS_URL"]), name="shutdown")
    assert node.ready()
    yield environment
    node.teardown()


def payloads(body: bytes) -> list[Any]:
    return [json.loads(event.partition(b"\ndata: ")[2]) for event in events(body)]


def documented_client() -> Callable[..., Iterator[Any]]:
    """The example of docs/api.md."""
    [example] = re.findall(r"```python\n(def events.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"httpx": httpx, "json": json, "time": time}
    exec(example, names)
    return cast(Callable[..., Iterator[Any]], names["events"])


WebMaker = Callable[..., "Web"]


class Web:
    """One web process with an agent and a session to post turns to."""

    def __init__(self, url: str, process: Process) -> None:
        self.url = url
        self.process = process
        with httpx.Client(base_url=url, timeout=60) as http:
            config = {"model": "scripted", "instructions": "x"}
            agent_id = http.post("/v1/agents", json={"agent_config": config}).json()["agent_id"]
            session = http.post(f"/v1/agents/{agent_id}/session", json={"session_name": "x"}).json()
        self.session = f"/v1/agents/{agent_id}/session/{session['session_id']}"

    def post(self, script: str, *, stream: bool = True) -> Wire:
        body = {"messages": [{"role": "user", "content": script}], "stream": stream}
        return Wire(self.url, "POST", f"{self.session}/turn", body=body)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.signal(number)
        wait_until(lambda: "no new turns" in self.process.output())

    def ended(self, timeout: float = SOON) -> str:
        """Waits for the end of the process; gives its log, in which there is no traceback."""
        self.process.wait_ended(timeout)
        log = self.process.output()
        assert "Traceback" not in log
        assert "ERROR" not in log
        return log


@pytest.fixture
def make_web(worker: dict[str, str], tmp_path: Path, model: ScriptedModel) -> Iterator[WebMaker]:
    started: list[Process] = []

    def make(grace: float, *options: str) -> Web:
        settings = {**worker, "WEB_GRACE_SECONDS": str(grace)}
        url, process = web_process(settings, tmp_path / f"web{len(started)}.log", *options)
        started.append(process)
        process.start()
        process.wait_ready()
        # uvicorn's supervisor is ready before its processes are.
        processes = int(options[options.index("--workers") + 1]) if "--workers" in options else 1
        wait_until(lambda: process.output().count("Application startup complete") == processes, READY_SECONDS)
        wait_until(lambda: answers_http(f"{url}/v1/health"))
        return Web(url, process)

    yield make
    for process in started:
        process.kill_all()


def test_a_turn_that_ends_within_the_grace_ends_its_stream(make_web: WebMaker, model: ScriptedModel) -> None:
    """Meanwhile turns are refused on connections that are open, other requests answered, new connections refused."""
    web, gate = make_web(LONG, "--timeout-keep-alive", "60"), uuid.uuid4().hex
    with web.post(f"PART a | HOLD {gate} | SAY b") as stream, httpx.Client(base_url=web.url, timeout=60) as http:
        stream.wait_for(b'"text":"a "')
        turn = f"{web.session}/turn/{stream.header('x-turn-id')}"
        idle = [Wire(web.url, "GET", turn) for _ in range(4)]
        for wire in idle:
            wire.wait_for(b'"turn_id"')
        web.stop()
        asked = [("POST", f"{web.session}/turn"), ("POST", f"{turn}/resume"), ("GET", f"{turn}/events")]
        for wire, (method, path) in zip(idle, asked, strict=False):
            seen = len(wire.raw)
            wire.request(method, path, body={"messages": []})
            wire.wait_over()
            refusal = wire.raw[seen:].lower()
            assert refusal.startswith(b"http/1.1 503 ")
            assert b"\r\nretry-after: 1\r\n" in refusal
            assert b"\r\nconnection: close\r\n" in refusal
        idle[3].request("GET", turn)
        idle[3].wait_over()
        assert idle[3].raw.count(b"HTTP/1.1 200 OK") == 2
        assert idle[3].raw.lower().count(b"\r\nconnection: close\r\n") == 1
        with pytest.raises(httpx.ConnectError):
            http.get(turn)
        model.release(gate)
        stream.wait_over()
        assert stream.ended_cleanly
        assert b"turn_complete" in events(stream.body)[-1]
    assert "aborted" not in web.ended()


def test_after_the_grace_streams_are_cut(make_web: WebMaker, model: ScriptedModel) -> None:
    """No final chunk, no traceback, one line; the client joins again elsewhere and misses nothing."""
    other, web, gate = make_web(LONG), make_web(1.0), uuid.uuid4().hex
    with web.post(f"PART a | HOLD {gate} | SAY b") as stream, web.post("SAY later", stream=False) as waiting:
        stream.wait_for(b'"text":"a "')
        turn = f"{web.session}/turn/{stream.header('x-turn-id')}"
        with Wire(web.url, "GET", f"{turn}/events") as second:
            second.wait_for(b'"text":"a "')
            wait_until(lambda: len(httpx.get(other.url + web.session, timeout=60).json()["turns"]) == 2)
            web.stop()
            second.wait_over()
        for wire in (stream, waiting):
            wire.wait_over()
            assert not wire.ended_cleanly
        assert waiting.raw == b""
        log = web.ended()
        assert log.count("aborted") == 1
        assert "2 streams and 1 other requests were aborted" in log
        assert "Application shutdown complete" in log
        model.release(gate)
        with Wire(other.url, "GET", f"{turn}/events", headers={"Last-Event-ID": last_id(stream.body)}) as rest:
            rest.wait_for(b"0\r\n\r\n")
        with Wire(other.url, "GET", f"{turn}/events") as whole:
            whole.wait_for(b"0\r\n\r\n")
        assert events(stream.body) + events(rest.body) == events(whole.body)
        with httpx.Client(base_url=other.url, timeout=60) as http:
            shown = documented_client()(http, turn, last_id(stream.body))
            assert [json.dumps(each) for each in shown] == [json.dumps(each) for each in payloads(rest.body)]


@pytest.mark.parametrize("second", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_a_second_signal_ends_the_grace(make_web: WebMaker, second: int) -> None:
    """Streams are cut at once, in the same way."""
    web = make_web(LONG)
    with web.post("PART a | HANG") as stream:
        stream.wait_for(b'"text":"a "')
        web.stop(signal.SIGINT)
        web.process.signal(second)
        stream.wait_over()
        assert not stream.ended_cleanly
    assert "1 streams and 0 other requests were aborted" in web.ended()


def test_an_idle_process_stops_at_once(make_web: WebMaker) -> None:
    """Also with connections that are kept alive."""
    web = make_web(LONG)
    with httpx.Client(base_url=web.url, timeout=60) as http:
        assert http.get("/v1/health").is_success
        web.process.signal(signal.SIGTERM)
        assert "Application shutdown complete" in web.ended()


def test_a_client_that_never_reads_does_not_hold_the_process(make_web: WebMaker) -> None:
    """What it has not taken is not waited for, be its stream open or ended."""
    web = make_web(1.0)
    with web.post("SAY " + "x" * 3_000_000) as reader:
        reader.wait_for(b"turn_complete", 60)
        turn = f"{web.session}/turn/{reader.header('x-turn-id')}"
        unread = [Wire(web.url, "GET", path, receive_buffer=4096, read=False) for path in (turn, f"{turn}/events")]
        wait_until(lambda: web.process.output().count(f'"GET {turn}') == 2)
        web.process.signal(signal.SIGTERM)
        assert "1 streams and 0 other requests were aborted" in web.ended()
    for wire in unread:
        with wire:
            wire.start_reading()
            wire.wait_over()
            assert not wire.raw.endswith((b"0\r\n\r\n", b"}"))


@pytest.mark.thorough
def test_uvicorns_workers_stop_in_the_same_way(make_web: WebMaker, model: ScriptedModel) -> None:
    """Each gives its streams the grace, also when a terminal tells them and uvicorn's supervisor at the same time."""
    web, gate = make_web(LONG, "--workers", "2"), uuid.uuid4().hex
    with web.post(f"PART a | HOLD {gate} | SAY b") as stream:
        stream.wait_for(b'"text":"a "')
        os.killpg(web.process.pid, signal.SIGINT)
        wait_until(lambda: "Terminated child process" in web.process.output())
        wait_until(lambda: "no new turns" in web.process.output())
        model.release(gate)
        stream.wait_over()
        assert stream.ended_cleanly
    assert web.ended().count("Application shutdown complete") == 2


@pytest.mark.thorough
def test_uvicorns_workers_cut_their_streams(make_web: WebMaker) -> None:
    """After the grace, in each of them."""
    web = make_web(1.0, "--workers", "2")
    with web.post("PART a | HANG") as stream:
        stream.wait_for(b'"text":"a "')
        web.process.signal(signal.SIGTERM)
        stream.wait_over()
        assert not stream.ended_cleanly
    log = web.ended()
    assert "1 streams and 0 other requests were aborted" in log
    assert log.count("Application shutdown complete") == 2

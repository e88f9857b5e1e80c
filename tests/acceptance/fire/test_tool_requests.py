"""Requests to the tool runtime: any worker runs one, once, and its client is told what became of it."""

from __future__ import annotations

import base64
import json
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from pydantic import SecretStr

from app.dispatch import QUEUE
from app.identity.sealing import Sealing
from app.local.valkey import Valkey
from app.store.tool_requests import KEEP_SECONDS
from tests.acceptance.fire.system import System
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import web_process

HEADERS = "X-LlamaStack-Provider-Data"
MANY = 16
WORKERS = ("a", "b")
"""Those of the fixture, which run; a test may have started others."""


@pytest.fixture
def tool(system: System, mcp: McpServer) -> str:
    """The name of a tool of `mcp`; its group is registered by the first web process."""
    system.toolgroup(mcp)
    return "order"


def invoke(url: str, tool: str, headers: dict[str, str] | None = None, **kwargs: Any) -> Future[httpx.Response]:
    """A request in a thread of its own."""
    answer: Future[httpx.Response] = Future()

    def ask() -> None:
        body = {"tool_name": tool, "kwargs": kwargs}
        try:
            given = httpx.post(f"{url}/v1/tool-runtime/invoke", json=body, headers=headers, timeout=PATIENCE_SECONDS)
            answer.set_result(given)
        except httpx.HTTPError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer


def waiting(system: System) -> list[dict[str, Any]]:
    return system.rows("SELECT * FROM tool_requests")


def holder(system: System) -> str:
    """The name of the worker that runs the only request there is."""
    wait_until(lambda: any(row["worker_id"] for row in waiting(system)), PATIENCE_SECONDS)
    rows = system.rows("SELECT name FROM workers JOIN tool_requests USING (worker_id)")
    pid = int(rows[0]["name"].rpartition(":")[2])
    running = {name: worker for name, worker in system.workers.items() if worker.running()}
    return next(name for name, worker in running.items() if pid in (worker.pid, *worker.children()))


def test_tools_are_run_by_workers(system: System, mcp: McpServer, tool: str) -> None:
    """By any web process's wish; and nothing of it is left."""
    answers = [invoke(url, tool, key=f"k{web}") for web, url in enumerate(system.urls)]
    assert [answer.result().json()["content"][0]["text"] for answer in answers] == ["k0", "k1"]
    assert mcp.counts() == {"k0": 1, "k1": 1}
    wait_until(lambda: not waiting(system), PATIENCE_SECONDS)
    said = "".join(worker.output() for worker in system.workers.values())
    assert said.count("invoke_tool: 200") >= len(answers)


def test_what_is_wrong_with_a_request_is_told(system: System, tool: str) -> None:
    """Wrong arguments at once, the tool's own failures as before."""
    url = f"{system.urls[0]}/v1/tool-runtime"
    for name in WORKERS:
        system.stop_consuming(name)
    wrong = httpx.post(f"{url}/invoke", json={"tool_name": 1, "kwargs": {}}, timeout=PATIENCE_SECONDS)
    assert (wrong.status_code, "tool_name" in wrong.text) == (400, True)
    for name in WORKERS:
        system.consume(name)
    unknown = invoke(system.urls[0], "no_such_tool").result()
    assert (unknown.status_code, "no_such_tool" in unknown.text) == (404, True)
    query = {"vector_store_ids": ["none"], "content": "camels"}
    assert httpx.post(f"{url}/rag-tool/query", json=query, timeout=PATIENCE_SECONDS).status_code == 404


def test_a_request_waits_for_a_worker(system: System, mcp: McpServer, tool: str, fire_valkey: Valkey) -> None:
    """Its message is lost meanwhile, and another comes twenty times: it is run once."""
    queue = redis.Redis.from_url(system.env["REDIS_URL"])
    for name in WORKERS:
        system.stop_consuming(name)
    lost, doubled = invoke(system.urls[0], tool, key="lost"), invoke(system.urls[1], tool, key="doubled")
    wait_until(lambda: queue.llen(QUEUE) >= 2, PATIENCE_SECONDS)
    ids = {row["request_id"]: b"doubled" in bytes(row["arguments"]) for row in waiting(system)}
    kept = [
        message
        for message in queue.lrange(QUEUE, 0, -1)
        if any(is_doubled and str(request_id).encode() in message for request_id, is_doubled in ids.items())
    ]
    queue.delete(QUEUE)
    queue.lpush(QUEUE, *(20 * kept))
    for name in WORKERS:
        system.consume(name)
    assert [answer.result(PATIENCE_SECONDS).status_code for answer in (lost, doubled)] == [200, 200]
    wait_until(lambda: not queue.llen(QUEUE), PATIENCE_SECONDS)
    assert mcp.counts() == {"lost": 1, "doubled": 1}


@pytest.mark.parametrize("starts", [True, False])
def test_revoking_its_task_does_not_cancel_a_request(
    system: System, mcp: McpServer, tool: str, *, starts: bool
) -> None:
    """Before it starts the message is dropped, and upkeep rings again; then it is left alone."""
    queue, hold = redis.Redis.from_url(system.env["REDIS_URL"]), uuid.uuid4().hex
    for name in WORKERS:
        system.stop_consuming(name)
    answer = invoke(system.urls[0], tool, key="k", hold=hold)
    wait_until(lambda: queue.llen(QUEUE), PATIENCE_SECONDS)
    task = json.loads(queue.lrange(QUEUE, 0, 0)[0])["headers"]["id"]
    if not starts:
        system.revoke(task)
    for name in WORKERS:
        system.consume(name)
    mcp.wait_held(hold, timeout=PATIENCE_SECONDS)
    if starts:
        system.revoke(task)
        wait_until(lambda: any("goes on" in worker.output() for worker in system.workers.values()), PATIENCE_SECONDS)
    mcp.release(hold)
    assert answer.result(PATIENCE_SECONDS).status_code == 200
    assert mcp.counts() == {"k": 1}
    assert not any("was revoked; it was found" in worker.output() for worker in system.workers.values())


def test_tools_work_while_the_broker_is_down(system: System, mcp: McpServer, tool: str, fire_valkey: Valkey) -> None:
    fire_valkey.kill()
    try:
        assert invoke(system.urls[0], tool, key="k").result(PATIENCE_SECONDS).status_code == 200
    finally:
        fire_valkey.start()
    assert mcp.counts() == {"k": 1}


def test_a_killed_workers_request_is_not_made_again(system: System, mcp: McpServer, tool: str) -> None:
    """The tool may have done its work, which the client is told; the SDKs are told not to try again by themselves."""
    answer = invoke(system.urls[0], tool, key="k", hold="killed")
    mcp.wait_held("killed", timeout=PATIENCE_SECONDS)
    system.workers[holder(system)].kill_all()
    told = answer.result(PATIENCE_SECONDS)
    mcp.release("killed")
    assert (told.status_code, told.headers.get("x-should-retry")) == (503, "false"), told.text
    assert "unknown" in told.json()["detail"]
    assert mcp.counts() == {"k": 1}
    wait_until(lambda: not waiting(system), PATIENCE_SECONDS)


@pytest.mark.parametrize("finishes", [True, False])
def test_a_worker_that_stops_first_finishes_its_requests(
    system: System, mcp: McpServer, tool: str, *, finishes: bool
) -> None:
    """Within DRAIN_SECONDS; what takes longer is as with a killed worker."""
    system.env_of_worker["patient"] = {"DRAIN_SECONDS": "60"}
    name = "patient" if finishes else "a"
    system.start_workers(name)
    for other in {*WORKERS} - {name}:
        system.stop_consuming(other)
    hold = uuid.uuid4().hex
    answer = invoke(system.urls[0], tool, key="k", hold=hold)
    mcp.wait_held(hold, timeout=PATIENCE_SECONDS)
    worker = system.workers[name]
    worker.signal(signal.SIGTERM)
    wait_until(lambda: "draining" in worker.output(), PATIENCE_SECONDS)
    if finishes:
        mcp.release(hold)
    told = answer.result(PATIENCE_SECONDS)
    mcp.release(hold)
    worker.wait_ended()
    assert told.status_code == (200 if finishes else 503), told.text
    assert mcp.counts() == {"k": 1}


def test_secrets_are_sealed_until_the_answer(system: System, mcp: McpServer, tool: str) -> None:
    """And are what the tool gets."""
    secret = f"secret-{uuid.uuid4().hex}"
    data = f'{{"mcp_headers": {{"{mcp.url}": {{"X-Token": "{secret}"}}}}}}'
    queue = redis.Redis.from_url(system.env["REDIS_URL"])
    for name in WORKERS:
        system.stop_consuming(name)
    held = invoke(system.urls[0], tool, {HEADERS: data}, key="k", hold="sealed")
    wait_until(lambda: queue.llen(QUEUE), PATIENCE_SECONDS)
    message = json.loads(queue.lrange(QUEUE, 0, 0)[0])
    arguments = json.loads(base64.b64decode(message["body"]))[:2]
    for name in WORKERS:
        system.consume(name)
    mcp.wait_held("sealed", timeout=PATIENCE_SECONDS)
    row = waiting(system)[0]
    assert arguments == [[str(row["request_id"])], {}]
    assert secret not in str(message)
    assert row["sealed"] is not None
    assert secret.encode() not in b"".join(bytes(row[name] or b"") for name in ("sealed", "arguments"))
    mcp.release("sealed")
    assert held.result(PATIENCE_SECONDS).status_code == 200
    echoed = invoke(system.urls[1], "echo_header", {HEADERS: data}, name="x-token", fail=False).result()
    assert "[secret]" in echoed.text
    assert secret not in echoed.text


def test_a_worker_that_fails_says_so(system: System) -> None:
    """Here by what a newer web process sealed. As the worker lives on, nobody would take the request for lost."""
    request_id = str(uuid.uuid4())
    sealed = Sealing([SecretStr(key) for key in system.env["SEALING_KEYS"].split(",")]).seal({"novel": {}}, request_id)
    system.execute(
        "INSERT INTO tool_requests (request_id, owner, method, arguments, sealed)"
        " VALUES (:request_id, 'local', 'invoke_tool', '{}', :sealed)",
        request_id=request_id,
        sealed=sealed,
    )
    wait_until(lambda: waiting(system)[0]["status"] == 500, PATIENCE_SECONDS)
    assert waiting(system)[0]["sealed"] is None
    system.execute("DELETE FROM tool_requests")


def test_without_a_worker_the_client_is_told_so(
    system: System, mcp: McpServer, tool: str, migrated_database: Callable[[str], str], tmp_path: Path
) -> None:
    """After MAX_QUEUE_WAIT_SECONDS, and nothing is left to be run later."""
    database = migrated_database("caravan_no_worker")
    env = {**system.env, "DATABASE_URL": database, "MAX_QUEUE_WAIT_SECONDS": "1"}
    url, web = web_process(env, tmp_path / "web.log")
    with web:
        told = invoke(url, "web_search", query="x").result(PATIENCE_SECONDS)
    assert told.status_code == 503
    assert told.json()["detail"] == (
        "No worker took the request within 1 s (MAX_QUEUE_WAIT_SECONDS): no worker is running."
    )
    assert "x-should-retry" not in told.headers


def test_a_web_process_that_stops_withdraws_what_no_worker_has(
    system: System, mcp: McpServer, tool: str, tmp_path: Path
) -> None:
    """Its client asks another one, so it must not be run for the first as well."""
    for name in WORKERS:
        system.stop_consuming(name)
    url, web = web_process({**system.env, "WEB_GRACE_SECONDS": "0.1"}, tmp_path / "web.log")
    with web:
        answer = invoke(url, tool, key="k")
        wait_until(lambda: waiting(system))
    assert isinstance(answer.exception(PATIENCE_SECONDS), httpx.HTTPError)
    assert not waiting(system)


def test_tool_requests_have_caps(system: System, mcp: McpServer, tool: str, tmp_path: Path) -> None:
    """Those of turns; what has ended does not count."""
    url, web = web_process({**system.env, "MAX_TURNS_PER_PRINCIPAL": "1"}, tmp_path / "web.log")
    with web:
        held = invoke(url, tool, key="k", hold="caps")
        mcp.wait_held("caps")
        refused = invoke(url, tool, key="l").result(PATIENCE_SECONDS)
        assert (refused.status_code, "MAX_TURNS_PER_PRINCIPAL" in refused.text) == (429, True)
        assert refused.headers["retry-after"]
        mcp.release("caps")
        assert held.result(PATIENCE_SECONDS).status_code == 200
        assert invoke(url, tool, key="m").result(PATIENCE_SECONDS).status_code == 200
    assert mcp.counts() == {"k": 1, "m": 1}


def test_many_wait_at_once(system: System, mcp: McpServer, tool: str) -> None:
    """More than a web process has connections, and its workers room."""
    with ThreadPoolExecutor(MANY) as threads:
        urls = [system.urls[number % 2] for number in range(MANY)]
        answers = list(threads.map(lambda url: invoke(url, tool, key="many").result(PATIENCE_SECONDS), urls))
    assert {answer.status_code for answer in answers} == {200}
    assert mcp.counts() == {"many": MANY}


def test_what_a_dead_web_process_asked_for_is_forgotten(
    system: System, mcp: McpServer, tool: str, tmp_path: Path
) -> None:
    """Its request runs to its end."""
    url, web = web_process(system.env, tmp_path / "web.log")
    with web:
        answer = invoke(url, tool, key="k", hold="left")
        mcp.wait_held("left", timeout=PATIENCE_SECONDS)
        web.kill_all()
    assert isinstance(answer.exception(PATIENCE_SECONDS), httpx.HTTPError)
    mcp.release("left")
    wait_until(lambda: waiting(system)[0]["status"] == 200, PATIENCE_SECONDS)
    assert waiting(system)[0]["arguments"] is None
    later = f"make_interval(secs => {KEEP_SECONDS})"
    system.execute(f"UPDATE tool_requests SET created_at = created_at - {later}, ended_at = ended_at - {later}")
    wait_until(lambda: not waiting(system), PATIENCE_SECONDS)

"""Our answers agree, field by field, with those of the servers that the SDKs were made for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import httpx
import pytest
from celery import Celery

from tests.compat.contract import MISSING, SDK_ROUTES, SERVED, Answer, Comparison, Deviation, Difference, Json, captured
from tests.compat.deviations import DEVIATIONS
from tests.compat.replay import MODEL, NOWHERE, REPLAYS, TOOLGROUP, VERSIONS
from tests.support.mcp_server import McpServer
from tests.support.nodes import TURN_POOL, web_process, worker_node

CAPTURES = Path(__file__).parent / "captures"
ROUTES = CAPTURES / "sdk-routes.txt"
OLDEST_SDK = (0, 1, 9)
FILES = {f"{file.parent.name}/{file.stem}": file for file in sorted(CAPTURES.glob("*/*"))}


class System:
    """A running system, and how its answers differ; each set of requests is replayed once."""

    def __init__(self, url: str, mcp_url: str) -> None:
        self.url = url
        self._mcp_url = mcp_url
        self._differences: dict[str, list[Difference]] = {}
        self.answers: dict[str, Answer] = {}

    def differences(self, name: str) -> list[Difference]:
        """Of a set of captures, or of `SDK_ROUTES`."""
        if name not in self._differences:
            headers = {"x-llamastack-client-version": VERSIONS.get(name, "0.3.5")}
            with httpx.Client(base_url=self.url, headers=headers, timeout=60) as http:
                self._differences[name] = self._unserved(http) if name == SDK_ROUTES else self._replay(name, http)
        return self._differences[name]

    def _replay(self, name: str, http: httpx.Client) -> list[Difference]:
        answers = {f"{name}/{capture}": ours for capture, ours in REPLAYS[name](http, self._mcp_url).items()}
        self.answers |= answers
        assert set(answers) == {capture for capture in FILES if capture.startswith(f"{name}/")}
        comparison = Comparison()
        return [
            difference
            for capture, ours in answers.items()
            for difference in comparison.differences(capture, captured(FILES[capture]), ours)
        ]

    def _unserved(self, http: httpx.Client) -> list[Difference]:
        answers = {route: _asked(http, *route.split(" ")) for route in _sdk_routes()}
        return [Difference(SDK_ROUTES, route, SERVED, answer) for route, answer in answers.items() if answer != SERVED]


def _sdk_routes() -> list[str]:
    """`<method> <path>`, each that an SDK calls which is served at all."""
    lines = [line.split(" ") for line in ROUTES.read_text().splitlines()]
    return [f"{method} {path}" for method, path, versions in lines if _numbers(versions.split("..")[1]) >= OLDEST_SDK]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _asked(http: httpx.Client, method: str, path: str) -> Json:
    """Whether the path leads anywhere; the status, if it leads to a failure of ours."""
    answer = http.request(method, path.replace("{}", NOWHERE), json={} if method in ("POST", "PUT") else None)
    if answer.status_code >= 500:
        return answer.status_code
    unrouted = answer.status_code == 405 or (answer.status_code == 404 and '"Not Found"' in answer.text)
    return MISSING if unrouted else SERVED


@pytest.fixture(scope="module")
def system(
    environment: dict[str, str], migrated_database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    logs = tmp_path_factory.mktemp("captures")
    env = {
        **environment,
        "DATABASE_URL": migrated_database("caravan_captures"),
        "INFERENCE_MODEL": MODEL,
        "MODEL_ALIASES": "",
    }
    url, web = web_process(env, logs / "web.log")
    web.start()
    worker = worker_node(TURN_POOL, env, logs / "worker.log", Celery(broker=env["REDIS_URL"]), name="captures")
    try:
        web.wait_ready()
        assert worker.ready()
        with McpServer() as mcp:
            endpoint = {
                "toolgroup_id": TOOLGROUP,
                "provider_id": "model-context-protocol",
                "mcp_endpoint": {"uri": mcp.url},
            }
            httpx.post(f"{url}/v1/toolgroups", json=endpoint, timeout=60).raise_for_status()
            yield System(url, mcp.url)
    finally:
        worker.teardown()
        web.stop()


def unexplained(differences: Iterable[Difference]) -> str:
    """Those that the list has not, one on each line."""
    return "\n".join(str(one) for one in differences if not any(deviation.explains(one) for deviation in DEVIATIONS))


@pytest.mark.parametrize("capture", FILES)
def test_our_answer_agrees_with_the_captured_one(capture: str, system: System) -> None:
    """But for what `deviations.py` lists."""
    differences = system.differences(capture.partition("/")[0])
    found = unexplained(one for one in differences if one.capture == capture)
    assert not found, found


def test_the_events_of_a_response_are_numbered_without_gap(system: System) -> None:
    """There, some had no number, and some numbers were left out."""
    system.differences("s35-responses")
    streams = [answer.body for answer in system.answers.values() if "sequence_number" in str(answer.body)]
    assert len(streams) == 4
    for events in streams:
        assert [event["data"]["sequence_number"] for event in events] == list(range(len(events)))


def test_every_route_that_an_sdk_calls_is_served(system: System) -> None:
    found = unexplained(system.differences(SDK_ROUTES))
    assert not found, found


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.reason)
def test_a_deviation_still_shows(deviation: Deviation, system: System) -> None:
    """In each of the captures, and at each of the paths, that it names."""
    assert not deviation.unused([one for name in (*REPLAYS, SDK_ROUTES) for one in system.differences(name)])

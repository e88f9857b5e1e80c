"""Asks every route of a server for whatever its description of itself describes, and checks the answers.

    python -m tests.acceptance.asker URL EACH

prints `{"sent", "wrong"}`. Half of the requests are as described and half are not, by turns of things that exist and of
ids that schemathesis makes up. It is a process of its own because what hypothesis comes to depends on the modules that
are loaded (it takes constants from them), also where it is derandomized: so each run asks for the same.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.scripted_model import DIMENSIONS

SECONDS = 60.0
"""In which each answer comes, and each stream ends."""
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OLDER_CLIENT = {"X-LlamaStack-Client-Version": "0.2.23"}
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
AGENT = {
    "model": "scripted",
    "instructions": "x",
    "client_tools": [{"name": "f", "description": "x", "input_schema": {"type": "object"}}],
}


class World:
    """Things that exist, made anew once a request has deleted them."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        embedding = {"model_type": "embedding", "metadata": {"embedding_dimension": DIMENSIONS}}
        bare = {"model": "scripted", "instructions": "x", "client_tools": None}
        self._make("/v1/agents", {"agent_config": bare})
        self._make("/v1/models", {"model_id": "embed", "provider_id": "model-server", **embedding})
        self.renew()

    def _make(self, path: str, body: Any) -> Any:
        answer = self._http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def renew(self) -> None:
        agent = self._make("/v1/agents", {"agent_config": AGENT})["agent_id"]
        session = self._make(f"/v1/agents/{agent}/session", {"session_name": "s"})["session_id"]
        messages = [{"role": "user", "content": 'PART hm | CALL f {"a":1}'}]
        turn = self._make(f"/v1/agents/{agent}/session/{session}/turn", {"messages": messages})
        conversation = self._make("/v1/conversations", {"items": [{"role": "user", "content": "hi"}]})["id"]
        [item] = self._http.get(f"/v1/conversations/{conversation}/items").json()["data"]
        self.ids = {
            "agent_id": agent,
            "session_id": session,
            "turn_id": turn["turn_id"],
            "step_id": turn["steps"][0]["step_id"],
            "conversation_id": conversation,
            "item_id": item["id"],
            "response_id": self._make("/v1/responses", {"model": "scripted", "input": "SAY hi"})["id"],
        }

    def known(self, path_parameters: Any) -> dict[str, Any]:
        return {name: self.ids.get(name, given) for name, given in (path_parameters or {}).items()}

    def with_known_model(self, path: str, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        model = {"model": "embed" if path.endswith("/embeddings") else "scripted"}
        if isinstance(config := body.get("agent_config"), dict):
            return {**body, "agent_config": {**config, **model}}
        return {**body, **model} if isinstance(body.get("model"), str) else body


def ask(operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode, world: World | None, cases: int) -> int:
    """Sends so many requests, or as many as there are, and checks the answers; gives how many it sent."""
    sent = 0

    @settings(
        max_examples=cases,
        derandomize="RANDOMIZE" not in os.environ,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case[Any]) -> None:
        nonlocal sent
        sent += 1
        if world:
            case.path_parameters = world.known(case.path_parameters)
            case.body = world.with_known_model(operation.path, case.body)
        answer = case.call(timeout=SECONDS)
        if world and case.method == "DELETE" and answer.status_code < 300:
            world.renew()
        case.validate_response(answer, checks=CHECKS)
        if case.method == "GET":  # the shapes for older clients are not described, but they are no 5xx either
            assert case.call(headers=OLDER_CLIENT, timeout=SECONDS).status_code < 500

    check()
    return sent


def examine(url: str, each: int) -> tuple[int, list[str]]:
    """Sends each route up to three times so many requests; gives how many in all, and what was wrong."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.validate()
    sent, wrong = 0, []
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        world = World(http)
        for found in schema.get_all_operations():
            assert isinstance(found, Ok), found
            operation = found.ok()
            for mode, existing in [*((mode, world) for mode in MODES), (GenerationMode.POSITIVE, None)]:
                try:
                    sent += ask(operation, mode, existing, each)
                except Unsatisfiable:
                    continue  # it cannot be asked otherwise than described
                except (Failure, FailureGroup) as error:
                    wrong.append(f"{operation.label}, {mode.value}: {error}")
        # All that was made is also what older clients list.
        if (listed := http.get("/v1/agents?limit=1000", headers=OLDER_CLIENT)).status_code != 200:
            wrong.append(f"GET /v1/agents of an older client: {listed.text}")
    return sent, wrong


def main() -> None:
    sent, wrong = examine(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"sent": sent, "wrong": wrong}))


if __name__ == "__main__":
    main()

"""A worker is killed amid a response: it costs a step at most, and the stream goes on without a gap or a repeat."""

from __future__ import annotations

import json
import os
import signal
import threading
import uuid
from typing import Any

import httpx
from openai import OpenAI

from tests.acceptance.fire.system import System, requests_of
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.mcp_server import McpServer
from tests.support.scripted_model import ScriptedModel


class Reader(threading.Thread):
    """A client that reads a response's stream to its end; `heard` grows meanwhile."""

    def __init__(self, method: str, url: str, body: dict[str, Any] | None = None) -> None:
        super().__init__(daemon=True)
        self._request: dict[str, Any] = {"method": method, "url": url, "json": body}
        self.heard: list[dict[str, Any]] = []
        self.problem: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream(**self._request, timeout=PATIENCE_SECONDS) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.heard.append(json.loads(line.removeprefix("data: ")))
        except Exception as problem:
            self.problem = problem

    def wait_for(self, type_: str, count: int = 1) -> dict[str, Any]:
        """The last of so many events of this type."""
        wait_until(lambda: len(self.of(type_)) >= count or not self.is_alive(), PATIENCE_SECONDS)
        assert len(self.of(type_)) >= count, (self.problem, self.types)
        return self.of(type_)[-1]

    def of(self, type_: str) -> list[dict[str, Any]]:
        return [event for event in list(self.heard) if event["type"] == f"response.{type_}"]

    def ended(self) -> list[dict[str, Any]]:
        self.join(PATIENCE_SECONDS)
        assert not self.is_alive(), self.types
        if self.problem:
            raise self.problem
        return self.heard

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in list(self.heard)]


def owner(system: System, response_id: str) -> int:
    """The pid of the process that runs a response."""
    found = system.rows(
        "SELECT workers.name FROM turns JOIN workers USING (worker_id) WHERE turn_id = :id",
        id=response_id.removeprefix("resp_"),
    )
    return int(found[0]["name"].rpartition(":")[2])


def test_a_killed_worker_costs_a_step_of_a_response(system: System, model: ScriptedModel, mcp: McpServer) -> None:
    """Killed in the inference that follows a recorded tool call, and killed again amid a call that may have had an
    effect: neither model nor tool is asked again for what was recorded, numbers have no gap, output indexes of what was
    lost are not used again, and the response holds only what was recorded. Another web process tells the same."""
    key, gate, hold = (uuid.uuid4().hex for _ in range(3))
    count, order = f'CALL count {{"key": "{key}"}}', f'CALL order {{"key": "{key}", "hold": "{hold}"}}'
    script = f"{count} | PART half | HOLD {gate} | {order} | HISTORY"
    tool = {"type": "mcp", "server_label": "shop", "server_url": mcp.url}
    body = {"model": "scripted", "input": script, "tools": [tool], "stream": True, "background": True}
    reader = Reader("POST", f"{system.urls[0]}/v1/responses", body)
    response_id = reader.wait_for("created")["response"]["id"]

    reader.wait_for("output_text.delta")
    model.wait_held(gate, timeout=PATIENCE_SECONDS)
    os.kill(owner(system, response_id), signal.SIGKILL)
    wait_until(lambda: len(requests_of(model, script)) == 3, PATIENCE_SECONDS)
    system.start_workers("a", "b")  # one of them is gone
    model.release(gate)
    wait_until(lambda: len(mcp.calls()) == 2, PATIENCE_SECONDS)
    os.kill(owner(system, response_id), signal.SIGKILL)

    heard = reader.ended()
    final = heard[-1]["response"]
    assert heard[-1]["type"] == "response.completed", heard[-1]
    assert [event["sequence_number"] for event in heard] == list(range(len(heard)))
    assert len(requests_of(model, script)) == 4, "of the lost step alone the model was asked again"
    assert [call["tool"] for call in mcp.calls()] == ["count", "order"]
    added = [event["output_index"] for event in reader.of("output_item.added")]
    assert added == list(range(len(added)))
    kinds = [item["type"] for item in final["output"]]
    assert kinds == ["mcp_list_tools", "mcp_call", "message", "mcp_call", "message"]
    assert "outcome of this tool call is unknown" in final["output"][3]["error"]["content"][0]["text"]
    done = [event["item"] for event in reader.of("output_item.done")]
    assert len(done) == len(added), "OpenAI's SDK refuses an item that is begun and never done"
    [lost] = [item for item in done if item["id"] not in {kept["id"] for kept in final["output"]}]
    assert (lost["type"], lost["status"]) == ("message", "incomplete"), "the half message of the lost attempt"
    openai = OpenAI(base_url=f"{system.urls[1]}/v1", api_key="none")
    with openai.responses.stream(response_id=response_id) as stream:
        accumulated: Any = stream.get_final_response()
    assert [item.id for item in accumulated.output] == [item["id"] for item in final["output"]]

    told = json.loads(final["output"][-1]["content"][0]["text"])
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "assistant", "tool"]
    elsewhere = f"{system.urls[1]}/v1/responses/{response_id}"
    assert httpx.get(elsewhere, timeout=60).json() == final
    assert Reader("GET", f"{elsewhere}?stream=true").ended() == heard
    after = heard[len(heard) // 2]["sequence_number"]
    assert Reader("GET", f"{elsewhere}?stream=true&starting_after={after}").ended() == heard[after + 1 :]

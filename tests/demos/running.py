"""Programs as their users run them, and what became of the turns that they made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.compat.sdks import SDKS
from tests.support import ROOT

SEED_SDK = next(sdk for sdk in SDKS if sdk.name == "llama-stack-client-0.1.9")
PROGRAMS = Path(__file__).parent / "programs"
EXAMPLES = ROOT / "docs" / "examples"
PROGRAM_SECONDS = 600


@dataclass(frozen=True)
class Run:
    """What a program printed, and the turns of the agent that it made, in order."""

    output: str
    turns: list[dict[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [step for turn in self.turns for step in turn["steps"]]

    @property
    def calls(self) -> list[str]:
        """The names of the tools that were called, in order."""
        calls = [call for step in self.steps for call in step.get("tool_calls", ())]
        return [call["tool_name"] for call in calls]

    def responses(self, tool: str) -> str:
        """All that a tool answered, as JSON."""
        given = [response for step in self.steps for response in step.get("tool_responses", ())]
        return json.dumps([one["content"] for one in given if one["tool_name"] == tool], ensure_ascii=False)


def run_demo(name: str, url: str, documents: str, *options: str, env: Mapping[str, str]) -> Run:
    """A demo of the seed, with its SDK; `documents`: the URL of the folder that its documents are in."""
    address = httpx.URL(url)
    where = [address.host, str(address.port), f"--documents={documents}"]
    command = [str(SEED_SDK.home / "bin" / "python"), str(PROGRAMS / f"{name}.py"), *where, *options]
    return _run(url, command, env, PROGRAMS)


def run_example(name: str, url: str, *options: str, env: Mapping[str, str], folder: Path) -> Run:
    """One of docs/examples, in a folder that is not its own: what it saves is left there."""
    return _run(url, [sys.executable, str(EXAMPLES / f"{name}.py"), f"--url={url}", *options], env, folder)


def _run(url: str, command: Sequence[str], env: Mapping[str, str], folder: Path) -> Run:
    """Raises AssertionError: the program failed."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    ended = subprocess.run(
        command,
        env={**kept, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return Run(ended.stdout, _turns_of_newest_agent(url))


def _turns_of_newest_agent(url: str) -> list[dict[str, Any]]:
    with httpx.Client(base_url=url, timeout=60) as http:
        agent = http.get("/v1/agents", params={"limit": 1000}).raise_for_status().json()["data"][-1]["agent_id"]
        [session] = http.get(f"/v1/agents/{agent}/sessions").raise_for_status().json()["data"]
        path = f"/v1/agents/{agent}/session/{session['session_id']}"
        turns: list[dict[str, Any]] = http.get(path).raise_for_status().json()["turns"]
        for turn in turns:
            answer = http.get(f"{path}/turn/{turn['turn_id']}").raise_for_status()
            turn["status"], turn["worker"] = answer.headers["X-Turn-Status"], answer.headers["X-Caravan-Worker"]
        return turns

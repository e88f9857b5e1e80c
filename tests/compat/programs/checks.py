"""Runs the checks of a program in an SDK's own environment: only the standard library is imported here.

A check is a function without parameters, which passes by returning. Each is printed as a line of JSON,
`{"check", "ok", "error"}`; `ok` is null where the SDK lacks what the check is about. What the SDK prints goes to
standard error. The system under test is named by the environment: CARAVAN_URL, MCP_URL and MODEL_CONTROL_URL.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import json
import os
import sys
import threading
import time
import traceback
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CARAVAN_URL = os.environ["CARAVAN_URL"]
MCP_URL = os.environ["MCP_URL"]
MODEL = "meta-llama/Llama-3.2-3B-Instruct"
"""A model's id as the programs of that time have it, with a slash."""
EMBEDDING_MODEL = "embedder"
DIMENSIONS = 8
NOBODY = "00000000-0000-4000-8000-000000000000"
"""An id that names nothing."""
SECONDS = 60.0
"""The time limit of one check."""

Check = Callable[[], Any]
_checks: list[Check] = []


class Absent(Exception):
    """The SDK of this version lacks what the check is about."""


def check(function: Check) -> Check:
    """Registers a check, a coroutine function or not; its name is the row of the table."""
    _checks.append(function)
    return function


def needs(thing: Any, *path: str) -> Any:
    """The attribute at the end of the path; Absent if the SDK has none."""
    for name in path:
        if not hasattr(thing, name):
            raise Absent(f"the SDK has no {'.'.join(path)}")
        thing = getattr(thing, name)
    return thing


def user(text: str) -> list[Any]:
    """One message of the user's."""
    return [{"role": "user", "content": text}]


def unique(prefix: str) -> str:
    """A name that no other program and no earlier run has used."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def model_requests(marker: str) -> list[dict[str, Any]]:
    """What the model was asked, where the marker stood in a message: the bodies of its requests, in order."""
    with urllib.request.urlopen(f"{os.environ['MODEL_CONTROL_URL']}/requests") as answer:
        bodies = [record["body"] for record in json.load(answer)]
    return [body for body in bodies if marker in json.dumps(body["messages"])]


def wait_until(condition: Callable[[], Any]) -> Any:
    """What the condition gives as soon as that is true; a check's time limit is the limit here."""
    while not (value := condition()):
        time.sleep(0.05)
    return value


def expect(actual: Any, expected: Any) -> None:
    """AssertionError that shows both."""
    if actual != expected:
        raise AssertionError(f"{actual!r} is not {expected!r}")


def expect_in(part: Any, whole: Any) -> None:
    if part not in whole:
        raise AssertionError(f"{part!r} is not in {whole!r}")


@contextmanager
def raises(*errors: type[BaseException]) -> Iterator[list[Any]]:
    """Asserts that the block raises one of these errors, and puts it into the list."""
    caught: list[Any] = []
    try:
        yield caught
    except errors as error:
        caught.append(error)
    else:
        raise AssertionError(f"no {' or '.join(error.__name__ for error in errors)}")


def main() -> None:
    """Runs all checks, or those named on the command line, and ends the process, whatever still hangs."""
    results = sys.stdout
    sys.stdout = sys.stderr
    chosen = set(sys.argv[1:])
    for function in _checks:
        name = function.__name__
        if not chosen or name in chosen:
            print(json.dumps({"check": name, **_outcome(function)}), file=results, flush=True)
    os._exit(0)


def _outcome(function: Check) -> dict[str, Any]:
    finished: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: finished.append(_run(function)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    if finished:
        return finished[0]
    faulthandler.dump_traceback()
    return {"ok": False, "error": f"no end within {SECONDS:g} s"}


def _run(function: Check) -> dict[str, Any]:
    try:
        if inspect.iscoroutinefunction(function):
            asyncio.run(function())
        else:
            function()
    except Absent as error:
        return {"ok": None, "error": str(error)}
    except BaseException as error:
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"ok": True, "error": None}

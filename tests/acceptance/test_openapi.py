"""The server's description of itself is valid and true: schemathesis asks every route for whatever it describes.

Each run asks for the same, unless `RANDOMIZE=1` asks for other things than the last time.
"""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import pytest

from tests.acceptance.asker import World
from tests.acceptance.conftest import Caravan
from tests.support import ROOT
from tests.support.scripted_model import ScriptedModel

pytestmark = pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)

SIZES = [(2, 150), pytest.param(28, 2000, marks=[pytest.mark.thorough, pytest.mark.timeout(900)])]


@pytest.mark.parametrize(("each", "at_least"), SIZES)
def test_every_route_does_what_it_says(caravan: Caravan, model: ScriptedModel, each: int, at_least: int) -> None:
    command = [sys.executable, "-m", "tests.acceptance.asker", caravan.url, str(each)]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    report = json.loads(asked.stdout)
    assert not report["wrong"], "\n\n".join(report["wrong"])
    assert report["sent"] >= at_least


def test_every_body_has_an_example_that_works(caravan: Caravan, http: httpx.Client, model: ScriptedModel) -> None:
    world = World(http)
    described = http.get("/openapi.json").json()
    tried = 0
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            if "requestBody" not in operation:
                continue
            world.renew()
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            for example in described["components"]["schemas"][reference.rpartition("/")[2]]["examples"]:
                body = world.with_known_model(path, example)
                answer = http.request(method, path.format(**world.ids), json=body)
                # Which call it answers is different each time.
                expected = 400 if path.endswith("/resume") else 200
                assert answer.status_code == expected, (path, answer.text)
                tried += 1
    assert tried >= 10

"""Our engine and llama_stack 0.3.5's `ChatAgent` play the same scripts; the events and requests are compared."""

from __future__ import annotations

import pytest

from tasks.engine.attempt import Tools
from tests.conformance.deviations import DEVIATIONS
from tests.conformance.engines import Ours, Reference, play
from tests.conformance.scripts import SCRIPTS
from tests.conformance.transcripts import differences, kinds, normal
from tests.conformance.world import World
from tests.support.mcp_server import McpServer
from tests.support.scripted_model import ScriptedModel


@pytest.mark.parametrize("name", SCRIPTS)
async def test_our_engine_does_what_chat_agent_does(
    name: str, tools: Tools, world: World, model: ScriptedModel, mcp: McpServer
) -> None:
    """Event by event, request by request, tool call by tool call, but for the deviations that the script names."""
    script = SCRIPTS[name]
    theirs = World(model.url, mcp)
    reference = await play(Reference(script, theirs), script, theirs, model)
    await theirs.close()
    ours = await play(Ours(script, world, tools), script, world, model)
    expected = reference.copy()
    for deviation in script.deviations:
        before = expected.copy()
        DEVIATIONS[deviation].change(expected, ours)
        assert expected != before, f"ChatAgent does not differ any more: {deviation}"
    wanted, found = normal(expected), normal(ours)
    assert [kinds(leg) for leg in found.legs] == [kinds(leg) for leg in wanted.legs]
    wrong = differences([leg.events for leg in wanted.legs], [leg.events for leg in found.legs], "events")
    wrong += differences(wanted.requests, found.requests, "requests")
    wrong += differences(wanted.calls, found.calls, "calls")
    assert not wrong, "\n".join(wrong)


def test_every_deviation_shows_somewhere() -> None:
    """The table lists nothing that no script needs."""
    assert {deviation for script in SCRIPTS.values() for deviation in script.deviations} == set(DEVIATIONS)

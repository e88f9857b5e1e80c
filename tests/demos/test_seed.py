"""The seed's demos run: they make the calls that they are for, in the worker, and the SDK prints what came of them."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.demos.conftest import WORKERS_KEY, Installation
from tests.demos.running import Run
from tests.demos.scripts import DESCRIBE, HIGHEST, PLOT, python, search, web

Demo = Callable[..., Run]
KEY = {"TAVILY_SEARCH_API_KEY": "tvly-of-the-client"}


def test_document_turn(demo: Demo) -> None:
    """The README is fetched, chunked and found again."""
    script = f"{search('goals of Caravan')} | SAY It hosts agents."
    run = demo("document_turn", {"What is Caravan, and what are its goals?": script})
    assert run.calls == ["knowledge_search"]
    assert "tool_execution> Tool:knowledge_search Args:{'query': 'goals of Caravan'}" in run.output
    assert "A turn that was accepted is not lost" in run.output
    assert "inference> It hosts agents." in run.output


def test_hello(demo: Demo, installation: Installation) -> None:
    """The client's key reaches the search service."""
    script = f"{web('salt caravans Sahara towns')} | SAY From Timbuktu and Agadez."
    run = demo("hello", {"Hello": "SAY Hello, traveller!", "Search the web": script}, **KEY)
    assert "inference> Hello, traveller!" in run.output
    assert run.calls == ["web_search"]
    [search] = installation.search.searches()
    assert (search["query"], search["key"]) == ("salt caravans Sahara towns", "tvly-of-the-client")
    assert "What one says about salt caravans Sahara towns" in run.output
    assert "inference> From Timbuktu and Agadez." in run.output


def test_hello_without_a_key(demo: Demo) -> None:
    """The demo offers no search then."""
    run = demo("hello", {"Hello": "SAY Hello, traveller!", "Search the web": "TOOLS"})
    assert run.calls == []
    assert run.turns[-1]["output_message"]["content"] == ""


def test_inflation(demo: Demo) -> None:
    """Each call of a session finds the file that the first turn brought; the plot is an attachment of its turn."""
    scripts = {
        "can you describe it?": f"{DESCRIBE} | SAY Ten years.",
        "Which year ended": f"{HIGHEST} | SAY It was 2022.",
        "Which events led": "SAY Shortages.",
        "Plot the average": f"{PLOT} | SAY There it is.",
    }
    run = demo("inflation", scripts)
    assert run.calls == ["code_interpreter"] * 3
    assert "(10, 12)" in run.output
    assert "highest in 2022" in run.output
    assert "inference> There it is." in run.output
    [plot] = run.turns[-1]["output_attachments"]
    assert plot["mime_type"] == "image/png"


def test_podcast_transcript(demo: Demo, installation: Installation) -> None:
    """One agent searches its document, the web (with the worker's key), and computes, in the turns of one session."""
    scripts = {
        "can you summarize it": f"{search('slow freight')} | SAY They talk of salt.",
        "three topics": "SAY Salt, camels, money.",
        "'H100'": f"{search('H100 GPUs')} | SAY Eight of them, for a night.",
        "search the web": f"{web('salt caravans news')} | SAY They go on.",
        "meet again in a year": f"{python('print(40 * 2)')} | SAY Three questions.",
        "into Hindi": "SAY तीन प्रश्न",
    }
    run = demo("podcast_transcript", scripts, **KEY)
    assert run.calls == ["knowledge_search", "knowledge_search", "web_search", "code_interpreter"]
    assert "H100s" in run.responses("knowledge_search")
    assert "80" in run.responses("code_interpreter")
    assert [search["key"] for search in installation.search.searches()] == [WORKERS_KEY]
    assert "inference> तीन प्रश्न" in run.output


def test_rag_as_attachments(demo: Demo) -> None:
    """Without a tool the documents are in the context, of later turns as well."""
    scripts = {
        "I am attaching a handbook": "SAY Thank you for the handbook.",
        "Which topics": "HISTORY",
        "stars": "SAY The pole star shows the north.",
        "load a camel": "SAY Let it kneel.",
        "What about water": "SAY Five litres a day.",
    }
    run = demo("rag_as_attachments", scripts)
    assert run.calls == []
    assert "User> What about water?\ninference> Five litres a day." in run.output
    history = run.turns[1]["output_message"]["content"]
    assert "A dromedary has one hump" in history
    assert "the pole star shows the north" in history


def test_rag_with_vector_db(demo: Demo) -> None:
    """What the client inserted is found by the worker, which runs already."""
    scripts = {
        "Was anything related to stars": f"{search('pole star north')} | SAY The pole star.",
        "load a camel": f"{search('loading a camel')} | SAY Let it kneel.",
        "What about water": f"{search('water')} | SAY Five litres a day.",
    }
    run = demo("rag_with_vector_db", scripts)
    assert run.calls == ["knowledge_search"] * 3
    assert "the pole star shows the north" in run.responses("knowledge_search")
    assert "Make the camel kneel before you load it" in run.responses("knowledge_search")
    assert "inference> Five litres a day." in run.output


def test_react_agent(demo: Demo, installation: Installation) -> None:
    """The SDK finds actions in the model's JSON; it has the server search, and runs its own function."""
    scripts = {
        "Timbuktu": f"{thought(tool_name='web_search', query='food in Timbuktu')} | {answer('at the market')}",
        "Which model servers": f"{thought(tool_name='caravan', query='model servers')} | {answer('Ollama and others')}",
    }
    run = demo("react_agent", scripts, **KEY)
    assert '"answer": "at the market"' in run.output
    assert '"answer": "Ollama and others"' in run.output
    assert [search["query"] for search in installation.search.searches()] == ["food in Timbuktu"]
    observed = json.dumps([turn["input_messages"] for turn in run.turns])
    assert "every other model server that speaks OpenAI's API" in observed


def thought(tool_name: str, query: str) -> str:
    action = {"tool_name": tool_name, "tool_params": [{"name": "query", "value": query}]}
    return "SAY " + json.dumps({"thought": "I need to know more", "action": action, "answer": None})


def answer(text: str) -> str:
    return "SAY " + json.dumps({"thought": "I know enough", "action": None, "answer": text})

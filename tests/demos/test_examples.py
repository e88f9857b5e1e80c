"""Our examples run as they are printed in docs/examples, and show what their pages say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.demos.conftest import Installation
from tests.demos.running import EXAMPLES, Run
from tests.demos.scripts import DESCRIBE, HIGHEST, PLOT, python, search, web

Example = Callable[..., Run]
KEY = {"TAVILY_SEARCH_API_KEY": "tvly-of-the-client"}


def test_hello(example: Example, installation: Installation) -> None:
    run = example(
        "hello", {"Who are you?": "SAY A model.", "Silk Road": f"{web('Silk Road cities')} | SAY Many."}, **KEY
    )
    assert "User> Hello! Who are you?\nA model." in run.output
    assert '  calls web_search {"query": "Silk Road cities"}' in run.output
    assert run.calls == ["web_search"]
    assert [search["key"] for search in installation.search.searches()] == ["tvly-of-the-client"]


def test_document_turn(example: Example) -> None:
    run = example("document_turn", {"What is Caravan": f"{search('what Caravan is for')} | SAY For long turns."})
    assert run.calls == ["knowledge_search"]
    assert "Caravan hosts agents of the Llama Stack" in run.responses("knowledge_search")
    assert "For long turns." in run.output


def test_document_turn_with_a_url(example: Example, documents: str) -> None:
    """The worker fetches it."""
    script = {"What is Caravan": f"{search('salt')} | SAY About salt."}
    run = example("document_turn", script, f"--document={documents}/transcript.txt")
    assert "salt caravan" in run.responses("knowledge_search")


def test_rag_as_attachments(example: Example) -> None:
    scripts = {"What is it about": "SAY Camels.", "Only list them": "SAY Four.", "about water": "HISTORY"}
    run = example("rag_as_attachments", scripts | {"How is a camel": "SAY With care."})
    assert "Never pass a well" in run.turns[2]["output_message"]["content"]
    assert run.calls == []


def test_rag_with_vector_db(example: Example) -> None:
    scripts = {
        "How long can a camel": f"{search('camel without water')} | SAY A week.",
        "How is a camel loaded": f"{search('loading a camel')} | SAY Kneeling.",
        "find its way": f"{search('way at night')} | SAY By the pole star.",
    }
    run = example("rag_with_vector_db", scripts)
    assert "4 documents are in vs_" in run.output
    assert run.calls == ["knowledge_search"] * 3
    assert "after five to seven days" in run.responses("knowledge_search")


def test_inflation(example: Example, tmp_path: Path) -> None:
    """The plot that the code made is saved where the program runs."""
    scripts = {
        "Can you describe it?": f"{DESCRIBE} | SAY Ten years.",
        "Which year ended": f"{HIGHEST} | SAY It was 2022.",
        "What in an economy": "SAY Shortages.",
        "Plot the average": f"{PLOT} | SAY There it is.",
    }
    run = example("inflation", scripts)
    assert "code_interpreter answers: " in run.output
    assert "highest in 2022" in run.responses("code_interpreter")
    [plot] = tmp_path.iterdir()
    assert f"saved {plot.name}" in run.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_podcast_transcript(example: Example) -> None:
    scripts = {
        "Can you summarize it?": f"{search('slow freight')} | SAY They talk of salt.",
        "three topics": "SAY Salt, camels, money.",
        "about salt?": f"{search('salt')} | SAY A lot.",
        "Search the web": f"{web('salt caravans news')} | SAY They go on.",
        "meet again": f"{python('print(40 * 2)')} | SAY Three questions.",
        "in French": "SAY Trois questions.",
    }
    run = example("podcast_transcript", scripts, **KEY)
    assert run.calls == ["knowledge_search", "knowledge_search", "web_search", "code_interpreter"]
    assert "Trois questions." in run.output


def test_react_agent(example: Example) -> None:
    """One turn thinks, searches in the worker, asks this program, and answers."""
    scripts = {
        "Timbuktu": f"PART I look it up. | {web('food in Timbuktu')} | SAY At the market.",
        "Which model servers": 'PART The facts will tell. | CALL caravan_facts {"topic":"models"} | SAY Ollama, say.',
    }
    run = example("react_agent", scripts, **KEY)
    assert "I look it up. \n  calls web_search" in run.output
    assert "The facts will tell. \n  calls caravan_facts" in run.output
    assert run.calls == ["web_search", "caravan_facts"]
    assert "vLLM" in run.responses("caravan_facts")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_has_a_test_and_a_line_on_the_page(path: Path) -> None:
    assert path.name in (EXAMPLES / "README.md").read_text()
    assert path.stem == "talk" or f"test_{path.stem}" in globals()

"""react_agent: the SDK's ReActAgent, with the search of the web and a function of the client's own."""

import os
import uuid

from common import arguments, ask, first_model, sampling_params
from llama_stack_client import LlamaStackClient
from llama_stack_client.lib.agents.react.agent import ReActAgent
from llama_stack_client.lib.agents.react.tool_parser import ReActOutput


def caravan(query: str = "caravan") -> str:
    """
    Answers questions about Caravan.

    :param query: What to find out
    :returns: What is known of Caravan
    """
    return (
        "Caravan hosts agents. It asks Ollama, vLLM, llama.cpp and every other model server that speaks OpenAI's API."
    )


def main() -> None:
    given = arguments()
    client = LlamaStackClient(
        base_url=f"http://{given.host}:{given.port}",
        provider_data={"tavily_search_api_key": os.getenv("TAVILY_SEARCH_API_KEY")},
    )
    agent = ReActAgent(
        client=client,
        model=first_model(client),
        tools=["builtin::websearch", caravan],
        sampling_params=sampling_params(given),
        response_format={"type": "json_schema", "json_schema": ReActOutput.model_json_schema()},
    )
    session_id = agent.create_session(f"test-session-{uuid.uuid4().hex}")
    for prompt in ("What is the best place in Timbuktu for a meal at 2 am?", "Which model servers does Caravan ask?"):
        ask(agent, session_id, prompt)


if __name__ == "__main__":
    main()

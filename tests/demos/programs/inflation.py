"""inflation: a CSV, given by its URL, is described and plotted by code.

The demo's typo in the MIME type is kept. `tool_choice` stands in an AgentConfig: the Agent of this SDK takes none
beside it.
"""

import os

from common import arguments, ask, first_model, sampling_params, shields
from llama_stack_client import Agent, Document, LlamaStackClient
from llama_stack_client.types.agent_create_params import AgentConfig


def main() -> None:
    given = arguments()
    client = LlamaStackClient(base_url=f"http://{given.host}:{given.port}")
    available_shields = shields(client)
    websearch = ["builtin::websearch"] if os.getenv("TAVILY_SEARCH_API_KEY") else []
    agent = Agent(
        client,
        AgentConfig(
            model=first_model(client),
            sampling_params=sampling_params(given),
            instructions="You are a helpful assistant",
            toolgroups=[*websearch, "builtin::code_interpreter"],
            tool_choice="auto",
            tool_prompt_format="json",
            input_shields=available_shields,
            output_shields=available_shields,
            enable_session_persistence=False,
        ),
    )
    session_id = agent.create_session("test-session")
    print(f"Created session_id={session_id} for Agent({agent.agent_id})")
    prompts = [
        (
            "Here is a csv, can you describe it?",
            [Document(content=f"{given.documents}/inflation.csv", mime_type="test/csv")],
        ),
        ("Which year ended with the highest inflation?", None),
        ("Which events led to such a high inflation in that period?", None),
        ("Plot the average inflation of each year as a time series", None),
    ]
    for text, documents in prompts:
        ask(agent, session_id, text, documents)


if __name__ == "__main__":
    main()

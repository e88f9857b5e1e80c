"""hello: a greeting, then a question that takes a search of the web."""

import os

from common import arguments, ask, first_model, sampling_params, shields
from llama_stack_client import Agent, LlamaStackClient


def main() -> None:
    given = arguments()
    key = os.getenv("TAVILY_SEARCH_API_KEY")
    client = LlamaStackClient(
        base_url=f"http://{given.host}:{given.port}", provider_data={"tavily_search_api_key": key}
    )
    available_shields = shields(client)
    providers = [provider.provider_id for provider in client.providers.list() if provider.api == "inference"]
    print(f"Inference by: {providers}")
    agent = Agent(
        client,
        model=first_model(client),
        instructions="You are a helpful assistant",
        sampling_params=sampling_params(given),
        tools=["builtin::websearch"] if key else [],
        input_shields=available_shields,
        output_shields=available_shields,
        enable_session_persistence=False,
    )
    session_id = agent.create_session("test-session")
    for prompt in ("Hello", "Search the web for the towns that the salt caravans of the Sahara set out from"):
        ask(agent, session_id, prompt)


if __name__ == "__main__":
    main()

"""The seed's own first turn: a README, given by its URL, is asked about."""

from common import arguments, ask, first_model, sampling_params, shields
from llama_stack_client import Agent, Document, LlamaStackClient
from llama_stack_client.types.agent_create_params import AgentConfig


def main() -> None:
    given = arguments()
    client = LlamaStackClient(base_url=f"http://{given.host}:{given.port}")
    available_shields = shields(client)
    agent = Agent(
        client,
        AgentConfig(
            model=first_model(client),
            instructions="You are a helpful assistant",
            sampling_params=sampling_params(given),
            toolgroups=["builtin::rag"],
            tool_choice="auto",
            input_shields=available_shields,
            output_shields=available_shields,
            enable_session_persistence=False,
        ),
    )
    session_id = agent.create_session("test-session")
    print(f"Created session_id={session_id} for Agent({agent.agent_id})")
    readme = Document(content=f"{given.documents}/caravan.md", mime_type="text/plain")
    ask(agent, session_id, "What is Caravan, and what are its goals?", [readme])


if __name__ == "__main__":
    main()

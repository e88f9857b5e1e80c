"""rag_as_attachments: documents by their URLs, as objects with a `uri`, without any tool."""

from common import PAGES, arguments, ask, first_model, sampling_params, shields
from llama_stack_client import Agent, Document, LlamaStackClient


def main() -> None:
    given = arguments()
    attachments = [
        Document(content={"uri": f"{given.documents}/handbook/{page}"}, mime_type="text/plain") for page in PAGES
    ]
    client = LlamaStackClient(base_url=f"http://{given.host}:{given.port}")
    model = first_model(client)
    available_shields = shields(client)
    agent = Agent(
        client,
        model=model,
        instructions="You are a helpful assistant",
        sampling_params=sampling_params(given),
        tools=[],
        input_shields=available_shields,
        output_shields=available_shields,
    )
    session_id = agent.create_session("test-session")
    print(f"Created session_id={session_id} for Agent({agent.agent_id})")
    prompts = [
        ("I am attaching a handbook for leaders of caravans.", attachments),
        ("Which topics were explained? Only list succinct bullet points.", None),
        ("Was anything related to stars discussed, if so what?", None),
        ("Tell me how to load a camel", None),
        ("What about water?", None),
    ]
    for text, documents in prompts:
        ask(agent, session_id, text, documents)


if __name__ == "__main__":
    main()

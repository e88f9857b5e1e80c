"""podcast_transcript: six questions about a transcript that is given by its URL, with search, code and RAG at hand."""

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
            instructions="You are a helpful assistant",
            sampling_params=sampling_params(given),
            toolgroups=[*websearch, "builtin::code_interpreter", "builtin::rag"],
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
            "The attachment is the transcript of a podcast, can you summarize it",
            [Document(content=f"{given.documents}/transcript.txt", mime_type="text/plain")],
        ),
        ("What are the three topics that were discussed most?", None),
        ("Was anything related to 'H100' discussed?", None),
        ("Can you search the web for what happened with salt caravans since then?", None),
        ("If these people meet again in a year, what are three good questions to go on with?", None),
        ("Can you translate these questions into Hindi?", None),
    ]
    for text, documents in prompts:
        ask(agent, session_id, text, documents)


if __name__ == "__main__":
    main()

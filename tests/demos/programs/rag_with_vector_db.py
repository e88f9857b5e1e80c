"""rag_with_vector_db: a vector database is registered and filled from URLs; the agent's search is bound to it."""

from uuid import uuid4

from common import PAGES, arguments, ask, first_model, sampling_params, shields
from llama_stack_client import Agent, LlamaStackClient, RAGDocument


def main() -> None:
    given = arguments()
    documents = [
        RAGDocument(
            document_id=f"num-{number}",
            content=f"{given.documents}/handbook/{page}",
            mime_type="text/plain",
            metadata={},
        )
        for number, page in enumerate(PAGES)
    ]
    client = LlamaStackClient(base_url=f"http://{given.host}:{given.port}")
    model = first_model(client)
    vector_provider = next(provider for provider in client.providers.list() if provider.api == "vector_io")
    available_shields = shields(client)
    vector_db_id = f"test_vector_db_{uuid4()}"
    client.vector_dbs.register(
        vector_db_id=vector_db_id,
        embedding_model="all-MiniLM-L6-v2",
        embedding_dimension=384,
        provider_id=vector_provider.provider_id,
    )
    client.tool_runtime.rag_tool.insert(documents=documents, vector_db_id=vector_db_id, chunk_size_in_tokens=512)
    agent = Agent(
        client,
        model=model,
        instructions="You are a helpful assistant. Use the knowledge_search tool to find what answers a question.",
        sampling_params=sampling_params(given),
        tools=[{"name": "builtin::rag/knowledge_search", "args": {"vector_db_ids": [vector_db_id]}}],
        input_shields=available_shields,
        output_shields=available_shields,
    )
    session_id = agent.create_session("test-session")
    print(f"Created session_id={session_id} for Agent({agent.agent_id})")
    for prompt in (
        "Was anything related to stars discussed, if so what?",
        "Tell me how to load a camel",
        "What about water?",
    ):
        ask(agent, session_id, prompt)


if __name__ == "__main__":
    main()

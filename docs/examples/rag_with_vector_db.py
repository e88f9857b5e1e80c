"""A vector database of one's own, filled once and searched by the agent: `builtin::rag` on pgvector.

What this program inserts is found by the next turn on every worker.
"""

from uuid import uuid4

from talk import RESOURCES, Conversation, connect, options

chosen = options(__doc__)
client = connect(chosen.url)

embedding_model = next(model for model in client.models.list() if model.api_model_type == "embedding")
database = client.vector_stores.create(
    name=f"handbook-{uuid4()}", extra_body={"embedding_model": embedding_model.identifier}
)
pages = sorted((RESOURCES / "handbook").glob("*.md"))
client.tool_runtime.rag_tool.insert(
    documents=[
        {"document_id": page.stem, "content": page.read_text(), "mime_type": "text/markdown", "metadata": {}}
        for page in pages
    ],
    vector_db_id=database.id,
    chunk_size_in_tokens=512,
)
print(f"{len(pages)} documents are in {database.id}")

search = {"name": "builtin::rag/knowledge_search", "args": {"vector_db_ids": [database.id]}}
instructions = "Answer from what knowledge_search finds, briefly."
conversation = Conversation(client, chosen, instructions=instructions, toolgroups=[search])
conversation.ask("How long can a camel go without water?")
conversation.ask("How is a camel loaded?")
conversation.ask("How does a caravan find its way at night?")

client.vector_stores.delete(database.id)

"""A turn with a document: it is chunked, embedded, and searched by the model with `builtin::rag`.

The session's documents are in a vector database of its own, which is deleted with it.
"""

from talk import RESOURCES, Conversation, connect, document, options

chosen = options(__doc__, document=RESOURCES / "caravan.md")
conversation = Conversation(
    connect(chosen.url),
    chosen,
    instructions="Answer from the user's documents: search them with knowledge_search first.",
    toolgroups=["builtin::rag"],
)

conversation.ask("What is Caravan, and what is it for?", [document(chosen.document)])

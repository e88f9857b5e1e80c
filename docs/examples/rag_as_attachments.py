"""Documents in the context: without `builtin::rag` their text goes to the model with the question, and stays there."""

from talk import RESOURCES, Conversation, connect, document, options

chosen = options(__doc__)
conversation = Conversation(connect(chosen.url), chosen)

handbook = [document(page) for page in sorted((RESOURCES / "handbook").glob("*.md"))]
conversation.ask("I attach a handbook for leaders of caravans. What is it about?", handbook)
conversation.ask("Which topics does it explain? Only list them, briefly.")
conversation.ask("What does it say about water?")
conversation.ask("How is a camel loaded?")

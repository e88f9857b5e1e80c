"""A long text, all tools at once: the model may search it, compute with it, or look on the web."""

import os

from talk import RESOURCES, Conversation, connect, document, options

chosen = options(__doc__, document=RESOURCES / "transcript.txt")
client = connect(chosen.url, tavily_search_api_key=os.getenv("TAVILY_SEARCH_API_KEY"))
conversation = Conversation(
    client, chosen, toolgroups=["builtin::rag", "builtin::code_interpreter", "builtin::websearch"]
)

conversation.ask("Here is the transcript of a podcast. Can you summarize it?", [document(chosen.document)])
conversation.ask("What are the three topics that are discussed most?")
conversation.ask("Do they say anything about salt?")
conversation.ask("Search the web for what has happened with salt caravans since then.")
conversation.ask("If they meet again in a year, what are three good questions to go on with?")
conversation.ask("Can you say these in French?")

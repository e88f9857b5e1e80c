"""Hello, and a search of the web: `builtin::websearch`, run by the worker.

The key of the search service comes with the request (TAVILY_SEARCH_API_KEY in this program's environment), or is the
worker's. Without any, the tool says so, and the model goes on.
"""

import os

from talk import Conversation, connect, options

chosen = options(__doc__)
client = connect(chosen.url, tavily_search_api_key=os.getenv("TAVILY_SEARCH_API_KEY"))
conversation = Conversation(client, chosen, toolgroups=["builtin::websearch"])

conversation.ask("Hello! Who are you?")
conversation.ask("Search the web: which cities did the Silk Road connect?")

"""Think, act, observe: an agent with a tool of the worker's and one of this program's.

The search runs in the worker. A call of `caravan_facts` ends the leg instead: this program runs the function, and
resumes the turn with what it says.
"""

import json
import os

from talk import Conversation, connect, options

FACTS = {
    "models": "Caravan asks any model server that speaks OpenAI's API: Ollama, vLLM, llama.cpp and many more.",
    "storage": "Caravan keeps its turns in Postgres; Redis only rings the bell and carries live events.",
}


def caravan_facts(topic: str) -> str:
    """What is known of a topic, or which topics there are."""
    return FACTS.get(topic, f"Nothing is known of that, but of: {', '.join(FACTS)}")


TOOL = {
    "name": "caravan_facts",
    "description": "Facts about Caravan, the host of agents.",
    "input_schema": {
        "type": "object",
        "properties": {"topic": {"type": "string", "enum": list(FACTS)}},
        "required": ["topic"],
    },
}
INSTRUCTIONS = """\
Work in steps. In each, say in one sentence what you need to know (the thought), then call the one tool that tells it
(the action), and read what it says (the observation). When you know enough, answer."""

chosen = options(__doc__)
client = connect(chosen.url, tavily_search_api_key=os.getenv("TAVILY_SEARCH_API_KEY"))
conversation = Conversation(
    client, chosen, instructions=INSTRUCTIONS, toolgroups=["builtin::websearch"], client_tools=[TOOL]
)

for question in ("Where in Timbuktu does one eat well at night?", "Which model servers can Caravan ask?"):
    turn = conversation.ask(question)
    while calls := [call for call in turn.output_message.tool_calls or () if call.tool_name == "caravan_facts"]:
        turn = conversation.answer(
            turn,
            [
                {
                    "call_id": call.call_id,
                    "tool_name": call.tool_name,
                    "content": caravan_facts(**json.loads(call.arguments)),
                }
                for call in calls
            ],
        )

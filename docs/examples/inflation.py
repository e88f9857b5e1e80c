"""Data analysis: the model writes Python, and `builtin::code_interpreter` runs it in the worker's sandbox.

The attached CSV is a file there; files that the code leaves, such as the plot, come back as attachments of the turn.
"""

from pathlib import Path
from urllib.parse import unquote

import httpx

from talk import RESOURCES, Conversation, connect, document, options

chosen = options(__doc__, document=RESOURCES / "inflation.csv")
client = connect(chosen.url)
conversation = Conversation(client, chosen, toolgroups=["builtin::code_interpreter"])

conversation.ask("Here is a CSV file. Can you describe it?", [document(chosen.document)])
conversation.ask("Which year ended with the highest inflation?")
conversation.ask("What in an economy leads to such a high inflation?")
turn = conversation.ask("Plot the average inflation of each year.")

for attachment in turn.output_attachments or ():
    path = attachment.content.uri
    file = Path(f"{turn.turn_id[:8]}-{Path(unquote(path)).name}")
    file.write_bytes(client.get(path, cast_to=httpx.Response).content)
    print(f"saved {file}")
if not turn.output_attachments:
    print("the model made no plot")

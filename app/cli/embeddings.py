"""`caravan embeddings`."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.errors import needs_local_extra


def embeddings(
    port: Annotated[int, typer.Option(help="Port; EMBEDDING_URL looks at 8322.", min=1, max=65535)] = 8322,
    host: Annotated[str, typer.Option(help="Address to listen on. Nobody is asked for a key.")] = "127.0.0.1",
) -> None:
    """Serve all-MiniLM-L6-v2 on the CPU: what EMBEDDING_URL names by default. Ctrl-C stops it."""
    with needs_local_extra():
        from app.local.embeddings import serve

        serve(port, host)

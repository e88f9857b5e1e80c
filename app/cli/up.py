"""`caravan up`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from app.cli.errors import CommandError, needs_local_extra


def up(
    data: Annotated[
        Path | None, typer.Option(help="Folder for all data; made if missing.", show_default=".caravan")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the API.", min=1, max=65535)] = 8321,
    flower_port: Annotated[int, typer.Option(help="Port of Flower.", min=1, max=65535)] = 5555,
    no_flower: Annotated[bool, typer.Option("--no-flower", help="Without Flower.")] = False,
    model_url: Annotated[
        str | None,
        typer.Option(help="Your own OpenAI-compatible server, with /v1; else a small local model.", show_default=False),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model id of --model-url; may be repeated. Else all that it lists.", show_default=False),
    ] = None,
    embedding_url: Annotated[
        str | None,
        typer.Option(help="Your own OpenAI-compatible embeddings server; else a small local one.", show_default=False),
    ] = None,
    embedding_model: Annotated[
        str | None, typer.Option(help="The model id of --embedding-url.", show_default=False)
    ] = None,
    embedding_dimension: Annotated[int, typer.Option(help="Numbers in a vector of --embedding-model.", min=1)] = 384,
    pool: Annotated[
        Literal["turns", "prefork"], typer.Option(help="The worker's pool: one event loop, or a process per turn.")
    ] = "turns",
) -> None:
    """Start everything on this machine, for development: Valkey, Postgres, small models, web, worker, Flower.

    Ctrl-C stops all of it. The next start goes on with the same data.
    """
    with needs_local_extra():
        from app.local import up as local

    if model and not model_url:
        raise CommandError("--model names a model of your own server: give its --model-url as well")
    if bool(embedding_url) != bool(embedding_model):
        raise CommandError("--embedding-url and --embedding-model belong together: give both, or none")
    own = {} if not embedding_model else {"embedding_model": embedding_model}
    local.up(
        local.Options(
            data=data or local.default_folder(),
            port=port,
            flower_port=None if no_flower else flower_port,
            model_url=model_url,
            models=model or [],
            embedding_url=embedding_url,
            embedding_dimension=embedding_dimension,
            pool=pool,
            **own,
        )
    )

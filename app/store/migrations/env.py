"""Alembic's environment: the connection comes from `app.store.migrate`, never from a file."""

from alembic import context

from app.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    compare_type=True,
    compare_server_default=True,
    # The mounted Llama Stack keeps its tables in the same database; they are its own.
    include_name=lambda name, type_, parents: type_ != "table" or name in metadata.tables,
)
with context.begin_transaction():
    context.run_migrations()

"""The only SQLAlchemy: tables, queries, claim, fence, upkeep's queries, migrations.

Knows nothing of Redis. Every method is synchronous (psycopg2) and one transaction; an async caller goes through
`Store.run`, whose threads are as many as the pool has connections.
"""

from sqlalchemy import Connection

from app.store.store import Store

__all__ = ["Connection", "Store"]

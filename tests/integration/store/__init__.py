"""The store against a real Postgres: its queries, its races, its plans."""

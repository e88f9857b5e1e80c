"""The event log against a real Valkey: writer, log, followers, and their outages."""

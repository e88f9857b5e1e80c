"""Pure: agents, sessions, turns and their state machine, the decision what a turn does next, events and ids, errors.

Nothing here reads a clock, a socket or a database. llama_stack's types may be imported; its APIs may not.
"""

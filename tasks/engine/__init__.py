"""One attempt at a turn: decide, do, record, until the leg ends.

`app.domain.decide` decides; `inference` and `tools` do; `attempt` records. Behaviour follows llama_stack's `ChatAgent`,
whose deviations `tests/conformance` lists.
"""

"""The one room in which Caravan translates between 0.3.5's shapes, which the core speaks, and other clients' own.

What is stored and logged is 0.3.5's, whoever asks. Each difference is one small function that names the versions it
serves. A client's version decides only where old and new readers conflict (`dialect`); everywhere else one answer
serves all. No client is refused for its version.

Modules: `version` (of a client), `dialect` (agents routes), `tool_calls`, `parameters`, `agents` (their parts),
`resume` (of a turn that has ended), `response_events`, `paths` (older paths of routes), `forward` (one route answers
with another's answer), and by noun the routes that are there for other clients: `models`, `tools`, `vectors`,
`inference`.
"""

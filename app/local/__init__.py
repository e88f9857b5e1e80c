"""Everything that `caravan up`, the demo and the tests embed instead of servers: no Docker, nothing installed beside.

`server` starts one process so that it dies with us, `valkey`, `postgres`, `model` (behind `front`: `constrained`,
`bounded`), `embeddings` (of `minilm`) and `program` say which ones, `supervisor` runs several together, `up` and `demo`
are the two commands made of them. Production uses none of this but `embeddings`, and nothing here knows a turn: the
parts get their settings by the environment, as in production.
"""

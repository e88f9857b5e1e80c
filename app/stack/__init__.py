"""The Llama Stack library as Caravan uses it: its configuration, our providers for it, and its routes for mounting.

Belongs here: everything that knows how llama_stack 0.3.5 is configured, started, patched and stopped. The web process
mounts it (`mounted`), a worker uses it as a library (`tasks.stack`). Does not belong here: the agents API, ours.

Modules: `config` (settings → StackRunConfig), `provider` (the provider specs that llama_stack asks for), `inference`,
`chunks`, `vector_io`, `vector_index`, `vector_dbs`, `retrieval` (those providers), `fetching`, `extraction`,
`reading`, `pieces` (documents, from a URL to embeddings), `files` (its answers), `postgres` (connections), `library`
(start and stop, every patched internal), `registry` (models, caches), `mounted` (the ASGI application).
"""

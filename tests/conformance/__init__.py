"""Our engine beside llama_stack 0.3.5's `ChatAgent`: the same scripts, event by event; and how an attempt recovers."""

import pytest

# The package `tasks` reads its settings when it is imported; nothing here uses them.
with pytest.MonkeyPatch.context() as _environment:
    _environment.setenv("DATABASE_URL", "postgresql://unused")
    _environment.setenv("INFERENCE_MODEL", "scripted")
    import tasks as tasks

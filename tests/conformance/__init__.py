"""Our engine beside llama_stack 0.3.5's `ChatAgent`: the same scripts, event by event; and how an attempt recovers."""

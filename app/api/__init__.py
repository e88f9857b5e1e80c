"""The agents routes by noun; errors to statuses; Server-Sent Events.

Both prefixes, `/v1` and `/v1alpha`, serve the same agents, in llama-stack 0.3.5's shapes.
"""

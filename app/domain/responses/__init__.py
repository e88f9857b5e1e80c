"""OpenAI's Responses as turns: what is stored of one, what it does next, what the model is told, what clients see.

Source: OpenAI's API reference for Responses, and `llama_stack.apis.agents.openai_responses` of llama_stack 0.3.5.
"""

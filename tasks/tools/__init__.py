"""Tools of our own that run in a worker, and what they run in: the code interpreter and its sandbox.

`inside` is the code that runs in the sandbox: it knows the standard library and nothing else.
"""

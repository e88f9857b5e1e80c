"""Benchmarks: Caravan beside llama-stack's own server, in one run, on the same cores, with the same model script.

`python -m tests.benchmarks` (or `make bench`) prints ratios and writes them into docs/benchmarks.md. Here belongs what
starts the two systems, loads them, reads their processes and reports; nothing here asserts a time.
"""

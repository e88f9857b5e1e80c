"""A run in which everything dies at random while clients go on: what was accepted arrives, once.

python -m tests.acceptance.chaos --help
"""

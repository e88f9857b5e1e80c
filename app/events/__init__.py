"""The only redis-py: the event log of a turn, its writer and its followers.

Redis holds what is live: the tail of each turn's log and the channel it is published on. All of it may be lost at any
time; Postgres has what is recorded.
"""

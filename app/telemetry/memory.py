"""The garbage collector of a process whose modules and models stay for good."""

import gc


def settle_memory() -> None:
    """Takes what has been loaded so far out of every collection; to be called once a process is up.

    With the Llama Stack loaded, full collections of its 100 MB took a third of a busy worker's time
    (docs/benchmarks.md). What a turn makes is mostly freed by reference counting, so collections can be rarer as well.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)

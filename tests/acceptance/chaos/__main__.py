"""`make chaos`: a long run, and its table."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.acceptance.chaos.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.chaos", description="Kills everything, often.")
    parser.add_argument("--seed", type=int, help="of an earlier run, to see the same order of failures")
    parser.add_argument("--rounds", type=int, default=6, help="of one failure of each kind (about 40 s each)")
    parser.add_argument("--clients", type=int, default=12, help="at once, each with a session of its own")
    chosen = parser.parse_args()
    seed = chosen.seed if chosen.seed is not None else random.randrange(1_000_000)
    with tempfile.TemporaryDirectory(prefix="caravan-chaos-") as directory:
        Path(directory).chmod(0o755)
        report = run(Path(directory), seed=seed, rounds=chosen.rounds, clients=chosen.clients)
    print(report.table())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())

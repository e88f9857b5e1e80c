"""`python -m tests.compat`: runs SDKs against a Caravan, and compares what works with docs/compatibility.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.local.postgres import Postgres
from app.store import migrate
from tests.compat.running import System, run_sdk, run_sdks, running_system
from tests.compat.sdks import SDKS, Sdk, install
from tests.compat.table import differences, read_results, write_results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    names = [sdk.name for sdk in SDKS]
    parser.add_argument("--write", action="store_true", help="write the table anew, instead of comparing")
    parser.add_argument(
        "--sdk", action="append", metavar="NAME", choices=names, help=f"only this one: {', '.join(names)}"
    )
    parser.add_argument("--show", action="store_true", help="only print what comes out, and why")
    parser.add_argument("--check", action="append", default=[], help="with --show: only this check")
    parser.add_argument("--url", help="a Caravan that runs already, whose model is a tests.support.scripted_model")
    parser.add_argument("--model-url", default="http://127.0.0.1:9100/v1", help="with --url: that model")
    parser.add_argument("--mcp-url", default="http://127.0.0.1:9200/mcp", help="with --url: a tests.support.mcp_server")
    return parser.parse_args()


def main() -> int:
    options = parse()
    sdks = [sdk for sdk in SDKS if not options.sdk or sdk.name in options.sdk]
    install(sdks)
    running = System(options.url, options.model_url, options.mcp_url) if options.url else None
    with own_system(running) as system:
        if options.show:
            return show(sdks, system, options.check)
        results = run_sdks(sdks, system)
    if options.write:
        write_results(results)
        return 0
    found = differences(results, read_results())
    print("\n".join(found) or "as committed")
    return 1 if found else 0


@contextmanager
def own_system(running: System | None) -> Iterator[System]:
    """The one that runs already, or one started for this run."""
    if running:
        yield running
        return
    with tempfile.TemporaryDirectory(prefix="caravan-compat-") as directory:
        folder = Path(directory)
        with Postgres(folder / "postgres", fsync=False) as postgres:
            migrate.upgrade(postgres.url)
            with running_system(postgres.url, folder) as system:
                yield system


def show(sdks: Sequence[Sdk], system: System, checks: Sequence[str]) -> int:
    """Prints each outcome; tracebacks go to standard error."""
    failed = 0
    for sdk in sdks:
        for program, outcomes in run_sdk(sdk, system, checks, stderr=sys.stderr.fileno()).items():
            print(f"{sdk.title}, {program}")
            for check, outcome in outcomes.items():
                print(f"  {check:32} {outcome}")
                failed += outcome.startswith("fails")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

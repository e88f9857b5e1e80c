"""`python -m tasks.tools`: tries the sandbox of the code interpreter on this machine, as this user.

`caravan doctor` runs it so, because the commands know nothing of the worker's code.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from app.settings import settings_or_exit
from tasks.tools.sandbox import Limits, Sandbox, Unsandboxed


async def main() -> None:
    """Prints that it holds, or with status 1 why there is none."""
    logging.disable()  # what is wrong is printed
    try:
        await Sandbox(Limits.of(settings_or_exit()), 1).trial()
    except Unsandboxed as missing:
        sys.exit(str(missing))
    sys.stdout.write("bubblewrap's holds, as tried with this user\n")


if __name__ == "__main__":
    asyncio.run(main())

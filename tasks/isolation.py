"""Turns that may have crashed their workers run in a process of their own: `python -m tasks.alone <turn id>`."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

logger = logging.getLogger(__name__)

AT_ONCE = 2
"""Each is a Python with a Llama Stack: a worker that lost hundreds of turns must not start hundreds."""


class OwnProcesses:
    """Starts one process for each turn, a few at once; the others wait in line. For use on one loop."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="own-process")
        self._turns: set[str] = set()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    async def run(self, turn_id: str, wanted: Callable[[], Awaitable[bool]]) -> str | None:
        """Runs a turn and waits for it; `wanted`: whether it still wants a process when its place in line has come.

        Gives how it went. None: it was not started, or ended before it claimed the turn.
        """
        if turn_id in self._turns:
            return None
        self._turns.add(turn_id)
        try:
            async with self._places:
                if self._stopping or not await wanted():
                    return None
                return await self._start(turn_id)
        finally:
            self._turns.discard(turn_id)

    def stop(self, number: signal.Signals) -> None:
        """Signals all: SIGTERM hands their turns over at the end of a step, SIGQUIT at once. No other is started."""
        self._stopping = True
        for process in self._processes:
            process.send_signal(number)
        for _ in self._turns:
            self._places.release()

    async def _start(self, turn_id: str) -> str | None:
        # Its standard input ends with this process, however that ends: then it hands its turn over.
        command = [sys.executable, "-m", "tasks.alone", turn_id]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: ASYNC220, S603
        self._processes.add(process)
        logger.info("runs in a process of its own, %d", process.pid)
        try:
            outcome, status = await asyncio.get_running_loop().run_in_executor(self._threads, _wait, process)
        finally:
            self._processes.discard(process)
        logger.log(
            logging.WARNING if status else logging.INFO,
            "its own process %d ended (%s): %s",
            process.pid,
            signal.Signals(-status).name if status < 0 else f"status {status}",
            outcome or "no outcome",
        )
        return outcome or (None if self._stopping else "its own process died")


def _wait(process: subprocess.Popen[bytes]) -> tuple[str, int]:
    """(What it says of the turn, its exit status)."""
    with process:
        assert process.stdout is not None
        said = process.stdout.read().decode()
        return said.strip(), process.wait()

"""Every line of a process is in the one form that LOG_FORMAT names."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import logging, uvicorn
from app.telemetry import configure_logging
uvicorn.Config("app:main", access_log={access_log})
configure_logging("INFO", "json")
logging.getLogger("uvicorn.error").info("Uvicorn running")
logging.getLogger("uvicorn.access").info("%s %d", "GET", 200)
"""


def lines(access_log: bool) -> tuple[list[str], str]:
    """(the messages on standard error, what is on standard output)"""
    program = PROGRAM.format(access_log=access_log)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line)["message"] for line in ran.stderr.splitlines()], ran.stdout


def test_uvicorns_lines_are_as_ours() -> None:
    """Also its access log, unless that is switched off."""
    assert lines(access_log=True) == (["Uvicorn running", "GET 200"], "")
    assert lines(access_log=False) == (["Uvicorn running"], "")

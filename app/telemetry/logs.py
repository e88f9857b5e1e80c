"""Logging of both processes: to stderr, as text or JSON lines, each with the id of the turn it is about."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

_MCP_SESSIONS = "mcp/shared/session.py"
_turn: ContextVar[str] = ContextVar("turn", default="-")


@contextmanager
def turn_context(turn_id: str) -> Iterator[None]:
    """Every line logged inside names this turn."""
    token = _turn.set(turn_id)
    try:
        yield
    finally:
        _turn.reset(token)


class _TurnFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "turn"):
            record.turn = _turn.get()
        return True


def _is_no_message_of_mcp(record: logging.LogRecord) -> bool:
    """`mcp` shows messages that it cannot read by the root logger. A server may have put a key of its caller there."""
    return record.name != "root" or not record.pathname.endswith(_MCP_SESSIONS)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "turn": getattr(record, "turn", "-"),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str, form: str) -> None:
    """Sets up the root logger; libraries speak up from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_TurnFilter())
    handler.addFilter(_is_no_message_of_mcp)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s [turn %(turn)s] %(message)s")
    handler.setFormatter(_JsonFormatter() if form == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.access"):  # it has set up its own before it loads us
        logger = logging.getLogger(name)
        if logger.handlers:  # not with --no-access-log
            logger.handlers.clear()
            logger.propagate = True
    for name in ("httpx", "httpcore", "openai", "asyncio", "alembic", "llama_stack"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it shows what servers send, and callers hear what went wrong

"""Logs: one line each, with the turn that they are about. No secret and no prompt is ever logged."""

from app.telemetry.logs import configure_logging, turn_context
from app.telemetry.memory import settle_memory

__all__ = ["configure_logging", "settle_memory", "turn_context"]

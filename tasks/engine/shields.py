"""An agent's shields: whether its guards let the last message of a conversation pass.

Nothing passes by a guard's failure: where one cannot be asked, gives no answer in time, or answers what is no verdict,
the turn fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from llama_stack.apis.inference import Message
from llama_stack.apis.safety import Safety, SafetyViolation, ViolationLevel

from app.domain.errors import TurnFailure

logger = logging.getLogger(__name__)


async def run(
    safety: Safety | None, shields: Sequence[str], messages: Sequence[Message], limit_seconds: float
) -> SafetyViolation | None:
    """Asks all shields at once; the violation that the first of them found. None: every one lets the message pass.

    Raises TurnFailure, if one could not be asked and none found a violation.
    """
    if safety is None:
        message = f"Shield {shields[0]} cannot be asked: this server's Llama Stack has no safety API."
        raise TurnFailure("shield_error", message)
    asked = [_ask(safety, shield, messages, limit_seconds) for shield in shields]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for answer in sorted(answers, key=lambda answer: isinstance(answer, BaseException)):
        if isinstance(answer, BaseException):
            raise answer
        if answer is not None:
            return answer
    return None


async def _ask(
    safety: Safety, shield: str, messages: Sequence[Message], limit_seconds: float
) -> SafetyViolation | None:
    try:
        async with asyncio.timeout(limit_seconds) as taken:
            violation = (await safety.run_shield(shield_id=shield, messages=list(messages), params={})).violation
    except Exception as error:
        logger.warning("shield %s failed: %s", shield, error)
        if taken.expired():
            message = f"Shield {shield} did not answer within {limit_seconds:g} s (MODEL_CALL_TIMEOUT_SECONDS)."
            raise TurnFailure("shield_error", message) from error
        raise _failure(shield, error) from error
    if violation is not None and violation.violation_level != ViolationLevel.ERROR:
        logger.warning("shield %s lets pass: %s", shield, violation.metadata)
        return None
    return violation


def _failure(shield: str, error: Exception) -> TurnFailure:
    status = getattr(error, "status_code", None)
    told = str(error) or type(error).__name__
    return TurnFailure("shield_error", f"Shield {shield} failed: {told}", status if isinstance(status, int) else None)

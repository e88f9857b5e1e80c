"""Hears which running turns are to be cancelled. What it misses, the worker learns with its next renewal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError

from app.events.log import CANCEL_CHANNEL, EventLog

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
PING_SECONDS = 5.0
"""A connection that gives no sign for twice as long is taken for dead, and made anew."""


async def hear_cancellations(log: EventLog, on_cancel: Callable[[str], object]) -> None:
    """Calls `on_cancel` with each turn id, until it is cancelled itself; outlives every outage of Redis."""
    heard = True
    while True:
        try:
            async with contextlib.aclosing(log.subscriber.pubsub()) as pubsub:
                await pubsub.subscribe(CANCEL_CHANNEL)
                if not heard:
                    logger.info("cancellations are heard again")
                heard = True
                await _hear(pubsub, on_cancel)
        except (RedisError, OSError, TimeoutError) as error:
            if heard:
                logger.warning("cancellations are not heard (REDIS_URL), they come with the lease: %s", error)
            heard = False
        except Exception:
            logger.exception("cancellations are not heard, trying again")
        await asyncio.sleep(RETRY_SECONDS)


async def _hear(pubsub: Any, on_cancel: Callable[[str], object]) -> None:
    """Raises TimeoutError: the connection is dead."""
    asked = False
    while True:
        try:
            message = await asyncio.wait_for(pubsub.get_message(timeout=None), PING_SECONDS)
        except TimeoutError:
            if asked:
                raise
            await pubsub.ping()
            asked = True
            continue
        asked = False
        if message is not None and message["type"] == "message":
            on_cancel(message["data"])

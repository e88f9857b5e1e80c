"""The one pub/sub connection of a process: kept alive, watched, and made anew after each loss."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
CONNECT_SECONDS = 5.0
OWN_CHANNEL = "caravan:relay"
"""Always subscribed, so that the connection is one for subscriptions before anything is followed."""


class Subscriber:
    """Subscribed to what `names` gives, whatever happens to Redis.

    `on_message` is called for each message, with its `type`, `channel` and `data`: also for a confirmed subscription.
    `on_lost` is called when the connection is lost: whatever is published from there on, until a subscription is
    confirmed again, is missed.
    A read on a silent connection never times out, so every `probe_seconds` a ping asks for a sign of life. Two without
    an answer, and the connection is given up: a Redis that hangs, or that vanished without a word. `meanwhile` says in
    the log what happens without Redis.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        names: Callable[[], Iterable[str]],
        *,
        on_message: Callable[[dict[str, Any]], None],
        on_lost: Callable[[], None],
        probe_seconds: float,
        meanwhile: str,
    ) -> None:
        self._client = client
        self._names = names
        self._on_message = on_message
        self._on_lost = on_lost
        self._probe_seconds = probe_seconds
        self._meanwhile = meanwhile
        self._pubsub: Any = None
        self._heard = 0
        self._given_up = asyncio.timeout(None)
        self._live = True

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            pubsub = self._client.pubsub()
            try:
                await self._listen(pubsub)
            except (RedisError, OSError, TimeoutError) as error:
                if self._live:
                    reason = str(error) or "it does not answer"
                    logger.warning("Redis is not available (REDIS_URL), %s: %s", self._meanwhile, reason)
                self._live = False
            except Exception:
                logger.exception("the subscriber failed, and subscribes anew")
            finally:
                self._pubsub = None
                with contextlib.suppress(Exception):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py has no annotation there
            self._on_lost()
            await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self, pubsub: Any) -> None:
        async with asyncio.timeout(CONNECT_SECONDS):
            asked = set(self._names())
            await pubsub.subscribe(OWN_CHANNEL, *asked)
            self._pubsub = pubsub
            await pubsub.subscribe(*(set(self._names()) - asked), OWN_CHANNEL)
        probing = asyncio.create_task(self._probe(pubsub), name="subscriber probe")
        try:
            async with asyncio.timeout(None) as self._given_up:
                while True:
                    message = await pubsub.get_message(timeout=None)
                    if message is not None:
                        self._heard += 1
                        self._take(message)
        finally:
            probing.cancel()

    def _take(self, message: dict[str, Any]) -> None:
        if not self._live:
            self._live = True
            logger.info("Redis is available again")
        self._on_message(message)

    async def _probe(self, pubsub: Any) -> None:
        unanswered = 0
        while True:
            heard = self._heard
            with contextlib.suppress(RedisError, OSError):
                await pubsub.ping()
            await asyncio.sleep(self._probe_seconds)
            unanswered = 0 if self._heard > heard else unanswered + 1
            if unanswered == 2:
                self._given_up.reschedule(asyncio.get_running_loop().time())

    async def subscribe(self, name: str) -> None:
        """Asks for one more, if there is a connection; without one, `names` is asked when there is."""
        if self._pubsub is not None:
            with contextlib.suppress(RedisError, OSError):
                await self._pubsub.subscribe(name)

    async def unsubscribe(self, name: str) -> None:
        if self._pubsub is not None:
            with contextlib.suppress(RedisError, OSError):
                await self._pubsub.unsubscribe(name)

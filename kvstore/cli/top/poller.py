"""Asks a daemon for its statistics again and again, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvstore.errors import KVStoreError
from kvstore.protocol.statistics import DaemonStats
from kvstore_client import AsyncClient

__all__ = ["Lost", "Poller", "Seen"]

_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A snapshot.

    Attributes:
        stats: what the daemon said.
        at_s: when, on a clock that never goes back.
        took_s: from question to answer.
    """

    stats: DaemonStats
    at_s: float
    took_s: float


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer.

    Attributes:
        reason: one line.
        at_s: when that was clear.
    """

    reason: str
    at_s: float


class Poller:
    """One connection, opened anew when it is lost. It never ends and never raises by itself: cancel ``run``.

    Args:
        endpoint: the daemon's, or None for the usual one.
        interval_s: from one question to the next; may be set at any time.
        timeout_s: how long an answer may take.
        tell: is called with what was seen, on the loop.

    Raises:
        InvalidArgument: ``endpoint`` is none.
    """

    def __init__(
        self, endpoint: str | None, *, interval_s: float, timeout_s: float, tell: Callable[[Seen | Lost], None]
    ) -> None:
        self.endpoint = self._client(endpoint, timeout_s).endpoint
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._tell = tell
        self._changed = asyncio.Event()

    @property
    def interval_s(self) -> float:
        """Seconds from one question to the next."""
        return self._interval_s

    @interval_s.setter
    def interval_s(self, seconds: float) -> None:
        self._interval_s = seconds
        self._changed.set()

    @staticmethod
    def _client(endpoint: str | None, timeout_s: float) -> AsyncClient:
        # Nothing is read but statistics: no memory is mapped, and nothing has to be compiled.
        return AsyncClient(endpoint, mapped=False, timeout=timeout_s)

    async def configure(self, **names: str) -> None:
        """Change policies of the daemon, as ``Client.configure`` does, and look at it at once.

        Raises:
            KVStoreError: nothing was changed.
        """
        async with self._client(self.endpoint, self._timeout_s) as client:
            await client.configure(**names)
        self._changed.set()

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            try:
                async with self._client(self.endpoint, self._timeout_s) as client:
                    await self._ask(client)
            except KVStoreError as error:
                self._tell(Lost(" ".join(str(error).split()), time.monotonic()))
            await self._wait(min(self._interval_s, _RETRY_S))

    async def _ask(self, client: AsyncClient) -> None:
        due_s = time.monotonic()
        while True:
            asked_s = time.monotonic()
            stats = await client.stats()
            now_s = time.monotonic()
            self._tell(Seen(stats, now_s, now_s - asked_s))
            # Where answers take longer than the interval, questions that are overdue are left out.
            due_s = max(due_s + self._interval_s, now_s)
            if await self._wait(due_s - now_s):
                due_s = time.monotonic()

    async def _wait(self, seconds: float) -> bool:
        """Whether the interval was changed before it was over."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
            return True
        return False

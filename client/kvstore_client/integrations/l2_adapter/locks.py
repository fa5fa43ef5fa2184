"""Leases by key: what a lookup locked stays until it is unlocked, key by key, or its time is over."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.protocol.keys import BlockKey
from kvstore_client.client import Match

__all__ = ["Locks"]


@dataclass(slots=True)
class _Lease:
    match: Match
    expires: float
    left: int


class Locks:
    """Which leases hold which keys. Thread-safe; asks nobody.

    A lease covers a run of keys; it can be given back when the last of them is unlocked. A key may be locked several
    times, and is unlocked as often, the oldest lock first.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._of_key: dict[BlockKey, deque[_Lease]] = {}
        self._by_time: deque[tuple[_Lease, list[BlockKey]]] = deque()

    def __len__(self) -> int:
        with self._lock:
            return len(self._of_key)

    def take(self, keys: Sequence[BlockKey], match: Match) -> None:
        """Remember that a match's lease holds keys."""
        if not keys or not match.lease:
            return
        with self._lock:
            self._forget_expired()
            lease = _Lease(match, self._clock() + match.lease_s, len(keys))
            for key in keys:
                self._of_key.setdefault(key, deque()).append(lease)
            self._by_time.append((lease, list(keys)))

    def unlock(self, keys: Sequence[BlockKey]) -> list[Match]:
        """Unlock keys; leases that hold none any more, to be given back. Keys that are not locked are ignored."""
        ended: list[Match] = []
        with self._lock:
            self._forget_expired()
            for key in keys:
                leases = self._of_key.get(key)
                if not leases:
                    continue
                lease = leases.popleft()
                if not leases:
                    del self._of_key[key]
                lease.left -= 1
                if not lease.left:
                    ended.append(lease.match)
        return ended

    def request(self, key: BlockKey) -> int | None:
        """The engine request in which a key was locked, for the reads that follow."""
        with self._lock:
            leases = self._of_key.get(key)
            return leases[0].match.request if leases else None

    def _forget_expired(self) -> None:
        """Leases end at the daemon by their time; those all of whose keys were unlocked are forgotten with it."""
        now = self._clock()
        while self._by_time and (self._by_time[0][0].expires <= now or not self._by_time[0][0].left):
            lease, keys = self._by_time.popleft()
            if not lease.left:
                continue
            for key in keys:
                leases = self._of_key.get(key)
                if leases and lease in leases:
                    leases.remove(lease)
                    if not leases:
                        del self._of_key[key]

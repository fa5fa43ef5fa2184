"""Payloads on their way to clients: their slots are pinned, and bytes are bounded for each client."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import zmq

from kvstore.server.executor import Executor

_POLL_S: Final = 0.005


@dataclass(slots=True)
class _Transfer:
    tracker: zmq.MessageTracker
    session: int
    slots: list[int]
    payload_bytes: int


class Outbound:
    """Zero-copy replies that libzmq has not yet finished with.

    Args:
        executor: holds the pins.
        bytes_per_session: limit of bytes on their way to one client.
        call_later: the loop's; transfers are looked at every few milliseconds while there are any.
    """

    def __init__(
        self, executor: Executor, bytes_per_session: int, call_later: Callable[[float, Callable[[], None]], object]
    ) -> None:
        self._executor = executor
        self._limit = bytes_per_session
        self._call_later = call_later
        self._polling = False
        self._transfers: deque[_Transfer] = deque()
        self._bytes: Counter[int] = Counter()
        self.total_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._transfers)

    def room(self, session: int) -> int:
        """Bytes that may still be sent to a client before it reads some."""
        return self._limit - self._bytes[session]

    def bytes_of(self, session: int) -> int:
        """Bytes on their way to a client."""
        return self._bytes[session]

    def add(self, tracker: zmq.MessageTracker, session: int, slots: list[int], payload_bytes: int) -> None:
        """Note a reply whose slots were pinned by the caller."""
        if tracker.done:
            self._executor.unpin(slots)
            return
        self._transfers.append(_Transfer(tracker, session, slots, payload_bytes))
        self._bytes[session] += payload_bytes
        self.total_bytes += payload_bytes
        if not self._polling:
            self._polling = True
            self._call_later(_POLL_S, self._poll_again)

    def _poll_again(self) -> None:
        self.poll()
        self._polling = bool(self._transfers)
        if self._polling:
            self._call_later(_POLL_S, self._poll_again)

    def poll(self) -> None:
        """Let go of the slots of finished transfers."""
        for _ in range(len(self._transfers)):
            transfer = self._transfers.popleft()
            if not transfer.tracker.done:
                self._transfers.append(transfer)
                continue
            self._executor.unpin(transfer.slots)
            self.total_bytes -= transfer.payload_bytes
            self._bytes[transfer.session] -= transfer.payload_bytes
            if not self._bytes[transfer.session]:
                del self._bytes[transfer.session]

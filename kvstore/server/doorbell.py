"""When rings are looked at: on the doorbell, then every millisecond while commits keep coming, then not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from kvstore.mapped.ring import lower_bells, waiting
from kvstore.observability.logs import RepeatedLog
from kvstore.server.lanes import Lanes
from kvstore.server.mapped_client import MappedClient
from kvstore.server.rings import WHOLE_RING, Rings
from kvstore.tiers.files import Doorbell

_POLL_S: Final = 0.001
_QUIET_POLLS: Final = 4
"""Looks in vain before the daemon sleeps again."""


class Attention:
    """Drains rings when there is something in them, and sleeps otherwise.

    Args:
        bell: what clients ring.
        rings, lanes: what is done then.
        loop: where it happens.
        clock: nanoseconds, monotonic.
        log: for what goes wrong.
        on_broken: called with a client whose ring is none; it should be ended.
    """

    def __init__(
        self,
        bell: Doorbell,
        rings: Rings,
        lanes: Lanes,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], int],
        log: RepeatedLog,
        on_broken: Callable[[MappedClient], None],
    ) -> None:
        self._bell = bell
        self._rings = rings
        self._lanes = lanes
        self._loop = loop
        self._clock = clock
        self._log = log
        self._on_broken = on_broken
        self._clients: list[MappedClient] = []
        self._heads = self._ready = np.zeros(0, np.int64)
        self._heads_at = self._ready_at = 0
        self._polling: asyncio.TimerHandle | None = None
        self._quiet = 0
        loop.add_reader(bell.fd, self._rung)

    def watch(self, clients: Iterable[MappedClient]) -> None:
        """Say whose rings there are."""
        self._clients = list(clients)
        count = len(self._clients)
        self._heads = np.zeros(2 * count, np.int64)
        self._heads_at = int(self._heads.ctypes.data)
        self._ready = np.zeros(count, np.int64)
        self._ready_at = int(self._ready.ctypes.data)
        for position, client in enumerate(self._clients):
            client.position = position
            self._heads[2 * position], self._heads[2 * position + 1] = client.address, client.consumed

    def drain(self, client: MappedClient, batches: int = WHOLE_RING) -> None:
        """Carry out what waits in one client's ring, or some of it, and lend the client new slots."""
        before = client.consumed
        self._rings.drain(client, batches)
        if client.consumed != before:
            client.session.last_ns = self._clock()
            self._heads[2 * client.position + 1] = client.consumed
        if client.broken:
            self._on_broken(client)

    def drain_all(self) -> int:
        """Carry out some of what waits in each ring; how many rings had something in them.

        A batch of each at a time: one client that reads in a tight loop must not keep the others waiting.
        """
        count: int = waiting(self._heads_at, len(self._clients), self._ready_at)
        if count:
            # A client that is ended meanwhile changes the list of all.
            for client in [self._clients[position] for position in self._ready[:count].tolist()]:
                self.drain(client, 1)
        return count

    def _rung(self) -> None:
        self._bell.silence()
        self._quiet = 0
        if self._polling is None:
            self._poll()

    def _poll(self) -> None:
        self._polling = None
        try:
            self._quiet = 0 if self.drain_all() else self._quiet + 1
        except Exception as error:
            # A defect of ours, and loud; without further polls this client's commits would wait for the next tick.
            self._log.log_every(5, "poll", "error", "ring_failed", error=repr(error), exc_info=error)
        if self._quiet >= _QUIET_POLLS:
            self._quiet = 0
            # The doorbell's other half: bells down, a full fence, one more look (``kvstore.mapped.ring.advance``).
            if not lower_bells(self._heads_at, len(self._clients)):
                return
        self._polling = self._loop.call_later(_POLL_S, self._poll)

    def rest(self) -> None:
        """Lower all bells while nobody polls, in case that one was left up by a client that died ringing it."""
        if self._polling is None and lower_bells(self._heads_at, len(self._clients)):
            self._polling = self._loop.call_later(_POLL_S, self._poll)

    def stop(self) -> None:
        """Look no more."""
        self._loop.remove_reader(self._bell.fd)
        if self._polling is not None:
            self._polling.cancel()
            self._polling = None

"""Slots lent to mapped clients ahead of their puts, so that a put needs no round trip.

A client asks for a lane once for each size that it writes (``Reserve``); from then on as many slots are kept lent as it
needed so far, within its bytes. Slots in a lane that the client has not taken can be had back at any moment: when it
idles, and when others are short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from kvstore.core.block import Record
from kvstore.core.events import GrantsReturned, SlotWanted
from kvstore.core.instructions import Refuse
from kvstore.mapped.client_file import LANE_GRANTS
from kvstore.mapped.grants import offer, offered, revoke
from kvstore.server.executor import Executor
from kvstore.server.mapped_client import Lane, MappedClient

_FIRST_BYTES: Final = 4 << 20
"""Bytes of slots that a new lane begins with; each time the client finds it empty it doubles."""

_AHEAD_SHARE: Final = 0.75
"""Of a client's bytes and of all granted bytes, what may be lent ahead: puts over ZeroMQ find the rest."""


class Lanes:
    """Lends slots ahead.

    Args:
        executor: asks the store for slots.
        clients: all mapped clients.
    """

    def __init__(self, executor: Executor, clients: Callable[[], Iterable[MappedClient]]) -> None:
        self._executor = executor
        self._store = executor.store
        self._clients = clients
        self._slots = np.zeros(LANE_GRANTS, np.int64)
        self._slots_at = int(self._slots.ctypes.data)

    def reserve(self, client: MappedClient, number: int, wanted: SlotWanted) -> Lane | Refuse:
        """Make a lane serve records of a size, with at least one slot in it; or say why there is none.

        The client names a lane again when it found it empty: it then gets more. Room is made for the one slot only, so
        that nothing leaves for slots that may not be used, or for blocks behind the one that was asked for.
        """
        lane = client.lanes[number]
        slot_bytes = self._store.slot_bytes_for(wanted.record_bytes)
        if lane.slot_bytes != slot_bytes:
            self._take_back(client, number)
            lane.slot_bytes, lane.target = slot_bytes, self._bounded(_FIRST_BYTES // max(slot_bytes, 1), slot_bytes)
        elif not lane.lent or lane.lent >= lane.target:
            lane.target = self._bounded(lane.target * 2, slot_bytes)
        if lane.lent and offered(client.address, number):
            # It was filled since the client looked: by what was carried out before this request.
            return lane
        granted = self._executor.want_slot(wanted)
        if isinstance(granted, Refuse) and self.take_back_idle(client):
            granted = self._executor.want_slot(wanted)
        if isinstance(granted, Refuse):
            return granted
        if granted.slot_bytes != slot_bytes or not self._lend(client, number, [granted]):
            self._executor.apply(GrantsReturned(client.session.id, (granted.slot,)))
        self.replenish(client)
        return lane

    def _bounded(self, target: int, slot_bytes: int) -> int:
        room = int(self._store.limits.grant_bytes_per_session * _AHEAD_SHARE) // slot_bytes
        return max(min(target, room, LANE_GRANTS), 1)

    def replenish(self, client: MappedClient) -> None:
        """Lend slots until every lane has what it should, as far as that costs nobody anything."""
        for number, lane in enumerate(client.lanes):
            missing = lane.target - lane.lent
            if missing <= 0 or not lane.slot_bytes:
                continue
            count = min(missing, self._room_bytes(client) // lane.slot_bytes)
            records = self._executor.slots_ahead(client.session.id, lane.slot_bytes, count)
            if records:
                kept = self._lend(client, number, records)
                if kept < len(records):
                    rest = tuple(record.slot for record in records[kept:])
                    self._executor.apply(GrantsReturned(client.session.id, rest))

    def _room_bytes(self, client: MappedClient) -> int:
        """Bytes that may still be lent ahead to a client."""
        store = self._store
        own = store.limits.grant_bytes_per_session * _AHEAD_SHARE - store.sessions[client.session.id].granted_bytes
        return max(int(min(own, store.limits.grant_bytes * _AHEAD_SHARE - store.granted_bytes)), 0)

    def _lend(self, client: MappedClient, number: int, records: list[Record]) -> int:
        """Put slots into a lane; how many it took."""
        lane = client.lanes[number]
        count = len(records)
        self._slots[:count] = [record.slot for record in records]
        head = offer(client.address, number, lane.head, lane.slot_bytes, self._slots_at, count)
        kept = head - lane.head
        lane.head = head
        lane.lent += kept
        for record in records[:kept]:
            client.lane_of[record.slot] = number
        return kept

    def _take_back(self, client: MappedClient, number: int) -> int:
        """Have back what the client has not taken out of a lane; how many slots."""
        count = revoke(client.address, number, self._slots_at)
        # The client could have written anything there: only what was lent counts, and once.
        found = dict.fromkeys(self._slots[:count].tolist())
        slots = [slot for slot in found if client.lane_of.get(slot) == number]
        for slot in slots:
            del client.lane_of[slot]
        client.lanes[number].lent -= len(slots)
        if slots:
            self._executor.apply(GrantsReturned(client.session.id, tuple(slots)))
        return len(slots)

    def take_back(self, client: MappedClient) -> None:
        """Have all slots back that a client was lent and did not take out of its lanes."""
        for number, lane in enumerate(client.lanes):
            lane.target = 0
            if lane.lent:
                self._take_back(client, number)

    def take_back_idle(self, wanting: MappedClient | None = None) -> int:
        """Have slots back from all lanes but those of the client that wants some; how many."""
        return sum(
            self._take_back(client, number)
            for client in self._clients()
            if client is not wanting
            for number, lane in enumerate(client.lanes)
            if lane.lent
        )

    def age(self) -> None:
        """Called now and then: lanes that nothing was committed from since the last call give their slots back."""
        for client in self._clients():
            for number, lane in enumerate(client.lanes):
                if lane.lent and not lane.used:
                    self._take_back(client, number)
                    lane.target = 1
                lane.used = False

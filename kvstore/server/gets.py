"""Gets over ZeroMQ: records go out from where they lie; their slots stay pinned until libzmq is done with them."""

from __future__ import annotations

from kvstore.core.block import Block, Record, runs_of
from kvstore.core.events import Accessed, FoundCorrupt
from kvstore.core.ssd_record import SsdBlock
from kvstore.errors import CorruptRecord
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.observability.logs import RepeatedLog
from kvstore.protocol.keys import split_keys
from kvstore.protocol.messages import Get, GetReply, GetStatus, TierId
from kvstore.protocol.version import TIERS_SINCE
from kvstore.server.counters import RequestCounters
from kvstore.server.executor import Executor
from kvstore.server.outbound import Outbound
from kvstore.server.sessions import Session


class Reads:
    """The read path of clients that receive their payloads.

    Args:
        verify_every: check the checksum of every n-th record read; 0 for none.
    """

    def __init__(
        self, executor: Executor, outbound: Outbound, counters: RequestCounters, verify_every: int, log: RepeatedLog
    ) -> None:
        self._executor = executor
        self._outbound = outbound
        self._counters = counters
        self._verify_every = verify_every
        self._reads = 0
        self._log = log

    def get(
        self, session: Session, request: Get, incarnation: int
    ) -> tuple[GetReply, list[memoryview], list[int], int, Accessed]:
        """Look records up.

        Returns:
            The reply; one payload frame for each hit; their slots, which are pinned; their bytes; the access report.
        """
        store = self._executor.store
        keys = split_keys(request.keys)
        statuses = bytearray(len(keys))
        payloads: list[memoryview] = []
        slots: list[int] = []
        blocks = []
        missing = []
        room = self._outbound.room(session.id)
        polled = False
        total = 0
        for index, key in enumerate(keys):
            record = store.find(request.namespace_id, key, request.part)
            if record is None or not self._sound(record):
                if session.protocol >= TIERS_SINCE and self._waits_below(request, key):
                    # It is there, and DRAM had no room for it in time.
                    statuses[index] = GetStatus.THROTTLED
                else:
                    missing.append(key)
                continue
            if total + record.record_bytes > room and (total or self._outbound.bytes_of(session.id)):
                if not polled:
                    polled = True
                    self._outbound.poll()
                    room = self._outbound.room(session.id)
                if total + record.record_bytes > room and (total or self._outbound.bytes_of(session.id)):
                    statuses[index] = GetStatus.THROTTLED
                    continue
            total += record.record_bytes
            statuses[index] = GetStatus.HIT
            payloads.append(self._executor.arena.record(record.slot, record.record_bytes))
            slots.append(record.slot)
            # At once: verifying a later key may withdraw this very record, if it was asked for twice.
            self._executor.pin([record.slot])
            assert record.block is not None
            blocks.append(record.block)
        counters = self._counters
        counters.gets += 1
        counters.get_keys += len(keys)
        counters.get_hits += len(payloads)
        counters.get_throttled += statuses.count(GetStatus.THROTTLED)
        counters.bytes_out += total - RECORD_HEADER_BYTES * len(payloads)
        report = Accessed(session.id, request.access, runs_of(blocks), len(keys), tuple(missing), request.namespace_id)
        return GetReply(request.id, incarnation, bytes(statuses)), payloads, slots, total, report

    def exists(self, namespace_id: int, keys: list[bytes], *, below: bool) -> tuple[bytes, bytes]:
        """Where blocks are complete, and how good they are; ``below``: tiers below DRAM count. Is no access."""
        namespace = self._executor.store.namespaces.by_id.get(namespace_id)
        tiers, fidelities = bytearray(len(keys)), bytearray(len(keys))
        if namespace is not None:
            for index, key in enumerate(keys):
                block = namespace.blocks.get(key)
                found: Block | SsdBlock | None = block if block is not None and block.complete else None
                if found is None and below:
                    found = namespace.below(key)
                if found is not None:
                    tiers[index] = TierId.DRAM if found is block else TierId.SSD
                    fidelities[index] = min(record.fidelity for record in found.parts.values())
        return bytes(tiers), bytes(fidelities)

    def _waits_below(self, request: Get, key: bytes) -> bool:
        namespace = self._executor.store.namespaces.by_id.get(request.namespace_id)
        return (
            namespace is not None and namespace.ssd is not None and namespace.ssd.stored(key, request.part) is not None
        )

    def _sound(self, record: Record) -> bool:
        """Verify by policy; a record that is not what was committed leaves the store and is a miss."""
        if not self._verify_every:
            return True
        self._reads += 1
        return bool(self._reads % self._verify_every) or self.check(record)

    def check(self, record: Record) -> bool:
        """Verify a resident record now; one that is not what was committed leaves the store."""
        block = record.block
        assert block is not None
        try:
            self._executor.arena.verify(record.slot, record.slot_bytes, record.record_bytes, block.key, record.part)
        except CorruptRecord as error:
            self._log.log_every(
                1, "corrupt_record", "error", "corrupt_record", block=block.key.hex(), part=record.part, why=str(error)
            )
            self._executor.apply(FoundCorrupt(record.slot, str(error)))
            return False
        return True

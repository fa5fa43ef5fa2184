"""What mapped clients say through their rings: commits, returned grants, access reports.

A ring is drained when its client rings the doorbell, before each ZeroMQ request of its client (so that a ``remove``
cannot overtake a ``put``), before anybody's request makes room, and once a second. Nothing read from a client's memory
is believed: records are copied out, then checked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

import numpy as np

from kvstore.core.block import Block, Record
from kvstore.core.events import Accessed, Committed, CommittedRecord, GrantsReturned
from kvstore.core.instructions import Answer
from kvstore.errors import CorruptRecord
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import decode_header
from kvstore.mapped.client_file import MAX_MISSING, RING_RECORD_BYTES, RING_RECORDS, RingKind
from kvstore.mapped.ring import consume, take
from kvstore.observability.logs import RepeatedLog
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.server.counters import RequestCounters
from kvstore.server.executor import Executor
from kvstore.server.mapped_client import MappedClient

_BATCH: Final = 64
"""Records taken at once. After each batch new slots are lent, with which a client goes on meanwhile."""
_COMMITS: Final = 64
"""Most commits of one event: so much may the tier be over its capacity before what has to leave for them left."""
_RECORD: Final = struct.Struct("<BBBxHHIIqqQqqq")
"""A ring record: kind, continuations, named keys, part, namespace, asked or bytes, hits, slot, sequence, access, time,
payload bytes, whether it belongs to the report before it."""
assert _RECORD.size == RING_RECORD_BYTES

_COMMIT: Final = int(RingKind.COMMIT)
_RETURN: Final = int(RingKind.RETURN)
_MATCH: Final = int(RingKind.MATCH)
_GET: Final = int(RingKind.GET)
_SUSPECT: Final = int(RingKind.SUSPECT)
_MAX_CONTINUATIONS: Final = MAX_MISSING // 2
WHOLE_RING: Final = 2 * (RING_RECORDS // (_BATCH - _MAX_CONTINUATIONS) + 1)
"""Batches of a full ring. Each may end before a report that is not all in it, with which the next one begins."""

_SUSPECTS: Final = 16
"""Records that are verified for one client between two ticks: each costs as long as reading it takes."""


class Rings:
    """Carries out what stands in the rings.

    Args:
        executor: carries the store's instructions out.
        counters: of the request path.
        log: for what a client did wrong.
        on_corrupt: called with the slot of a record that a client found corrupt; verifies it and drops it if it is.
        on_commits: called with a client whose commits were carried out.
    """

    def __init__(
        self,
        executor: Executor,
        counters: RequestCounters,
        log: RepeatedLog,
        on_corrupt: Callable[[Record], bool],
        on_commits: Callable[[MappedClient], None],
    ) -> None:
        self._executor = executor
        self._store = executor.store
        self._counters = counters
        self._log = log
        self._on_corrupt = on_corrupt
        self._on_commits = on_commits
        self._taken = np.zeros(_BATCH * RING_RECORD_BYTES // 8, np.int64)
        self._headers = np.zeros(_BATCH * RECORD_HEADER_BYTES // 8, np.int64)
        self._taken_at = int(self._taken.ctypes.data)
        self._headers_at = int(self._headers.ctypes.data)
        self._taken_bytes = self._taken.data.cast("B")
        self._header_bytes = self._headers.data.cast("B")

    def drain(self, client: MappedClient, batches: int = WHOLE_RING) -> int:
        """Carry out what waits in a client's ring, or the first batches of it; how many commits there were.

        What it writes meanwhile is left for the next time, so that one that never stops does not keep others waiting.
        ``client.broken`` is set where the ring cannot be one; its session should end then.
        """
        commits = 0
        arena = self._executor.arena
        for _ in range(batches):
            count = take(
                client.address,
                client.consumed,
                self._taken_at,
                _BATCH,
                arena.address,
                arena.header.arena_bytes,
                self._headers_at,
            )
            if count <= 0:
                if count < 0:
                    self._give_up(client, "its ring's head is impossible")
                break
            done, committed = self._carry_out(client, count)
            commits += committed
            if not done:
                break  # A report whose continuations are not all here: an honest client publishes them together.
            client.consumed += done
            consume(client.address, client.consumed)
            if committed:
                self._on_commits(client)
            if count < _BATCH or client.broken:
                break
        return commits

    def _give_up(self, client: MappedClient, why: str) -> None:
        client.broken = True
        self._log.log_every(5, "ring", "error", "ring_refused", pid=client.session.pid, why=why)

    def _carry_out(self, client: MappedClient, count: int) -> tuple[int, int]:
        """Records dealt with, and the commits among them."""
        unpack, taken = _RECORD.unpack_from, self._taken_bytes
        pending: list[tuple[int, CommittedRecord]] = []
        pending_for = (0, 0)
        commits = 0
        index = 0
        begun = 0
        report: _Report | None = None
        while index < count:
            kind, following, named, part, namespace, asked, hits, slot, sequence, access, _, nbytes, later = unpack(
                taken, index * RING_RECORD_BYTES
            )
            if pending and (kind != _COMMIT or (namespace, access) != pending_for or len(pending) == _COMMITS):
                self._commit(client, pending_for, pending)
                pending = []
            if report is not None and not (kind == _GET and later and report.kind == _GET):
                self._report(client, report)
                report = None
            if kind == _COMMIT:
                commits += 1
                commit = self._committed(client, index, namespace, slot)
                number = client.consumed + index
                if commit is None:
                    client.answer(number, PutStatus.REJECTED, Reason.BAD_RECORD)
                    self._counters.rejected += 1
                    self._counters.reasons[Reason.BAD_RECORD.name.lower()] += 1
                else:
                    pending.append((number, commit))
                    pending_for = (namespace, access)
            elif kind in (_MATCH, _GET):
                if following > _MAX_CONTINUATIONS or named > 2 * following:
                    self._give_up(client, "a report names more keys than it may")
                    return index, commits
                if index + 1 + following > count:
                    if index == 0:
                        self._give_up(client, "a report ends before its keys")
                    return index, commits
                if report is None:
                    begin = (index + 1) * RING_RECORD_BYTES
                    keys = bytes(taken[begin : begin + 32 * named])
                    missing = tuple(keys[at : at + 32] for at in range(0, len(keys), 32))
                    begun = index
                    report = _Report(kind, namespace, part, access, asked, missing, requests=0 if later else 1)
                report.add(self._block_of(slot, sequence, namespace) if hits else None, hits, nbytes)
                index += following
            elif kind == _RETURN:
                client.forget_grant(slot)
                self._executor.apply(GrantsReturned(client.session.id, (slot,)))
            elif kind == _SUSPECT:
                self._suspect(client, slot, sequence)
            else:
                self._give_up(client, f"record of unknown kind {kind}")
                return index, commits
            index += 1
        if pending:
            self._commit(client, pending_for, pending)
        if report is not None:
            if index == _BATCH and begun and report.kind == _GET and len(report.missing) == MAX_MISSING:
                # Only with all its hits it says how many it missed.
                return begun, commits
            self._report(client, report)
        return index, commits

    # -------------------------------------------------------------- commits

    def _committed(self, client: MappedClient, index: int, namespace: int, slot: int) -> CommittedRecord | None:
        """What the header in a committed slot says; None where it is no header, or the namespace not the client's."""
        begin = index * RECORD_HEADER_BYTES
        client.forget_grant(slot)
        if namespace not in client.session.namespaces:
            self._executor.apply(GrantsReturned(client.session.id, (slot,)))
            return None
        try:
            header = decode_header(bytes(self._header_bytes[begin : begin + RECORD_HEADER_BYTES]))
        except CorruptRecord:
            self._executor.apply(GrantsReturned(client.session.id, (slot,)))
            return None
        return CommittedRecord(
            slot,
            header.key,
            header.parent_key,
            header.namespace_digest,
            header.part,
            header.record_bytes,
            header.payload_checksum,
            header.effective_fidelity,
            int(header.codec),
        )

    def _commit(
        self, client: MappedClient, namespace_access: tuple[int, int], pending: list[tuple[int, CommittedRecord]]
    ) -> None:
        namespace, access = namespace_access
        records = tuple([commit for _, commit in pending])
        # Puts without an engine request are requests of their own, carried out together.
        answer = self._executor.apply(Committed(client.session.id, namespace, records, access, separate=not access))
        assert isinstance(answer, Answer)
        counters = self._counters
        for (number, commit), status, reason in zip(pending, answer.statuses, answer.reasons, strict=True):
            client.answer(number, status, reason.known_in(client.session.protocol))
            if status is PutStatus.STORED:
                counters.stored += 1
                counters.bytes_in += commit.record_bytes - RECORD_HEADER_BYTES
            elif status is PutStatus.EXISTS:
                counters.exists += 1
            else:
                if status is PutStatus.THROTTLED:
                    counters.throttled += 1
                else:
                    counters.rejected += 1
                counters.reasons[reason.name.lower()] += 1

    # -------------------------------------------------------------- reports

    def _record_at(self, slot: int, sequence: int) -> Record | None:
        """The resident record that a client read: its slot, unless its entry changed since."""
        index = self._executor.index
        record = self._store.records.get(slot)
        if index is None or record is None or record.block is None or index.sequence(slot) != sequence:
            return None
        return record

    def _block_of(self, slot: int, sequence: int, namespace: int) -> Block | None:
        record = self._record_at(slot, sequence)
        block = None if record is None else record.block
        return block if block is not None and block.namespace.id == namespace else None

    def _report(self, client: MappedClient, report: _Report) -> None:
        counters = self._counters
        if report.namespace not in client.session.namespaces:
            return
        if report.kind == _MATCH:
            counters.matches += report.requests
            counters.match_keys += report.asked
            counters.match_hits += report.hits
        else:
            counters.gets += report.requests
            counters.get_keys += report.asked
            counters.get_hits += report.hits
            counters.bytes_out += max(report.payload_bytes, 0)
        counters.mapped_reads += report.requests
        self._executor.apply(
            Accessed(
                client.session.id,
                report.access,
                report.runs,
                report.asked,
                report.missing,
                report.namespace,
                report.missed,
                report.kind == _MATCH,
            )
        )

    def _suspect(self, client: MappedClient, slot: int, sequence: int) -> None:
        record = self._record_at(slot, sequence)
        if record is not None and client.suspects < _SUSPECTS:
            client.suspects += 1
            self._on_corrupt(record)


class _Report:
    """One access report, with the runs of the reports that belong to it."""

    __slots__ = ("access", "asked", "hits", "kind", "missing", "namespace", "part", "payload_bytes", "requests", "runs")

    def __init__(
        self,
        kind: int,
        namespace: int,
        part: int,
        access: int,
        asked: int,
        missing: tuple[bytes, ...],
        *,
        requests: int,
    ) -> None:
        self.requests = requests
        """0 where the report that it belongs to was in the batch before."""
        self.kind = kind
        self.namespace = namespace
        self.part = part
        self.access = access
        self.asked = asked
        self.missing = missing
        self.hits = 0
        self.payload_bytes = 0
        self.runs: list[tuple[Block, int]] = []

    @property
    def missed(self) -> int:
        """How many keys were not there. A get may have more hits in the next batch; what it missed it names at once."""
        named = len(self.missing)
        if self.kind == _GET and named < MAX_MISSING:
            return named
        return max(self.asked - self.hits, 0)

    def add(self, deepest: Block | None, hits: int, payload_bytes: int) -> None:
        """One run of hits; its deepest block is None where there was no hit, or where it left meanwhile."""
        self.hits += hits
        self.payload_bytes += payload_bytes
        if deepest is not None:
            self.runs.append((deepest, hits))


__all__ = ["Rings"]

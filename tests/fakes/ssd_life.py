"""One life of a store with an SSD tier, on files in memory and in time that jumps: from start to stop or crash.

Threads are replaced by the event loop, which begins and ends their work in an order drawn from a seed: a run with the
same seeds is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from fakes.faulty_disk import Crashed, FaultyDirectory

import kvstore.server.ssd
from kvstore.core.block import Record
from kvstore.core.events import (
    ClearWanted,
    Committed,
    CommittedRecord,
    InvalidateWanted,
    Joined,
    PopulationEnded,
    RemoveWanted,
    SessionOpened,
    SlabPopulated,
    SlotWanted,
)
from kvstore.core.instructions import Answer, Namespaced
from kvstore.core.invariants import validate_state
from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdBlock, SsdRecord
from kvstore.core.state import StoreLimits
from kvstore.core.store import Store
from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.format.record import decode_record, encode_header, raw_header
from kvstore.format.ssd_files import FIRST_SSD_PAGE
from kvstore.mapped.arena import FIRST_SLAB_PAGE, ArenaHeader
from kvstore.policy.lru import Lru
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace
from kvstore.server.below import Below
from kvstore.server.executor import Executor
from kvstore.server.ssd import SsdTier
from kvstore.server.ssd_groups import index_bytes
from kvstore.server.ssd_transfers import Done
from kvstore.settings import SsdSettings
from kvstore.tiers.disk import SLABS_NAME, SsdDirectory
from kvstore.tiers.dram import Arena

SESSION = 1
DRAM_PAGES = 12
GRANT_PAGES = 6
SLAB_PAGES = 8
MAX_RECORDS = 64
PATIENCE_S = 60.0
"""Of virtual time; nothing may take longer."""

_numbers = itertools.count()


class LoopTransfers:
    """``Transfers`` without threads: work is done on the event loop, after a while, in an order drawn from a seed."""

    order = random.Random(0)
    """Of all of them; a test seeds it."""

    def __init__(self, threads: int, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stopped = False
        self.in_flight = 0

    def read(
        self, work: Callable[[], None], done: Done, then: Callable[[], None] | None = None, *, ahead: bool = False
    ) -> None:
        self.in_flight += 1
        self._loop.call_later(self.order.random() * 0.01, self._work, work, done, then)

    write = read

    def _work(self, work: Callable[[], None], done: Done, then: Callable[[], None] | None) -> None:
        error: BaseException | None = None
        if self._stopped:
            error = OSError("the SSD tier is stopping")
        else:
            try:
                work()
            except BaseException as raised:
                error = raised
        if error is None and then is not None:
            self._loop.call_later(self.order.random() * 0.005, self._work, then, done, None)
            return
        # A thread's last word may come late.
        self._loop.call_later(self.order.random() * 0.005, self._done, done, error)

    def _done(self, done: Done, error: BaseException | None) -> None:
        self.in_flight -= 1
        if not isinstance(error, Crashed):
            done(error)

    async def call(self, work: Callable[[], None]) -> None:
        future: asyncio.Future[None] = self._loop.create_future()

        def done(error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        self.read(work, done)
        await future

    def deliver(self) -> None:
        """Nothing waits to be delivered."""

    def stop(self) -> None:
        self._stopped = True


class Events:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, object]] = []

    def info(self, event: str, **details: object) -> None:
        """Of no interest."""

    debug = warning = info

    def error(self, event: str, **details: object) -> None:
        if not isinstance(details.get("exc_info"), Crashed):
            self.errors.append((event, details))


class Life:
    """A store over a directory; made by ``begin``."""

    def __init__(self, directory: FaultyDirectory, tier: SsdTier, arena: Arena, store: Store, log: Events) -> None:
        self.log = log
        self.directory = directory
        self.tier = tier
        self.arena = arena
        self.store = store
        self.ssd: SsdStore = tier.ssd
        self.evicted: set[bytes] = set()
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self.executor = Executor(store, arena, self.clock)
        for slab in range(arena.header.slab_count):
            self.executor.apply(SlabPopulated(slab))
        self.executor.apply(PopulationEnded())
        tier.start(self.executor)
        self.below = Below(tier, self.executor, self.clock)
        self.executor.apply(SessionOpened(SESSION))
        self.namespace = self._joined(self.executor.apply(Joined(Namespace(name="small"), session=SESSION)))
        self._watch_evictions()

    @classmethod
    async def begin(cls, directory: FaultyDirectory, ssd_slabs: int = 3) -> Life:
        """Open what the directory holds."""
        loop = asyncio.get_running_loop()
        slab_bytes = SLAB_PAGES * PAGE_BYTES
        settings = SsdSettings(
            directory=directory.path,
            capacity_bytes=index_bytes(MAX_RECORDS) + 2 * PAGE_BYTES + ssd_slabs * slab_bytes,
            slab_bytes=slab_bytes,
            reserve_bytes=0,
            max_records=MAX_RECORDS,
            group_records=4,
        )
        clock = lambda: int(loop.time() * 1e9)  # noqa: E731
        log: Any = Events()
        tier = await SsdTier.open(settings, slab_bytes, Lru(), clock, log, cast("SsdDirectory", directory))
        slabs = -(-(DRAM_PAGES + GRANT_PAGES) // SLAB_PAGES)
        path = Path(tempfile.gettempdir()) / f"kvt-life-{os.getpid()}-{next(_numbers)}"
        arena = Arena(path, ArenaHeader(1, slab_bytes, slabs, os.getpid()), 0o600)
        arena.path.unlink()
        limits = StoreLimits(
            capacity_bytes=DRAM_PAGES * PAGE_BYTES,
            grant_bytes=GRANT_PAGES * PAGE_BYTES,
            grant_bytes_per_session=GRANT_PAGES * PAGE_BYTES,
            max_records=1 << 62,
        )
        store = Store(limits, SlabAllocator(slabs, slab_bytes, FIRST_SLAB_PAGE), Lru(), None, tier.ssd)
        return cls(directory, tier, arena, store, log)

    def clock(self) -> int:
        return int(self._loop.time() * 1e9)

    def _deadline_ns(self) -> int:
        return self.clock() + int(PATIENCE_S * 1e9)

    def _joined(self, answer: object) -> Namespaced:
        assert isinstance(answer, Namespaced), answer
        return answer.namespace  # type: ignore[return-value]

    def _watch_evictions(self) -> None:
        evict = self.ssd.evict

        def watched(block: SsdBlock) -> None:
            self.evicted.add(block.key)
            evict(block)

        self.ssd.evict = watched  # type: ignore[method-assign]

    # -------------------------------------------------------------- ends

    async def stop(self) -> None:
        """End as a daemon does that is told to."""
        await self.tier.stop()

    def end(self) -> None:
        """What the end of the process does; the caller cancels its tasks."""
        if not self._ended:
            self._ended = True
            self.arena.close()

    # -------------------------------------------------------------- what clients want

    async def put(self, key: bytes, parent: bytes, payload: bytes) -> PutStatus:
        """Put a block; waits while room is being made."""
        record_bytes = RECORD_HEADER_BYTES + len(payload)
        wanted = SlotWanted(SESSION, record_bytes, namespace_id=self.namespace.id, parent_key=parent)
        end = self._loop.time() + PATIENCE_S
        while True:
            granted = self.executor.want_slot(wanted)
            if isinstance(granted, Record):
                break
            if granted.status is not PutStatus.THROTTLED or self._loop.time() > end:
                return granted.status
            await asyncio.sleep(0.005)
        header = raw_header(key=key, parent_key=parent, namespace_digest=self.namespace.digest, part=0, payload=payload)
        self.arena.write(granted.slot, granted.slot_bytes, encode_header(header), payload)
        commit = CommittedRecord(
            granted.slot,
            key,
            parent,
            self.namespace.digest,
            0,
            record_bytes,
            header.payload_checksum,
            header.effective_fidelity,
            int(header.codec),
        )
        answer = self.executor.apply(Committed(SESSION, self.namespace.id, (commit,), 0))
        assert isinstance(answer, Answer)
        return answer.statuses[0]

    async def get(self, key: bytes) -> bytes | None:
        """A block's payload, from the SSD where it is not in DRAM."""
        found = self.store.find(self.namespace.id, key, 0)
        if found is None:
            below = self.stored(key)
            if below is None:
                return None
            block = below.namespace.tree.blocks[key]
            await self.below.promote(self.namespace, [block], self._deadline_ns())
            found = self.store.find(self.namespace.id, key, 0)
            if found is None:
                return None
        self.arena.verify(found.slot, found.slot_bytes, found.record_bytes, key, 0)
        return bytes(decode_record(self.arena.record(found.slot, found.record_bytes))[1])

    async def persist(self, key: bytes) -> PutStatus:
        """Have a block, and what is stored of those before it, made durable."""
        statuses, _ = await self.below.persist(self.namespace.id, [key], self._deadline_ns())
        return PutStatus(statuses[0])

    async def remove(self, keys: list[bytes]) -> bool:
        """Remove blocks; whether that is durable."""
        self.executor.apply(RemoveWanted(self.namespace.id, keys))
        return await self._logged()

    async def clear(self) -> bool:
        """Remove all blocks; whether that is durable."""
        self.executor.apply(ClearWanted(self.namespace.id))
        return await self._logged()

    async def invalidate(self) -> bool:
        """Begin the next generation; whether that is durable."""
        self.namespace = self._joined(self.executor.apply(InvalidateWanted(self.namespace.id, SESSION)))
        return await self._logged()

    async def _logged(self) -> bool:
        return await self.below.said(self._deadline_ns())

    async def settle(self) -> bool:
        """Wait until nothing is on its way; False where that does not come about."""
        end = self._loop.time() + PATIENCE_S
        while self.tier.demotions.waiting or self.ssd.writing_bytes or self.ssd.something_to_log:
            if self._loop.time() > end:
                return False
            self.tier.groups.hurry()
            await asyncio.sleep(0.01)
        return True

    # -------------------------------------------------------------- looking at it

    def stored(self, key: bytes) -> SsdRecord | None:
        """The readable record of a block on the SSD."""
        below = self.namespace.ssd
        return None if below is None else below.stored(key, 0)

    def on_disk(self, key: bytes) -> bytes | None:
        """The payload of a block's record in the slab file; None where there is none, or it is damaged."""
        record = self.stored(key)
        return None if record is None else self.payload_on_disk(record)

    def payload_on_disk(self, record: SsdRecord) -> bytes | None:
        """A record's payload in the slab file; None where its bytes are not there."""
        begin = record.slot * PAGE_BYTES
        data = self.directory.content(SLABS_NAME)[begin : begin + record.record_bytes]
        try:
            header, payload = decode_record(data)
        except CorruptRecord:
            return None
        return bytes(payload) if header.key == record.key else None

    def records(self) -> Iterator[SsdRecord]:
        return iter(self.ssd.records.values())

    def check(self) -> None:
        """The state is right, each slot is free or of one record, and all files together keep to their limit."""
        validate_state(self.store)
        taken: set[int] = set()
        for record in self.records():
            pages = set(range(record.slot, record.slot + record.slot_bytes // PAGE_BYTES))
            assert pages.isdisjoint(taken), f"slot {record.slot} is used twice"
            assert min(pages) >= FIRST_SSD_PAGE
            taken |= pages
        stats = self.tier.statistics()
        assert stats.file_bytes == self.directory.used_bytes() <= stats.capacity_bytes


@contextlib.contextmanager
def loop_transfers(seed: int) -> Iterator[None]:
    """Have tiers use ``LoopTransfers``, with an order of this seed."""
    real = kvstore.server.ssd.Transfers
    LoopTransfers.order = random.Random(seed)
    kvstore.server.ssd.Transfers = LoopTransfers  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        kvstore.server.ssd.Transfers = real  # type: ignore[misc]

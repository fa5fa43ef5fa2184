"""Demotion: resident records are written to the SSD, straight from their slots in the arena."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
from collections import deque
from collections.abc import Callable
from typing import Final

from kvstore.core.block import Block, Record, RecordState
from kvstore.core.events import Demoted
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdNamespace, SsdRecord, SsdState
from kvstore.format.constants import PAGE_BYTES
from kvstore.server.executor import Executor
from kvstore.server.ssd_groups import Groups
from kvstore.server.ssd_transcoding import Smaller, Transcoding
from kvstore.server.ssd_transfers import Transfers
from kvstore.tiers.disk import SlabFile

_MOST_WRITES: Final = 64
"""Writes that are with the threads at a time; the rest waits here, where it can still be called off."""

_ZEROS_BYTES: Final = 1 << 20


class _Waiting:
    """A record that is to be written; its slot is pinned."""

    __slots__ = ("access", "block", "ended", "part", "record", "slot", "slot_bytes", "smaller", "transcoded")

    def __init__(self, record: Record, access: int) -> None:
        assert record.block is not None
        self.record = record
        self.transcoded = False
        self.smaller: Smaller | None = None
        self.block: Block = record.block
        self.part = record.part
        self.slot = record.slot
        self.slot_bytes = record.slot_bytes
        self.access = access
        below = self.block.namespace.ssd
        self.ended = self.block.namespace.ended if below is None else below.ended


class Demotions:
    """Writes what the store wants written below.

    Args:
        executor: pins slots while they are read.
        ssd: the tier's state.
        slabs: its file.
        transfers: its threads.
        groups: commits what was written.
        transcoding: what records become on the way; None: they stay as they are.
        on_failure: called with an error of the file; nothing is written until ``resume``.
    """

    def __init__(
        self,
        executor: Executor,
        ssd: SsdStore,
        slabs: SlabFile,
        transfers: Transfers,
        groups: Groups,
        transcoding: Transcoding | None,
        on_failure: Callable[[OSError, str], None],
    ) -> None:
        self._executor = executor
        self._ssd = ssd
        self._slabs = slabs
        self._transfers = transfers
        self._groups = groups
        self._transcoding = transcoding
        self._on_failure = on_failure
        self._queue: deque[_Waiting] = deque()
        self._flying = 0
        self._paused = False
        self._scheduled = False
        self._idle = asyncio.Event()
        self.dropped = 0
        """Records that left DRAM and were removed, or may have been, before they were written."""
        self._failed_at: tuple[int, int] | None = None
        self.blocks = 0
        self.bytes = 0

    @property
    def waiting(self) -> int:
        """Records that wait or are being written."""
        return len(self._queue) + self._flying

    async def idle(self, timeout_s: float) -> None:
        """Wait until no write is with the threads any more, or the time is over."""
        if self._flying:
            self._idle = asyncio.Event()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def try_again(self, timeout_s: float) -> None:
        """After a pause: wait for the writes that are on their way, then write zeros where one failed.

        Raises:
            OSError: it fails still, or a write does not end.
        """
        await self.idle(timeout_s)
        if self._flying:
            raise OSError(errno.ETIMEDOUT, "an earlier write does not end")
        if self._failed_at is not None:
            # The slot is free, and nothing takes it before `resume`.
            offset, slot_bytes = self._failed_at
            zeros = memoryview(mmap.mmap(-1, min(slot_bytes, _ZEROS_BYTES), prot=mmap.PROT_READ))
            whole, rest = divmod(slot_bytes, zeros.nbytes)
            await self._transfers.call(lambda: self._slabs.write(offset, [zeros] * whole + [zeros[:rest]]))
            self._failed_at = None

    def demote(self, records: list[Record], accesses: list[int]) -> None:
        """Take records on; they are resident."""
        for record, access in zip(records, accesses, strict=True):
            self._executor.pin([record.slot])
            self._queue.append(_Waiting(record, access))
        if not self._scheduled:
            # Not at once: the store is in the middle of what it wants done.
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._scheduled = False
        self.pump()

    def pump(self) -> None:
        """Give the threads what they can take and there are slots for."""
        given_up: list[Block] = []
        while self._queue and self._flying < _MOST_WRITES and not self._paused:
            waiting = self._queue[0]
            block = waiting.block
            namespace = block.namespace
            below = namespace.ssd
            if namespace.current and below is None:
                below = namespace.ssd = self._ssd.namespace(namespace.canonical, namespace.generation)
                below.state, below.ended = namespace.id, namespace.ended
            if below is None or not self._wanted(waiting, below):
                self._drop()
                continue
            if (block.key, waiting.part) in below.writing or self._ssd.holds(
                below, block.key, waiting.part, waiting.record.fidelity
            ):
                self._drop()
                if block.retired and block.parts:
                    given_up += self._settled(block)
                continue
            if waiting.slot_bytes > self._ssd.slabs.slab_bytes:
                self._drop()
                given_up.append(block)
                continue
            if self._transcoding is not None and not waiting.transcoded:
                self._queue.popleft()
                if self._transcoding.applies_to(namespace, waiting.record.codec):
                    self._transcode(waiting, self._transcoding)
                else:
                    waiting.transcoded = True
                    self._queue.appendleft(waiting)
                continue
            slot_bytes = waiting.slot_bytes if waiting.smaller is None else waiting.smaller.slot.nbytes
            record = self._ssd.begin(
                below, block.key, block.parent_key, waiting.part, slot_bytes, block.depth, waiting.access
            )
            if record is None and (self._ssd.stuck or self._ssd.over_quota(below, slot_bytes)):
                # No slabs, or nothing that may leave: those in DRAM must not wait for it.
                self._drop()
                given_up.append(block)
                continue
            if record is None:
                # Room is being made; it is there after a group.
                if self._ssd.something_to_log:
                    self._groups.hurry()
                break
            self._queue.popleft()
            source = waiting.record
            record.record_bytes, record.checksum = source.record_bytes, source.checksum
            record.codec, record.fidelity = source.codec, source.fidelity
            if waiting.smaller is not None:
                header = waiting.smaller.header
                record.record_bytes, record.checksum = header.record_bytes, header.payload_checksum
                record.codec = int(header.codec)
                if self._transcoding is not None and self._transcoding.pair.restored:
                    record.home_bytes = waiting.slot_bytes
            self._write(waiting, record)
        if given_up:
            self._executor.apply(Demoted([], given_up))

    def _wanted(self, waiting: _Waiting, below: SsdNamespace) -> bool:
        """Whether a record is still to be written: it was not removed meanwhile, nor has a better one its place."""
        block = waiting.block
        if block.parts:
            return block.parts.get(waiting.part) is waiting.record or waiting.record.state is not RecordState.RESIDENT
        # It had to leave at once. Whether it was removed since, only its namespace knows.
        wanted = block.retired and below.ended == waiting.ended
        self.dropped += block.retired and not wanted
        return wanted

    def _settled(self, block: Block) -> list[Block]:
        """A retired block of which nothing is on its way any more, if that is so."""
        below = block.namespace.ssd
        assert below is not None
        return [] if any((block.key, part) in below.writing for part in block.parts) else [block]

    def _drop(self) -> None:
        waiting = self._queue.popleft()
        self._executor.unpin([waiting.slot])
        self._give_back(waiting)

    def _give_back(self, waiting: _Waiting) -> None:
        if waiting.smaller is not None and self._transcoding is not None:
            self._transcoding.scratch.give(waiting.smaller.memory)
            waiting.smaller = None

    def _transcode(self, waiting: _Waiting, transcoding: Transcoding) -> None:
        record = self._executor.arena.record(waiting.slot, waiting.record.record_bytes)
        self._flying += 1

        def work() -> None:
            waiting.smaller = transcoding.down(record, waiting.slot_bytes)

        def done(error: BaseException | None) -> None:
            self._ended()
            record.release()
            waiting.transcoded = True
            if waiting.smaller is not None and waiting.smaller.slot.nbytes >= waiting.slot_bytes:
                self._give_back(waiting)
            self._queue.appendleft(waiting)
            if self._paused:
                self._drop()
            if error is not None:
                raise error
            self.pump()

        self._transfers.write(work, done)

    def _ended(self) -> None:
        self._flying -= 1
        if not self._flying:
            self._idle.set()

    def _write(self, waiting: _Waiting, record: SsdRecord) -> None:
        offset = record.slot * PAGE_BYTES
        if waiting.smaller is None:
            source = self._executor.arena.slot(waiting.slot, waiting.slot_bytes)
        else:
            source = waiting.smaller.slot
        self._flying += 1

        def work() -> None:
            self._slabs.write(offset, [source])

        def done(error: BaseException | None) -> None:
            self._ended()
            source.release()
            self._executor.unpin([waiting.slot])
            self._give_back(waiting)
            if error is None:
                if record.state is SsdState.WRITING:
                    self.blocks += 1
                    self.bytes += record.slot_bytes
                self._groups.add(record)
                self.pump()
                return
            self._ssd.fail(record)
            self._ssd.written(record)
            if not isinstance(error, OSError):
                raise error
            self._failed_at = offset, record.slot_bytes
            self._on_failure(error, "cannot write a record")

        self._transfers.write(work, done)

    def pause(self) -> None:
        """Write nothing more; what waits is given up."""
        self._paused = True
        while self._queue:
            self._drop()

    def resume(self) -> None:
        """Write again."""
        self._paused = False

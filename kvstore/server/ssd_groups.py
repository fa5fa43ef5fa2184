"""Group commit: what was written becomes durable and readable together, what ended is said; and checkpoints.

Order of a group: the slab file is synced, one frame is appended to the log, the log is synced, and only then the
records can be found and clients are told. While a group waits for the device the next records are written already.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from kvstore.core.ssd import Group, SsdStore
from kvstore.core.ssd_record import SsdRecord
from kvstore.format.ssd_files import CHECKPOINT_MAGIC, NumberedHeader, checkpoint_name, encode_numbered_header, log_name
from kvstore.format.ssd_log import PUT_BYTES, EndEntry, encode_entry, encode_frame
from kvstore.server.ssd_recovery import Recovered, new_log
from kvstore.server.ssd_transfers import Transfers
from kvstore.tiers.disk import AppendFile, SlabFile, SsdDirectory

SMALLEST_LOG_BYTES: Final = 256 << 10
_RECORDS_A_FRAME: Final = 1024
_MOST_LOGS: Final = 8
"""Logs of earlier lives that are kept before a checkpoint replaces them."""


def index_bytes(max_records: int) -> int:
    """Most bytes that logs and checkpoints take together for so many records."""
    checkpoint = max_records * PUT_BYTES * 9 // 8
    return 2 * (checkpoint + max(checkpoint, SMALLEST_LOG_BYTES)) + (1 << 20)


class Groups:
    """Commits groups as records are written.

    Args:
        ssd: the tier's state.
        directory, recovered: its files.
        transfers: where blocking calls are made.
        group_records, group_s: what a group waits for.
        on_stored: called with the records of each group when they can be read.
        on_failure: called with what kept a group from becoming durable; nothing is committed until ``begin_log``.
    """

    def __init__(
        self,
        ssd: SsdStore,
        directory: SsdDirectory,
        recovered: Recovered,
        transfers: Transfers,
        group_records: int,
        group_s: float,
        on_stored: Callable[[list[SsdRecord]], None],
        on_failure: Callable[[OSError, str], None],
    ) -> None:
        self._ssd = ssd
        self._directory = directory
        self._slabs: SlabFile = recovered.slabs
        self._store_id = recovered.store_id
        self._log = recovered.log
        self._number = recovered.log_number
        self._old_names = list(recovered.names)
        self._old_bytes = recovered.old_bytes
        self._transfers = transfers
        self._group_records = group_records
        self._group_s = group_s
        self._on_stored = on_stored
        self._on_failure = on_failure
        self._written: list[SsdRecord] = []
        self._wake = asyncio.Event()
        self._full = asyncio.Event()
        self._synced = asyncio.Event()
        self._sequence = 0
        self._hurry = False
        self._failed = False
        self._stopping = False
        self._checkpoint: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.groups = 0
        self.checkpoints = 0

    @property
    def log_bytes(self) -> int:
        """Of all logs and checkpoints."""
        return self._log.size_bytes + self._old_bytes

    def start(self) -> None:
        """Begin to commit."""
        self._task = asyncio.ensure_future(self._run())

    def add(self, record: SsdRecord) -> None:
        """A record's bytes were written; its slot is let go of when its group is over."""
        self._written.append(record)
        self._wake.set()
        if len(self._written) >= self._group_records:
            self._full.set()

    def hurry(self) -> None:
        """Somebody waits for what was written and said until now."""
        self._hurry = True
        self._wake.set()
        self._full.set()

    async def wait(self, position: int) -> bool:
        """Wait until a group is durable; False where that failed."""
        while self._ssd.synced < position:
            if self._failed or self._stopping:
                return False
            self.hurry()
            synced = self._synced
            await synced.wait()
        return True

    async def next_group(self, timeout_s: float) -> None:
        """Wait until another group is over, or has failed, or the time is."""
        if not self._failed and not self._stopping:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._synced.wait(), timeout_s)

    async def _run(self) -> None:
        while not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            if self._failed:
                continue
            if not self._hurry and len(self._written) < self._group_records:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._group_s)
            self._full.clear()
            self._hurry = False
            while (self._written or self._ssd.something_to_log) and not self._failed:
                await self._commit()
                if len(self._written) < self._group_records and not self._hurry:
                    if self._written:
                        self._wake.set()
                    break

    async def _commit(self) -> None:
        """One group. Errors end in ``on_failure``."""
        written, self._written = self._written, []
        group: Group | None = None
        what = "sync the slab file"
        try:
            if written:
                await self._transfers.call(self._slabs.sync)
            group = self._ssd.begin_group(written)
            frame = encode_frame(self._sequence, [encode_entry(entry) for entry in group.entries])
            what = "write the log"
            await self._log.append(frame)
            await self._log.sync()
        except OSError as error:
            if group is not None:
                self._ssd.fail_group(group)
            for record in written:
                self._ssd.fail(record)
                self._ssd.written(record)
            self._fail(error, what)
            return
        self._sequence += 1
        self.groups += 1
        stored = self._ssd.end_group(group)
        for record in written:
            self._ssd.written(record)
        self._tell()
        self._on_stored(stored)
        await self._checkpoint_if_due()

    def _tell(self) -> None:
        synced, self._synced = self._synced, asyncio.Event()
        synced.set()

    def _fail(self, error: OSError, what: str) -> None:
        self._failed = True
        for record in self._written:
            self._ssd.fail(record)
            self._ssd.written(record)
        self._written.clear()
        self._tell()
        self._on_failure(error, f"cannot {what}")

    # -------------------------------------------------------------- checkpoints

    def _log_limit_bytes(self) -> int:
        return max(self._ssd.record_count * PUT_BYTES, SMALLEST_LOG_BYTES)

    async def _checkpoint_if_due(self) -> None:
        checkpoint = self._checkpoint
        if checkpoint is not None:
            if not checkpoint.done():
                if self._log.size_bytes >= self._log_limit_bytes():
                    # Two logs are all there may be.
                    await asyncio.wait({checkpoint})
                return
            self._checkpoint = None
        if self._log.size_bytes >= self._log_limit_bytes():
            await self.begin_checkpoint()

    def tidy(self) -> bool:
        """Whether logs of earlier lives should be replaced by a checkpoint now."""
        return len(self._old_names) > _MOST_LOGS or self._old_bytes > 2 * self._log_limit_bytes()

    async def begin_checkpoint(self) -> None:
        """Begin another log and write a checkpoint for it, in the background."""
        number = self._number + 1
        try:
            log = await new_log(self._directory, number, self._store_id)
        except OSError as error:
            self._fail(error, "begin another log")
            return
        self._switch(log, number)
        self._checkpoint = asyncio.ensure_future(self._write_checkpoint(number, list(self._old_names)))

    def _switch(self, log: AppendFile, number: int) -> None:
        before = self._log
        self._old_names.append(log_name(self._number))
        self._old_bytes += before.size_bytes
        self._log = log
        self._number, self._sequence = number, 0
        self._closing = asyncio.ensure_future(before.close())

    async def _write_checkpoint(self, number: int, replaced: list[str]) -> None:
        try:
            size_bytes = await self._directory.write_whole(checkpoint_name(number), self._chunks(number))
        except OSError as error:
            self._fail(error, "write a checkpoint")
            return
        self.checkpoints += 1
        for name in replaced:
            with contextlib.suppress(OSError):
                self._directory.remove(name)
        self._old_names = [name for name in self._old_names if name not in replaced] + [checkpoint_name(number)]
        self._old_bytes = size_bytes

    async def _chunks(self, number: int) -> AsyncIterator[bytes]:
        # Everything that this says is as it was when the log of the same number began.
        namespaces, records = self._ssd.snapshot()
        yield encode_numbered_header(NumberedHeader(CHECKPOINT_MAGIC, number, self._store_id))
        yield encode_frame(0, [encode_entry(entry) for entry in namespaces])
        sequence = 1
        for begin in range(0, len(records), _RECORDS_A_FRAME):
            some = records[begin : begin + _RECORDS_A_FRAME]
            entries = [encode_entry(self._ssd.put_entry(record, used)) for record, used in some]
            yield encode_frame(sequence, entries)
            sequence += 1
            await asyncio.sleep(0)
        yield encode_frame(sequence, [encode_entry(EndEntry(len(records)))])

    # -------------------------------------------------------------- failure and end

    async def begin_log(self) -> None:
        """After a failure: begin another log and a checkpoint; from then on groups are committed again.

        Raises:
            OSError: it still fails.
        """
        number = self._number + 1
        with contextlib.suppress(OSError):
            self._directory.remove(log_name(number))
        log = await new_log(self._directory, number, self._store_id)
        self._switch(log, number)
        if self._checkpoint is not None and not self._checkpoint.done():
            await asyncio.wait({self._checkpoint})
        self._failed = False
        self._wake.set()

    async def stop(self) -> None:
        """Commit what was written, then end."""
        if not self._failed and (self._written or self._ssd.something_to_log):
            await asyncio.shield(self._last())
        self._stopping = True
        self._tell()
        for task in (self._task, self._checkpoint):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        with contextlib.suppress(OSError):
            await self._log.close()

    async def _last(self) -> None:
        position = self._ssd.position
        self.hurry()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.wait(max(position, self._ssd.synced + 1)), 10.0)

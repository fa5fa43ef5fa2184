"""Group commit: what was written becomes durable and readable together, what ended is said; and checkpoints.

Order of a group: the slab file is synced, one frame is appended to the log, the log is synced, and only then the
records can be found and clients are told. While a group waits for the device the next records are written already.

A group and a change of logs never overlap: a frame is in the log that its sync is of. Logs behind the last checkpoint
are bounded also where checkpoints fail: a failed one is written before anything more is committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable
from typing import Final

from kvstore.core.ssd import Group, SsdStore
from kvstore.core.ssd_record import SsdRecord
from kvstore.format.ssd_files import LOG_MAGIC, NumberedHeader, checkpoint_name, encode_numbered_header, log_name
from kvstore.format.ssd_log import PUT_BYTES, encode_entry, encode_frame, frame_seed
from kvstore.server.ssd_checkpoint import write_checkpoint
from kvstore.server.ssd_recovery import Recovered, new_log
from kvstore.server.ssd_transfers import Transfers
from kvstore.tiers.disk import TEMPORARY_SUFFIX, AppendFile, SlabFile, SsdDirectory

SMALLEST_LOG_BYTES: Final = 256 << 10
_LAST_S: Final = 10.0
"""How long the last group may take."""

_MOST_FILES: Final = 8
"""Logs behind a checkpoint that are kept before another one replaces them."""


def index_bytes(max_records: int) -> int:
    """Most bytes that logs and checkpoints take together for so many records."""
    checkpoint = max_records * PUT_BYTES * 9 // 8
    return 2 * (checkpoint + max(checkpoint, SMALLEST_LOG_BYTES)) + (1 << 20)


def records_in(available_bytes: int) -> int:
    """Most records for which logs and checkpoints fit into so many bytes; the inverse of ``index_bytes``."""
    left = available_bytes - (1 << 20)
    with_smallest_logs = (left // 2 - SMALLEST_LOG_BYTES) * 8 // (9 * PUT_BYTES)
    return max(min(with_smallest_logs, left // 4 * 8 // (9 * PUT_BYTES)) if with_smallest_logs > 0 else 0, 0)


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
        # What the next checkpoint replaces: the one before, and all logs but the one that is appended to.
        self._old_names = dict.fromkeys(recovered.names)
        self._old_log_bytes = recovered.old_log_bytes
        self._checkpoint_bytes = recovered.checkpoint_bytes
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
        self._turn = asyncio.Lock()
        self._torn = False
        self._failed = False
        self._broken = False
        self._stopping = False
        self._checkpoint: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.groups = 0
        self.checkpoints = 0

    @property
    def log_bytes(self) -> int:
        """Of all logs and checkpoints."""
        return self._log.size_bytes + self._old_log_bytes + self._checkpoint_bytes

    def start(self) -> None:
        """Begin to commit."""
        self._task = asyncio.ensure_future(self._run())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Have a defect of ours end in an error that is seen, and not in clients that wait."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._broken = True
            asyncio.get_running_loop().call_exception_handler({"message": "the SSD's log stopped", "exception": error})
            self._fail(OSError(errno.EIO, f"a defect, restart the daemon: {error!r}"), "go on")

    def add(self, record: SsdRecord) -> None:
        """A record's bytes were written; its slot is let go of when its group is over."""
        if self._failed:
            # It may have been among what a failed sync lost; a later sync would say nothing of it.
            self._ssd.fail(record)
            self._ssd.written(record)
            return
        self._written.append(record)
        self._wake.set()
        if len(self._written) >= self._group_records:
            self._full.set()

    def something_ended(self) -> None:
        """Records are over, and nobody waits for the group that says so."""
        self._wake.set()

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
        async with self._turn:
            if not self._failed and (self._written or self._ssd.something_to_log):
                await self._commit_group()

    async def _commit_group(self) -> None:
        """One group. Errors end in ``on_failure``."""
        written, self._written = self._written, []
        group: Group | None = None
        what = "sync the slab file"
        try:
            if written:
                await self._transfers.call(self._slabs.sync)
            group = self._ssd.begin_group(written)
            header = encode_numbered_header(NumberedHeader(LOG_MAGIC, self._number, self._store_id))
            frame = encode_frame(frame_seed(header), self._sequence, [encode_entry(entry) for entry in group.entries])
            what = "write the log"
            # Nothing is appended behind what may be torn.
            self._torn = True
            await self._log.append(frame)
            await self._log.sync()
            self._torn = False
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
        self.tell()
        self._on_stored(stored)
        await self._checkpoint_if_due()

    def tell(self) -> None:
        """Have those who wait for a group look again."""
        synced, self._synced = self._synced, asyncio.Event()
        synced.set()

    async def sync(self) -> bool:
        """Sync the slab file between two groups; False where that failed: the error is told once, and to all."""
        async with self._turn:
            try:
                await self._transfers.call(self._slabs.sync)
            except OSError as error:
                self._fail(error, "sync the slab file")
                return False
        return True

    def _fail(self, error: OSError, what: str) -> None:
        self._failed = True
        for record in self._written:
            self._ssd.fail(record)
            self._ssd.written(record)
        self._written.clear()
        self.tell()
        self._on_failure(error, f"cannot {what}")

    # -------------------------------------------------------------- checkpoints

    def _log_limit_bytes(self) -> int:
        return max(self._ssd.record_count * PUT_BYTES, SMALLEST_LOG_BYTES)

    def _due(self) -> bool:
        """Whether the logs behind the checkpoint are as long, or as many, as they may become."""
        log_bytes = self._log.size_bytes + self._old_log_bytes
        return log_bytes >= self._log_limit_bytes() or len(self._old_names) > _MOST_FILES

    async def _checkpoint_if_due(self) -> None:
        checkpoint = self._checkpoint
        if checkpoint is not None and not checkpoint.done():
            if self._log.size_bytes >= self._log_limit_bytes():
                # Two logs of that size are all there may be.
                await asyncio.wait({checkpoint})
        elif self._due():
            await self._begin_checkpoint()

    async def tidy(self) -> None:
        """Replace logs of earlier lives where they are long or many."""
        async with self._turn:
            if not self._failed and self._checkpoint is None and self._due():
                await self._begin_checkpoint()

    async def _begin_checkpoint(self) -> None:
        """Begin another log and write a checkpoint for it, in the background."""
        try:
            replaced = await self._change_log()
        except OSError as error:
            self._fail(error, "begin another log")
            return
        self._checkpoint = asyncio.ensure_future(self._checkpoint_behind(replaced))
        self._checkpoint.add_done_callback(self._ended)

    async def _change_log(self) -> list[str]:
        """Begin the log of the next number; the names of what its checkpoint will replace."""
        number = self._number + 1
        log = await new_log(self._directory, number, self._store_id)
        before = self._log
        self._old_names[log_name(self._number)] = None
        self._old_log_bytes += before.size_bytes
        self._log = log
        self._number, self._sequence, self._torn = number, 0, False
        self._closing = asyncio.ensure_future(_closed(before))
        return list(self._old_names)

    async def _checkpoint_behind(self, replaced: list[str]) -> None:
        try:
            await self._write_checkpoint(replaced)
        except OSError as error:
            self._fail(error, "write a checkpoint")

    async def _write_checkpoint(self, replaced: list[str]) -> None:
        """Write the checkpoint of the current log's number; then what it replaces goes."""
        name = checkpoint_name(self._number)
        try:
            size_bytes = await write_checkpoint(self._directory, self._ssd, self._number, self._store_id)
        except OSError:
            # Either may be there now, and both are true: only the next one that is whole may replace them.
            self._old_names |= dict.fromkeys([name, name + TEMPORARY_SUFFIX])
            raise
        self.checkpoints += 1
        left: list[str] = []
        for old in replaced:
            try:
                if old != name:
                    self._directory.remove(old)
            except OSError:
                left.append(old)
        self._old_names = dict.fromkeys([*left, name])
        self._old_log_bytes, self._checkpoint_bytes = 0, size_bytes

    # -------------------------------------------------------------- failure and end

    async def begin_log(self) -> None:
        """After a failure: begin another log, and a checkpoint where one is due; then groups are committed again.

        Precondition: no write that began before is with the threads any more.

        Raises:
            OSError: it still fails.
        """
        async with self._turn:
            if self._broken:
                raise OSError(errno.EIO, "stopped by a defect; restart the daemon")
            if self._checkpoint is not None and not self._checkpoint.done():
                await asyncio.wait({self._checkpoint})
            await self._transfers.call(self._slabs.sync)
            with contextlib.suppress(OSError):
                self._directory.remove(log_name(self._number + 1))
            if self._torn or self._sequence:
                await self._change_log()
            if self._due():
                await self._write_checkpoint([old for old in self._old_names if old != log_name(self._number)])
            self._failed = False
        self._wake.set()

    async def stop(self) -> None:
        """Commit what was written, then end."""
        if not self._failed and (self._written or self._ssd.synced < self._ssd.position):
            await asyncio.shield(self._last())
        self._stopping = True
        self.tell()
        for task in (self._task, self._checkpoint):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        with contextlib.suppress(OSError):
            await self._log.close()

    async def _last(self) -> None:
        more = bool(self._written) and not self._ssd.something_to_log
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.wait(self._ssd.position + more), _LAST_S)


async def _closed(log: AppendFile) -> None:
    # All that was promised of it was synced.
    with contextlib.suppress(OSError):
        await log.close()

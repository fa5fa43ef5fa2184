"""The SSD tier: its files, its threads, and what happens when the device fails.

A failed write or sync degrades the tier: nothing more is written, what can be read is read, DRAM evicts as it would
without a tier below. The tier tries again with growing pauses, and comes back by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
from collections.abc import Callable, Coroutine, Iterable
from typing import Final

from kvstore.core.events import Demoted, SsdChanged
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.tenants import Tenant
from kvstore.errors import SettingsError
from kvstore.format.constants import PAGE_BYTES
from kvstore.observability.logs import Log, RepeatedLog
from kvstore.policy.base import EvictionPolicy
from kvstore.policy.loading import LoadCosts
from kvstore.protocol.statistics import SsdStats
from kvstore.server.executor import Executor
from kvstore.server.ssd_demotion import Demotions
from kvstore.server.ssd_formatting import OTHER_BYTES, Formatting, most_records
from kvstore.server.ssd_groups import Groups, index_bytes
from kvstore.server.ssd_promotion import Promotions
from kvstore.server.ssd_recovery import Recovered, recover, restored, say_what_is_left
from kvstore.server.ssd_transcoding import Transcoding
from kvstore.server.ssd_transfers import Transfers
from kvstore.server.ssd_verification import SsdVerified, check_record, verify_ssd
from kvstore.settings import SsdSettings
from kvstore.sizes import format_size
from kvstore.tiers.disk import SsdDirectory
from kvstore.tiers.dram import automatic_slab_bytes

_FEWEST_RECORDS: Final = 1024
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
_GONE: Final = "it was removed, renamed or replaced; put it back, or restart the daemon"


class SsdTier:
    """The tier of one daemon.

    Args:
        settings: of the tier, with a directory.
        directory: locked; closed by ``stop``.
        recovered: what was found in it; its files are closed by ``stop``.
        ssd: the state, restored from it.
        clock: nanoseconds, monotonic.
        log: of the daemon.
    """

    def __init__(
        self,
        settings: SsdSettings,
        directory: SsdDirectory,
        recovered: Recovered,
        ssd: SsdStore,
        clock: Callable[[], int],
        log: Log,
    ) -> None:
        self.settings = settings
        self.ssd = ssd
        self.directory = directory
        self._slabs = recovered.slabs
        self._recovered = recovered
        self._recovered_records = ssd.record_count
        self._clock = clock
        self._log = log
        self._repeated = RepeatedLog(log)
        self.state = "ok"
        self.problem = ""
        self._pause_s = _FIRST_PAUSE_S
        self._well_since_ns = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._trying: asyncio.Task[None] | None = None
        self.write_errors = 0
        self.costs = LoadCosts(clock, settings.prefill_tokens_per_s)
        self._write_rate = 0.0
        self._rate_at = (0, 0)

    # -------------------------------------------------------------- life

    @classmethod
    async def open(
        cls,
        settings: SsdSettings,
        largest_slot_bytes: int,
        policy: EvictionPolicy,
        clock: Callable[[], int],
        log: Log,
        directory: SsdDirectory | None = None,
        tenants: Iterable[Tenant] = (),
    ) -> SsdTier:
        """Lock the directory and find out what it holds; nothing runs yet.

        Args:
            settings: with a directory.
            largest_slot_bytes: of the DRAM tier: slabs must hold it.
            policy: of the SSD tier.
            clock: see the class.
            log: see the class.
            directory: opened already, else it is opened here.
            tenants: those with a quota in the tier.

        Raises:
            SettingsError: the sizes are impossible, or the directory holds what this daemon must not touch.
            ResourceTaken, PermissionRefused: the directory cannot be had.
        """
        assert settings.directory is not None
        assert settings.capacity_bytes is not None
        max_records = settings.max_records or _FEWEST_RECORDS
        data_bytes = settings.capacity_bytes - index_bytes(max_records) - OTHER_BYTES
        slab_bytes = settings.slab_bytes or _slab_bytes(data_bytes, largest_slot_bytes)

        def check(slab_bytes: int) -> None:
            if data_bytes < slab_bytes or slab_bytes < largest_slot_bytes:
                raise SettingsError(_too_small(settings, max_records, slab_bytes, largest_slot_bytes))

        check(slab_bytes)
        directory = directory or SsdDirectory(settings.directory)
        # Hundreds of thousands of objects come to stay: looking through them again and again finds nothing.
        collecting = gc.isenabled()
        gc.disable()
        try:
            slab_count = data_bytes // slab_bytes
            recovered = await recover(directory, slab_bytes, settings.slab_bytes, slab_count, check)
            try:
                slab_bytes = recovered.slab_bytes
                max_records = most_records(settings, recovered.formatted_slabs * slab_bytes)
                kept = recovered.puts[-max_records:]
                slab_counts = recovered.formatted_slabs, data_bytes // slab_bytes
                ssd = restored(recovered.namespaces, kept, slab_bytes, slab_counts, policy, max_records, tenants)
                if recovered.dropped or len(kept) < len(recovered.puts):
                    # Else a later start could find them again, after they were removed.
                    await say_what_is_left(directory, recovered, ssd)
            except BaseException:
                recovered.slabs.close()
                await recovered.log.close()
                raise
        except BaseException as error:
            directory.close()
            if isinstance(error, OSError):
                raise SettingsError(
                    f"cannot use the SSD directory {settings.directory}: {error.strerror or error}; repair it, or "
                    "choose another --ssd"
                ) from None
            raise
        finally:
            if collecting:
                gc.enable()
        return cls(settings, directory, recovered, ssd, clock, log)

    def start(self, executor: Executor) -> None:
        """Begin to serve, on the running event loop; the store has this tier's state below it."""
        loop = asyncio.get_running_loop()
        settings, recovered = self.settings, self._recovered
        self._executor = executor
        self.transfers = Transfers(settings.threads, loop)
        self.groups = Groups(
            self.ssd,
            self.directory,
            recovered,
            self.transfers,
            settings.group_records,
            settings.group_ms / 1000,
            self._stored,
            self.failed,
        )
        transcoding = Transcoding(settings.transcode) if settings.transcode else None
        self.demotions = Demotions(
            executor, self.ssd, self._slabs, self.transfers, self.groups, transcoding, self.failed
        )
        self.promotions = Promotions(
            executor, self.ssd, self._slabs, self.transfers, transcoding, self._repeated, self.costs
        )
        self.promotions.failing = lambda: self.state != "ok"
        executor.demote = self.demotions.demote
        executor.hurry = self.groups.hurry
        self.formatting = Formatting(
            settings,
            self.directory,
            self.ssd,
            self._slabs,
            recovered.formatted_slabs,
            self.transfers,
            self.groups,
            self._repeated,
            lambda: self.state == "ok",
            self.failed,
            self.demotions.pump,
        )
        self.groups.start()
        self._spawn(self.formatting.run())
        executor.apply(SsdChanged(writable=True))
        for problem in (*recovered.problems, *recovered.torn):
            self._log.warning("ssd_recovery", why=problem)
        self._spawn(self.groups.tidy())
        if settings.recovery == "eager":
            self._spawn(self._verify_headers())
        recovered.puts.clear()

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            self._log.error("ssd_task_failed", error=repr(error), exc_info=error)

    async def stop(self) -> None:
        """Commit what is on its way, close the files, give the directory back."""
        tasks = [*self._tasks, *([self._trying] if self._trying is not None else [])]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.demotions.pause()
        await self.demotions.idle(5.0)
        await self.groups.stop()
        if not self.transfers.stop():
            self._log.warning("ssd_hangs", why="a read or write of the SSD does not end; the daemon ends all the same")
        self.transfers.deliver()
        self._slabs.close()
        self.directory.close()

    # -------------------------------------------------------------- groups

    def _stored(self, records: list[SsdRecord]) -> None:
        if records:
            self._executor.apply(Demoted(records))
            self._measure(sum(record.slot_bytes for record in records))
        self.demotions.pump()
        self.formatting.wake()

    def _measure(self, slot_bytes: int) -> None:
        now_ns = self._clock()
        since_ns, done = self._rate_at
        if now_ns - since_ns > 1_000_000_000:
            self._rate_at = (now_ns, slot_bytes)
            return
        done += slot_bytes
        self._rate_at = (since_ns, done)
        if done >= 8 << 20 and now_ns > since_ns:
            rate = done * 1e9 / (now_ns - since_ns)
            self._write_rate = rate if not self._write_rate else 0.9 * self._write_rate + 0.1 * rate
            self._rate_at = (now_ns, 0)

    # -------------------------------------------------------------- faults

    def failed(self, error: OSError, what: str) -> None:
        """A write or a sync failed."""
        self.write_errors += 1
        self.problem = f"{what}: {error.strerror or error}"
        if self.state == "ok":
            self.state = "read-only"
            self._log.error("ssd_degraded", why=self.problem, directory=str(self.directory.path))
            self.demotions.pause()
            self._executor.apply(SsdChanged(writable=False))
            self.groups.tell()
        if self._trying is None or self._trying.done():
            self._trying = asyncio.ensure_future(self._try_again())
            self._trying.add_done_callback(self._ended)

    async def _try_again(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
            try:
                if not self.directory.there():
                    raise OSError(errno.ENOENT, _GONE)
                await self.demotions.try_again(_LONGEST_PAUSE_S)
                await self.formatting.try_again()
                await self.groups.begin_log()
            except OSError as error:
                self.problem = f"cannot write yet: {error.strerror or error}"
                continue
            self.state, self.problem = "ok", ""
            self._well_since_ns = self._clock()
            self._log.info("ssd_recovered", directory=str(self.directory.path))
            self.demotions.resume()
            self._executor.apply(SsdChanged(writable=True))
            self.formatting.wake()
            return

    def tick(self) -> None:
        """Once a second."""
        if self.state == "ok":
            if not self.directory.there():
                self.failed(OSError(errno.ENOENT, _GONE), "cannot find the SSD directory")
            elif self._clock() - self._well_since_ns > self._pause_s * 1e9:
                self._pause_s = _FIRST_PAUSE_S
        if self.ssd.something_to_log:
            self.groups.something_ended()
        self.demotions.pump()

    # -------------------------------------------------------------- verification

    async def _verify_headers(self) -> None:
        """Look at every record once, in the background; what is damaged is dropped."""
        for block in list(self.ssd.blocks()):
            for record in list(block.parts.values()):
                await check_record(self.ssd, self._slabs, self.transfers, record, self._repeated)

    async def verify(self) -> SsdVerified:
        """Check the state and every stored record; damaged ones are dropped."""
        failing = self.state != "ok"
        return await verify_ssd(self.ssd, self._slabs, self.transfers, self._repeated, failing=failing)

    # -------------------------------------------------------------- statistics

    def statistics(self) -> SsdStats:
        """See ``SsdStats``."""
        ssd, store = self.ssd, self._executor.store
        slabs = ssd.slabs
        formatted_bytes = self.formatting.formatted * slabs.slab_bytes
        try:
            file_bytes = self.directory.used_bytes()
        except OSError:
            file_bytes = 0
        return SsdStats(
            directory=str(self.directory.path),
            state=self.state,
            problem=self.problem or self.formatting.problem,
            direct=self._slabs.direct,
            capacity_bytes=self.settings.capacity_bytes or 0,
            file_bytes=file_bytes,
            formatted_bytes=formatted_bytes,
            resident_bytes=ssd.resident_bytes,
            record_bytes=ssd.record_bytes,
            writing_bytes=ssd.writing_bytes,
            leaving_bytes=ssd.leaving_bytes,
            blocks=ssd.block_count,
            records=ssd.record_count,
            free_bytes=slabs.free_slabs * slabs.slab_bytes
            + sum(slots.free_slots * slots.slot_pages * PAGE_BYTES for slots in slabs.classes.values()),
            demoted_blocks=self.demotions.blocks,
            demoted_bytes=ssd.counters.stored_bytes,
            dropped_blocks=store.counters.dropped_blocks + self.demotions.dropped,
            promoted_blocks=self.promotions.blocks,
            promoted_bytes=self.promotions.bytes,
            evicted_blocks=ssd.counters.evicted_blocks,
            evicted_bytes=ssd.counters.evicted_bytes,
            removed_blocks=ssd.counters.removed_blocks,
            hits=self.promotions.blocks,
            refused_loads=self.costs.refused_blocks,
            not_admitted_blocks=store.counters.not_admitted_blocks,
            corrupt_records=ssd.counters.corrupt_records,
            read_errors=self.promotions.read_errors,
            write_errors=self.write_errors + self.formatting.errors,
            groups=self.groups.groups,
            log_bytes=self.groups.log_bytes,
            checkpoints=self.groups.checkpoints,
            recovered_records=self._recovered_records,
            recovery_s=self._recovered.seconds,
            read_bytes_per_s=self.costs.bytes_per_s,
            write_bytes_per_s=self._write_rate,
            waiting_blocks=self.demotions.waiting,
            retired_bytes=store.retired.slot_bytes,
            clean_bytes=store.retired.clean_bytes,
        )


def _slab_bytes(data_bytes: int, largest_slot_bytes: int) -> int:
    """A slab size: near a 64th, and where that is possible eight of the largest slots."""
    chosen = automatic_slab_bytes(max(data_bytes, 1), max(data_bytes, 1))
    eight = 8 * largest_slot_bytes
    return max(chosen, eight if data_bytes >= 8 * eight else largest_slot_bytes)


def _too_small(settings: SsdSettings, max_records: int, slab_bytes: int, largest_slot_bytes: int) -> str:
    assert settings.capacity_bytes is not None
    need = index_bytes(max_records) + OTHER_BYTES + max(slab_bytes, largest_slot_bytes)
    if slab_bytes < largest_slot_bytes:
        return (
            f"ssd slabs of {format_size(slab_bytes)} are smaller than the largest slot of the DRAM tier "
            f"({format_size(largest_slot_bytes)}); raise ssd.slab_bytes, or lower dram.slab_bytes (an SSD directory "
            "keeps the slabs that it was made with: empty it to change them)"
        )
    return (
        f"ssd.capacity_bytes ({format_size(settings.capacity_bytes)}) is too small: log and checkpoints for "
        f"{max_records} records and one slab take {format_size(need)}; raise it (--ssd-capacity), or lower "
        "ssd.max_records"
    )


__all__ = ["SsdTier"]

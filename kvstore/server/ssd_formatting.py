"""Slabs of the SSD tier: written through before slots are cut from them, some ahead of need, as far as limits allow."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
from collections.abc import Callable
from typing import Final

from kvstore.core.ssd import SsdStore
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import FIRST_SSD_PAGE
from kvstore.observability.logs import RepeatedLog
from kvstore.server.ssd_groups import Groups, index_bytes, records_in
from kvstore.server.ssd_transfers import Transfers
from kvstore.settings import SsdSettings
from kvstore.tiers.disk import SlabFile, SsdDirectory

OTHER_BYTES: Final = 2 * PAGE_BYTES
"""The slab file's first page, and the lock file."""

_SLABS_AHEAD: Final = 2
"""Slabs that are formatted before they are needed."""

_FULL_PAUSE_S: Final = 2.0
"""Between two looks at whether the file system has room again."""

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that say that there is no room, and not that the device fails."""


def most_records(settings: SsdSettings, slabs_bytes: int) -> int:
    """Records for which logs and checkpoints have room beside so many bytes of slabs."""
    assert settings.capacity_bytes is not None
    return settings.max_records or records_in(settings.capacity_bytes - OTHER_BYTES - slabs_bytes)


class Formatting:
    """Formats slabs as they are needed.

    Args:
        settings: of the tier.
        directory: its files.
        ssd: the tier's state: slabs become usable, and records that there is room for.
        slabs: the slab file.
        formatted: slabs that are formatted already.
        transfers: threads.
        groups: syncs the slab file between two groups.
        log: for what keeps the tier smaller.
        writable: whether the tier can be written.
        on_failure: called with an error of the device.
        on_change: called when there are more slabs, or there will be none for a while.

    Attributes:
        formatted: how many slabs are.
        problem: why the tier stays smaller, "" where it does not.
        errors: writes that found no room.
    """

    def __init__(
        self,
        settings: SsdSettings,
        directory: SsdDirectory,
        ssd: SsdStore,
        slabs: SlabFile,
        formatted: int,
        transfers: Transfers,
        groups: Groups,
        log: RepeatedLog,
        writable: Callable[[], bool],
        on_failure: Callable[[OSError, str], None],
        on_change: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._ssd = ssd
        self._file = slabs
        self._transfers = transfers
        self._groups = groups
        self._log = log
        self._writable = writable
        self._on_failure = on_failure
        self._on_change = on_change
        self._wake = asyncio.Event()
        self._failed = False
        self.formatted = formatted
        self.problem = ""
        self.errors = 0
        ssd.growing = formatted < len(ssd.slabs.slabs)

    def wake(self) -> None:
        """Slots were taken, or the tier can be written again."""
        self._wake.set()

    async def run(self) -> None:
        """Keep some slabs formatted ahead until all are."""
        slabs = self._ssd.slabs
        while self.formatted < len(slabs.slabs):
            pays = self._slab_pays()
            self._ssd.growing = pays
            if slabs.free_slabs >= _SLABS_AHEAD or not self._writable() or not pays:
                self._wake.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), 1.0)
                continue
            if not await self._format():
                if self._writable():
                    # The tier stays as it is until there is room again; else nothing leaves for what is only late.
                    self._ssd.growing = False
                    self._on_change()
                    await asyncio.sleep(_FULL_PAUSE_S)
                    self._ssd.growing = True
                continue
            if not await self._groups.sync():
                # It is formatted again when the tier can be written again.
                continue
            slabs.make_usable(self.formatted)
            self.formatted += 1
            self._ssd.growing = self.formatted < len(slabs.slabs)
            self._ssd.max_records = most_records(self._settings, self.formatted * slabs.slab_bytes)
            self._on_change()
        self._ssd.growing = False

    async def try_again(self) -> None:
        """After a failure: write the slab that could not be written.

        Raises:
            OSError: the device fails still.
        """
        if self._failed:
            try:
                await self._write()
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
            self._failed = False

    def _slab_pays(self) -> bool:
        """Whether the log has room for what another slab would hold: small records need more of the capacity for it."""
        if self._settings.max_records:
            return True
        slabs_bytes = (self.formatted + 1) * self._ssd.slabs.slab_bytes
        return most_records(self._settings, slabs_bytes) >= self._records_with(slabs_bytes)

    def _records_with(self, slabs_bytes: int) -> int:
        """How many records so many bytes of slabs will hold, if those to come are like those that are there."""
        ssd = self._ssd
        if not ssd.records:
            return 0
        mean_bytes = (ssd.resident_bytes + ssd.writing_bytes + ssd.leaving_bytes) / len(ssd.records)
        return max(math.ceil(slabs_bytes / mean_bytes), len(ssd.records))

    def _spare_bytes(self) -> int:
        """Free space that another slab must leave: what is others', and what log and checkpoints will take yet."""
        slabs_bytes = (self.formatted + 1) * self._ssd.slabs.slab_bytes
        records = self._settings.max_records or self._records_with(slabs_bytes)
        return self._settings.reserve_bytes + max(index_bytes(records) - self._groups.log_bytes, 0)

    async def _format(self) -> bool:
        """Write the next slab through; False where there is no room, or the device fails."""
        try:
            free_bytes = self._directory.free_bytes()
            if free_bytes - self._ssd.slabs.slab_bytes < self._spare_bytes():
                why = "the file system's free space is near ssd.reserve_bytes"
                self.problem = f"stays smaller: {why}"
                facts = {"free_bytes": free_bytes, "reserve_bytes": self._settings.reserve_bytes, "why": why}
                self._log.log_every(60, "ssd_reserve", "warning", "ssd_stays_smaller", **facts)
                return False
            await self._write()
        except OSError as error:
            if error.errno not in _NO_SPACE:
                self._failed = True
                self._on_failure(error, "cannot format a slab")
                return False
            self.problem = f"stays smaller: {error.strerror or error}"
            self._log.log_every(60, "ssd_format", "error", "ssd_stays_smaller", why=str(error))
            self.errors += 1
            return False
        self.problem = ""
        return True

    async def _write(self) -> None:
        slab_bytes = self._ssd.slabs.slab_bytes
        offset = FIRST_SSD_PAGE * PAGE_BYTES + self.formatted * slab_bytes
        try:
            await self._transfers.call(lambda: self._file.format(offset, slab_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(offset)
            raise

"""Verifies an SSD directory that no daemon uses: the files, the state that they describe, every record.

Without repair nothing on the disk is changed, but for the lock while it runs. With repair the directory is recovered as
a daemon would do it, damaged records are dropped, and a checkpoint says what is left.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from kvstore.core.ssd import SsdStore
from kvstore.errors import SettingsError
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import FIRST_SSD_PAGE, SlabsHeader, parse_name
from kvstore.policy.lru import Lru
from kvstore.server.ssd_recovery import recover, restored, say_what_is_left
from kvstore.server.ssd_scan import Scanned, read_header, scan
from kvstore.server.ssd_transfers import Transfers
from kvstore.server.ssd_verification import verify_ssd
from kvstore.tiers.disk import SLABS_NAME, SlabFile, SsdDirectory

_REMEDY: Final = "ask it with 'kvstore verify' without --ssd, or stop it"
_THREADS: Final = 8
_ANY_NUMBER: Final = 1 << 62


@dataclass(slots=True, kw_only=True)
class SsdReport:
    """What was found.

    Attributes:
        direct: whether records were read past the page cache.
        file_bytes: that all files occupy on the file system.
        slabs, slab_bytes: of the slab file.
        free_bytes: of its slabs, in no record's slot.
        logs, log_bytes, checkpoint_bytes: logs behind the last whole checkpoint, and that (0: there is none).
        bytes, seconds: records read, and how long that took.
        notes: what is remarkable and harms nothing.
        problems: what is wrong. With ``repaired``: what was.
        dropped: records that are in the files' account and cannot be had: damaged, or given up.
    """

    directory: str
    direct: bool = False
    file_bytes: int = 0
    slabs: int = 0
    slab_bytes: int = 0
    free_bytes: int = 0
    logs: int = 0
    log_bytes: int = 0
    checkpoint_bytes: int = 0
    namespaces: int = 0
    blocks: int = 0
    records: int = 0
    bytes: int = 0
    seconds: float = 0.0
    dropped: int = 0
    repaired: bool = False
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify_directory(path: Path, *, repair: bool) -> SsdReport:
    """Verify the SSD directory at ``path``.

    Args:
        path: of a store that is there.
        repair: drop what is damaged, durably, and replace all logs by a checkpoint.

    Raises:
        SettingsError: it holds no store that this version knows, or cannot be read or written.
        ResourceTaken: a daemon has it.
        PermissionRefused: it is not there, or another user's.
    """
    if not path.is_dir():
        raise SettingsError(f"there is no directory {path}; say where the SSD tier is (--ssd DIR)")
    directory = SsdDirectory(path, remedy=_REMEDY, read_only=not repair)
    try:
        report = SsdReport(directory=str(path))
        asyncio.run(_verify(directory, report, repair=repair))
        return report
    except OSError as error:
        what = "repair" if repair else "read"
        raise SettingsError(f"cannot {what} the SSD directory {path}: {error.strerror or error}") from None
    finally:
        directory.close()


async def _verify(directory: SsdDirectory, report: SsdReport, *, repair: bool) -> None:
    names = directory.names()
    if SLABS_NAME not in names:
        raise SettingsError(f"{directory.path} holds no SSD tier: there is no file '{SLABS_NAME}' in it")
    strangers = [name for name in names if parse_name(name) is None and name != SLABS_NAME]
    if strangers:
        report.notes.append(f"files that are not the tier's: {', '.join(strangers)}")
    slabs = directory.open_slabs(create=False)
    try:
        header = read_header(directory, slabs, None)
        if header is None:
            report.notes.append("the store is empty: its first page was never written")
            return
        found = scan(directory, header, names)
        stale = [name for name in names if parse_name(name) is not None and name not in found.names]
        if stale:
            report.notes.append(f"files that the checkpoint has replaced: {', '.join(stale)}")
        report.direct = slabs.direct
        report.problems += found.problems
        report.notes += found.torn
        report.logs = sum(name.startswith("log") for name in found.names)
        report.log_bytes, report.checkpoint_bytes = found.log_bytes, found.checkpoint_bytes
        ssd = _state(slabs, header, found, report)
        if not repair:
            await _read_all(ssd, slabs, report)
    finally:
        slabs.close()
    if repair:
        await _repair(directory, header, report)
    report.file_bytes = directory.used_bytes()


def _state(slabs: SlabFile, header: SlabsHeader, found: Scanned, report: SsdReport) -> SsdStore:
    """What a daemon would restore; whether the files' account agrees with itself and with the slab file."""
    page_bytes = FIRST_SSD_PAGE * PAGE_BYTES
    report.slab_bytes = header.slab_bytes
    report.slabs, rest = divmod(max(slabs.size_bytes - page_bytes, 0), header.slab_bytes)
    if rest:
        report.notes.append(f"the slab file ends with {rest} bytes of a slab that was not formatted to its end")
    said = sorted((put.slot, put.slot_pages) for put in found.state.slots.values())
    end = FIRST_SSD_PAGE + report.slabs * header.slab_bytes // PAGE_BYTES
    report.problems += [
        f"the record of slot {slot} lies behind the end of the slab file" for slot, pages in said if slot + pages > end
    ]
    report.problems += [
        f"the records of slots {slot} and {after} overlap"
        for (slot, pages), (after, _) in pairwise(said)
        if slot + pages > after
    ]
    puts = found.state.settle(header.slab_bytes, FIRST_SSD_PAGE, report.slabs)
    namespaces, counts = list(found.state.namespaces.values()), (report.slabs, report.slabs)
    ssd = restored(namespaces, puts, header.slab_bytes, counts, Lru(), _ANY_NUMBER)
    report.dropped = found.state.dropped + len(puts) - ssd.record_count
    if report.dropped:
        report.problems.append(f"{report.dropped} records were given up: they contradict others, or are in doubt")
    report.namespaces = sum(bool(namespace.tree.blocks) for namespace in ssd.namespaces.values())
    report.blocks = ssd.block_count
    report.free_bytes = report.slabs * header.slab_bytes - ssd.resident_bytes
    return ssd


async def _read_all(ssd: SsdStore, slabs: SlabFile, report: SsdReport) -> None:
    begin = time.monotonic()
    transfers = Transfers(_THREADS, asyncio.get_running_loop())
    try:
        verified = await verify_ssd(ssd, slabs, transfers, None, at_once=2 * _THREADS)
    finally:
        transfers.stop()
    report.records, report.bytes = verified.records, verified.record_bytes
    report.problems += verified.problems
    report.dropped += ssd.counters.corrupt_records
    report.seconds = time.monotonic() - begin


async def _repair(directory: SsdDirectory, header: SlabsHeader, report: SsdReport) -> None:
    """Recover as a daemon does, drop what is damaged, and say what is left."""
    recovered = await recover(directory, header.slab_bytes, None, None)
    try:
        counts = recovered.formatted_slabs, recovered.formatted_slabs
        ssd = restored(recovered.namespaces, recovered.puts, header.slab_bytes, counts, Lru(), _ANY_NUMBER)
        await _read_all(ssd, recovered.slabs, report)
        await say_what_is_left(directory, recovered, ssd)
        report.repaired = bool(report.problems)
    finally:
        recovered.slabs.close()
        await recovered.log.close()

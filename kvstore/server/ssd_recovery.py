"""Open the SSD directory and find out what it holds: checkpoint, logs, slab file; see ``docs/ssd-format.md``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd import SsdStore
from kvstore.core.tenants import Tenant
from kvstore.errors import SettingsError
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import (
    FIRST_SSD_PAGE,
    LOG_MAGIC,
    STORE_ID_BYTES,
    NumberedHeader,
    SlabsHeader,
    checkpoint_name,
    encode_numbered_header,
    encode_slabs_header,
    log_name,
    parse_name,
)
from kvstore.format.ssd_log import NamespaceEntry, PutEntry
from kvstore.policy.base import EvictionPolicy
from kvstore.server.ssd_checkpoint import write_checkpoint
from kvstore.server.ssd_scan import aligned_page, read_header, scan
from kvstore.tiers.disk import SLABS_NAME, AppendFile, SlabFile, SsdDirectory


@dataclass(slots=True)
class Recovered:
    """What was found, and the open files.

    Attributes:
        slab_bytes, formatted_slabs: of the slab file.
        log_number: of the log that is appended to; made anew.
        names: of the checkpoint and the logs behind it, which the next checkpoint replaces.
        checkpoint_bytes, old_log_bytes: of them.
        dropped: records that were given up.
        problems, torn: see ``Scanned``.
        seconds: how long it took.
    """

    slabs: SlabFile
    log: AppendFile
    store_id: bytes
    slab_bytes: int
    formatted_slabs: int
    log_number: int
    namespaces: list[NamespaceEntry] = field(default_factory=list)
    puts: list[PutEntry] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    checkpoint_bytes: int = 0
    old_log_bytes: int = 0
    dropped: int = 0
    problems: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    seconds: float = 0.0


async def new_log(directory: SsdDirectory, number: int, store_id: bytes) -> AppendFile:
    """Begin a log of that number.

    Raises:
        OSError: it cannot be made.
    """
    return await directory.create_log(
        log_name(number), encode_numbered_header(NumberedHeader(LOG_MAGIC, number, store_id))
    )


async def recover(
    directory: SsdDirectory,
    slab_bytes: int,
    wanted_slab_bytes: int | None,
    slab_count: int | None,
    check: Callable[[int], None] = lambda slab_bytes: None,
) -> Recovered:
    """Read the directory, or begin a new store in an empty one.

    Args:
        directory: locked.
        slab_bytes: of slabs of a new store.
        wanted_slab_bytes: what the user set, None for what there is.
        slab_count: slabs that there may be, for slabs of ``slab_bytes``; as many bytes where they have another size.
            None: those that there are.
        check: called with the size of the slabs that are there before anything is changed; raises what is wrong.

    Raises:
        SettingsError: it holds a store that this daemon must not touch: another format, another layout, other files.
        OSError: it cannot be read or written.
    """
    begin = time.monotonic()
    names = directory.names()
    if SLABS_NAME not in names:
        _refuse_strangers(directory, names)
        for name in names:
            directory.remove(name)
        return await _create(directory, slab_bytes)
    slabs = directory.open_slabs(create=False)
    try:
        header = read_header(directory, slabs, wanted_slab_bytes)
        if header is None:
            # Its first page was never written whole: nothing was ever promised.
            _refuse_strangers(directory, names)
            slabs.close()
            for name in names:
                directory.remove(name)
            return await _create(directory, slab_bytes)
        check(header.slab_bytes)
        if slab_count is not None and header.slab_bytes != slab_bytes:
            slab_count = slab_count * slab_bytes // header.slab_bytes
        return await _read(directory, slabs, header, names, slab_count, begin)
    except BaseException:
        slabs.close()
        raise


def restored(
    namespaces: list[NamespaceEntry],
    puts: list[PutEntry],
    slab_bytes: int,
    slab_counts: tuple[int, int],
    policy: EvictionPolicy,
    max_records: int,
    tenants: Iterable[Tenant] = (),
) -> SsdStore:
    """The state that the files describe.

    Args:
        namespaces: of the tier.
        puts: records that agree with each other, oldest use first.
        slab_bytes: of the slab file.
        slab_counts: slabs that are there, and that there may be.
        policy: of the tier.
        max_records: at least as many as there are.
        tenants: those with a quota in the tier.
    """
    there, most = slab_counts
    slabs = SlabAllocator(most, slab_bytes, FIRST_SSD_PAGE, most_joined=1)
    for index in range(there):
        slabs.make_usable(index)
    ssd = SsdStore(slabs, policy, max_records, tenants)
    ssd.restore(namespaces, puts)
    ssd.keep_quotas()
    return ssd


async def say_what_is_left(directory: SsdDirectory, recovered: Recovered, ssd: SsdStore) -> None:
    """Replace the files that still speak of records that were dropped.

    Raises:
        OSError: that cannot be written.
    """
    recovered.checkpoint_bytes = await write_checkpoint(directory, ssd, recovered.log_number, recovered.store_id)
    recovered.old_log_bytes = 0
    for name in recovered.names:
        directory.remove(name)
    recovered.names = [checkpoint_name(recovered.log_number)]


def _refuse_strangers(directory: SsdDirectory, names: list[str]) -> None:
    strangers = [name for name in names if parse_name(name) is None and name != SLABS_NAME]
    if strangers:
        raise SettingsError(
            f"ssd.directory {directory.path} holds other files ({', '.join(strangers[:3])}"
            f"{', ...' if len(strangers) > 3 else ''}); give the SSD tier a directory of its own"
        )


async def _create(directory: SsdDirectory, slab_bytes: int) -> Recovered:
    store_id = secrets.token_bytes(STORE_ID_BYTES)
    slabs = directory.open_slabs(create=True)
    try:
        page = aligned_page()
        page[:] = encode_slabs_header(SlabsHeader(slab_bytes, store_id))
        slabs.write(0, [page])
        slabs.sync()
        log = await new_log(directory, 0, store_id)
    except BaseException:
        slabs.close()
        raise
    return Recovered(slabs, log, store_id, slab_bytes, 0, 0)


async def _read(
    directory: SsdDirectory,
    slabs: SlabFile,
    header: SlabsHeader,
    names: list[str],
    slab_count: int | None,
    begin: float,
) -> Recovered:
    for number in sorted(number for kind, number in filter(None, map(parse_name, names)) if kind == "log"):
        # What an earlier life wrote counts from now on, so it must not vanish any more.
        await directory.sync_file(log_name(number))
    found = scan(directory, header, names)
    state = found.state
    formatted = max(slabs.size_bytes - FIRST_SSD_PAGE * PAGE_BYTES, 0) // header.slab_bytes
    if slab_count is not None and formatted > slab_count:
        slabs.truncate(FIRST_SSD_PAGE * PAGE_BYTES + slab_count * header.slab_bytes)
        formatted = slab_count
    puts = state.settle(header.slab_bytes, FIRST_SSD_PAGE, formatted)
    last = found.last_number + 1
    log = await new_log(directory, last, header.store_id)
    # The name of the checkpoint is durable with that of the log: nothing before it is needed any more.
    kept = list(found.names)
    for kind, number in filter(None, map(parse_name, names)):
        name = log_name(number) if kind == "log" else checkpoint_name(number)
        if name not in kept:
            try:
                directory.remove(name)
            except OSError:
                kept.append(name)
    return Recovered(
        slabs,
        log,
        header.store_id,
        header.slab_bytes,
        formatted,
        last,
        list(state.namespaces.values()),
        puts,
        kept,
        found.checkpoint_bytes,
        found.log_bytes,
        state.dropped,
        found.problems,
        found.torn,
        time.monotonic() - begin,
    )

"""Open the SSD directory and find out what it holds: checkpoint, logs, slab file; see ``docs/ssd-format.md``."""

from __future__ import annotations

import mmap
import secrets
import time
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_replay import Replayed
from kvstore.errors import CorruptRecord, SettingsError
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import (
    CHECKPOINT_MAGIC,
    FILE_HEADER_BYTES,
    FIRST_SSD_PAGE,
    LOG_MAGIC,
    STORE_ID_BYTES,
    NumberedHeader,
    OtherFormat,
    SlabsHeader,
    checkpoint_name,
    decode_numbered_header,
    decode_slabs_header,
    encode_numbered_header,
    encode_slabs_header,
    log_name,
    parse_name,
)
from kvstore.format.ssd_log import Frames, NamespaceEntry, PutEntry
from kvstore.policy.base import EvictionPolicy
from kvstore.server.ssd_checkpoint import write_checkpoint
from kvstore.sizes import format_size
from kvstore.tiers.disk import SLABS_NAME, AppendFile, SlabFile, SsdDirectory

_MOST_FILE_BYTES: Final = 16 << 30


@dataclass(slots=True)
class Recovered:
    """What was found, and the open files.

    Attributes:
        slab_bytes, formatted_slabs: of the slab file.
        log_number: of the log that is appended to; made anew.
        names: of the checkpoint and the logs behind it, which the next checkpoint replaces.
        checkpoint_bytes, old_log_bytes: of them.
        dropped: records that were given up.
        problems: what could not be read, for the log.
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
    seconds: float = 0.0


def aligned_page() -> memoryview:
    """A page for O_DIRECT."""
    return memoryview(mmap.mmap(-1, PAGE_BYTES))


async def new_log(directory: SsdDirectory, number: int, store_id: bytes) -> AppendFile:
    """Begin a log of that number.

    Raises:
        OSError: it cannot be made.
    """
    return await directory.create_log(
        log_name(number), encode_numbered_header(NumberedHeader(LOG_MAGIC, number, store_id))
    )


async def recover(
    directory: SsdDirectory, slab_bytes: int, wanted_slab_bytes: int | None, slab_count: int
) -> Recovered:
    """Read the directory, or begin a new store in an empty one.

    Args:
        directory: locked.
        slab_bytes: of slabs of a new store.
        wanted_slab_bytes: what the user set, None for what there is.
        slab_count: slabs that there may be, for slabs of ``slab_bytes``; as many bytes where they have another size.

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
        header = _read_header(directory, slabs, wanted_slab_bytes)
        if header is None:
            # Its first page was never written whole: nothing was ever promised.
            slabs.close()
            for name in (*names, SLABS_NAME):
                directory.remove(name)
            return await _create(directory, slab_bytes)
        if header.slab_bytes != slab_bytes:
            slab_count = slab_count * slab_bytes // header.slab_bytes
        return await _read(directory, slabs, header, names, slab_count, begin)
    except BaseException:
        slabs.close()
        raise


def restored(recovered: Recovered, slab_count: int, policy: EvictionPolicy, max_records: int) -> SsdStore:
    """The state that the files describe, for a slab file of so many slabs; what there is no room for is dropped."""
    slabs = SlabAllocator(slab_count, recovered.slab_bytes, FIRST_SSD_PAGE, most_joined=1)
    for index in range(recovered.formatted_slabs):
        slabs.make_usable(index)
    ssd = SsdStore(slabs, policy, max_records)
    kept = recovered.puts[-max_records:]
    recovered.dropped += len(recovered.puts) - len(kept)
    ssd.restore(recovered.namespaces, kept)
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
    strangers = [name for name in names if parse_name(name) is None]
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


def _read_header(directory: SsdDirectory, slabs: SlabFile, wanted_slab_bytes: int | None) -> SlabsHeader | None:
    page = aligned_page()
    if slabs.size_bytes < PAGE_BYTES:
        return None
    slabs.read(0, [page])
    if not any(page):
        return None
    where = f"the SSD directory {directory.path}"
    try:
        header = decode_slabs_header(bytes(page))
    except OtherFormat as error:
        raise SettingsError(
            f"{where}: {error}; start the version that wrote it, or empty the directory (its blocks are lost)"
        ) from None
    except CorruptRecord as error:
        raise SettingsError(f"{where}: {error}; empty the directory (its blocks are lost), or choose another") from None
    if wanted_slab_bytes is not None and wanted_slab_bytes != header.slab_bytes:
        raise SettingsError(
            f"{where} has slabs of {format_size(header.slab_bytes)}, ssd.slab_bytes says "
            f"{format_size(wanted_slab_bytes)}; leave the setting out, or empty the directory (its blocks are lost)"
        )
    return header


async def _read(
    directory: SsdDirectory, slabs: SlabFile, header: SlabsHeader, names: list[str], slab_count: int, begin: float
) -> Recovered:
    numbers: dict[str, list[int]] = {"log": [], "checkpoint": []}
    for name in names:
        parsed = parse_name(name)
        if parsed is not None:
            numbers[parsed[0]].append(parsed[1])
    problems: list[str] = []
    state, first, checkpoint_bytes = _checkpoint(
        directory, header.store_id, sorted(numbers["checkpoint"], reverse=True), problems
    )
    log_bytes = 0
    expected = first
    for number in sorted(numbers["log"]):
        if number < first:
            continue
        name = log_name(number)
        # What an earlier life wrote counts from now on, so it must not vanish any more.
        await directory.sync_file(name)
        data = directory.read_bytes(name, _MOST_FILE_BYTES)
        log_bytes += len(data)
        if number != expected:
            problems.append(f"{log_name(expected)} is missing")
            state.doubt()
        expected = number + 1
        _log(data, number, header.store_id, state, problems)
    formatted = max(slabs.size_bytes - FIRST_SSD_PAGE * PAGE_BYTES, 0) // header.slab_bytes
    if formatted > slab_count:
        slabs.truncate(FIRST_SSD_PAGE * PAGE_BYTES + slab_count * header.slab_bytes)
        formatted = slab_count
    puts = state.settle(header.slab_bytes, FIRST_SSD_PAGE, formatted)
    last = max([*numbers["log"], *numbers["checkpoint"], -1]) + 1
    log = await new_log(directory, last, header.store_id)
    # The name of the checkpoint is durable with that of the log: nothing before it is needed any more.
    kept = [checkpoint_name(first)] if checkpoint_bytes else []
    kept += [log_name(number) for number in sorted(numbers["log"]) if number >= first]
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
        checkpoint_bytes,
        log_bytes,
        state.dropped,
        problems,
        time.monotonic() - begin,
    )


def _checkpoint(
    directory: SsdDirectory, store_id: bytes, numbers: list[int], problems: list[str]
) -> tuple[Replayed, int, int]:
    """The newest checkpoint that is whole, the number of the first log behind it, and its size in bytes."""
    for number in numbers:
        name = checkpoint_name(number)
        state = Replayed()
        try:
            data = directory.read_bytes(name, _MOST_FILE_BYTES)
            found = decode_numbered_header(data, CHECKPOINT_MAGIC)
            if (found.number, found.store_id) != (number, store_id):
                raise CorruptRecord("it is of another store")
            frames = Frames(data, FILE_HEADER_BYTES)
            for entries in frames:
                state.take(entries)
            if frames.problem or not state.complete:
                raise CorruptRecord(frames.problem or "its end is missing")
        except (CorruptRecord, OSError) as error:
            problems.append(f"{name}: {error}")
            continue
        return state, number, len(data)
    return Replayed(), 0, 0


def _log(data: bytes, number: int, store_id: bytes, state: Replayed, problems: list[str]) -> None:
    name = log_name(number)
    try:
        found = decode_numbered_header(data, LOG_MAGIC)
        if (found.number, found.store_id) != (number, store_id):
            raise CorruptRecord("it is of another store")
    except CorruptRecord as error:
        if len(data) > FILE_HEADER_BYTES:
            problems.append(f"{name}: {error}")
            state.doubt()
        return
    frames = Frames(data, FILE_HEADER_BYTES)
    while True:
        for entries in frames:
            state.take(entries)
        if not frames.problem:
            return
        problem = f"{name}: {frames.problem}"
        if not frames.skip():
            # A torn tail: nobody was told that it is durable.
            problems.append(f"{problem}; cut there")
            return
        problems.append(f"{problem}; what was stored before is given up")
        state.doubt()

"""Reads what the SSD directory's files say, and changes nothing: the newest whole checkpoint, the logs behind it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.ssd_replay import Replayed
from kvstore.errors import CorruptRecord, SettingsError
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import (
    CHECKPOINT_MAGIC,
    FILE_HEADER_BYTES,
    LOG_MAGIC,
    OtherFormat,
    SlabsHeader,
    checkpoint_name,
    decode_numbered_header,
    decode_slabs_header,
    log_name,
    parse_name,
)
from kvstore.format.ssd_log import Frames
from kvstore.sizes import format_size
from kvstore.tiers.disk import SlabFile, SsdDirectory

_MOST_FILE_BYTES: Final = 16 << 30


@dataclass(slots=True)
class Scanned:
    """What was found.

    Attributes:
        names: of the checkpoint and the logs behind it; other logs and checkpoints are worth nothing.
        checkpoint_bytes, log_bytes: of them.
        last_number: the highest of any log or checkpoint, -1 where there is none.
        problems: what is broken, so that records were given up.
        torn: logs that end within a frame, as an end of the process or machine leaves them.
    """

    state: Replayed
    names: list[str] = field(default_factory=list)
    checkpoint_bytes: int = 0
    log_bytes: int = 0
    last_number: int = -1
    problems: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)


def aligned_page() -> memoryview:
    """A page for O_DIRECT."""
    return memoryview(mmap.mmap(-1, PAGE_BYTES))


def read_header(directory: SsdDirectory, slabs: SlabFile, wanted_slab_bytes: int | None) -> SlabsHeader | None:
    """What the slab file's first page says; None where it was never written.

    Raises:
        SettingsError: it is of another version, of other slabs than the user wants, or broken.
        OSError: it cannot be read.
    """
    page = aligned_page()
    size_bytes = slabs.size_bytes
    if size_bytes < PAGE_BYTES:
        return None
    slabs.read(0, [page])
    if size_bytes == PAGE_BYTES and not any(page):
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


def scan(directory: SsdDirectory, header: SlabsHeader, names: list[str]) -> Scanned:
    """Read the checkpoint and the logs.

    Args:
        directory: locked.
        header: of its slab file.
        names: of its files.

    Raises:
        OSError: a log cannot be read.
    """
    numbers: dict[str, list[int]] = {"log": [], "checkpoint": []}
    for kind, number in filter(None, map(parse_name, names)):
        numbers[kind].append(number)
    problems: list[str] = []
    state, first, size_bytes = _checkpoint(
        directory, header.store_id, sorted(numbers["checkpoint"], reverse=True), problems
    )
    found = Scanned(state, checkpoint_bytes=size_bytes, problems=problems)
    found.last_number = max([*numbers["log"], *numbers["checkpoint"], -1])
    if size_bytes:
        found.names.append(checkpoint_name(first))
    expected = first
    for number in sorted(numbers["log"]):
        if number < first:
            continue
        name = log_name(number)
        data = directory.read_bytes(name, _MOST_FILE_BYTES)
        found.names.append(name)
        found.log_bytes += len(data)
        if number != expected:
            problems.append(f"{log_name(expected)} is missing")
            state.doubt()
        expected = number + 1
        _log(data, number, header.store_id, found)
    return found


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


def _log(data: bytes, number: int, store_id: bytes, found: Scanned) -> None:
    state, problems = found.state, found.problems
    name = log_name(number)
    try:
        header = decode_numbered_header(data, LOG_MAGIC)
        if (header.number, header.store_id) != (number, store_id):
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
            found.torn.append(f"{problem}; cut there")
            return
        problems.append(f"{problem}; what was stored before is given up")
        state.doubt()

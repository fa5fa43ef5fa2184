"""Reads records on the SSD to verify them: the header, the identity, the payload's checksum, the padding."""

from __future__ import annotations

import asyncio
import mmap
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_invariants import validate_ssd
from kvstore.core.ssd_record import SsdRecord, SsdState
from kvstore.errors import CorruptRecord, InvariantViolation
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.record import RecordHeader, decode_record, padding_is_zero
from kvstore.observability.logs import RepeatedLog
from kvstore.server.ssd_transfers import Transfers
from kvstore.tiers.disk import SlabFile

_MOST_PROBLEMS: Final = 100


@dataclass(slots=True)
class SsdVerified:
    """What a verification found."""

    records: int = 0
    record_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify_slot(slot: memoryview, record: SsdRecord) -> RecordHeader:
    """Check what lies in a record's slot; its header.

    Raises:
        CorruptRecord: naming what is wrong.
    """
    header, payload = decode_record(slot[: record.record_bytes])
    payload.release()
    if (header.key, header.part, header.parent_key) != (record.key, record.part, record.parent_key):
        raise CorruptRecord("the record in the slot is of another block")
    if header.namespace_digest != record.namespace.digest:
        raise CorruptRecord("the record in the slot is of another namespace")
    if header.payload_checksum != record.checksum:
        raise CorruptRecord("the record in the slot is not the one that was written")
    if not padding_is_zero(slot, record.record_bytes):
        raise CorruptRecord("the slot's padding is not zero")
    return header


async def check_record(
    ssd: SsdStore,
    slabs: SlabFile,
    transfers: Transfers,
    record: SsdRecord,
    log: RepeatedLog | None,
    *,
    failing: bool = False,
) -> str:
    """Read and verify a stored record; what is wrong with it, in which case it is dropped, or "".

    ``failing``: it is known that the device fails, and a record that cannot be read is kept.
    """
    if record.state is not SsdState.STORED:
        return ""
    ssd.hold(record)
    problem = ""
    try:
        memory = memoryview(mmap.mmap(-1, record.slot_bytes))

        def work() -> None:
            slabs.read(record.slot * PAGE_BYTES, [memory])
            verify_slot(memory, record)

        try:
            await transfers.call(work)
        except CorruptRecord as error:
            problem = str(error)
        except OSError as error:
            problem = str(error)
            if failing:
                return problem
        if problem and record.state is SsdState.STORED:
            if log is not None:
                key = record.key.hex()
                log.log_every(1, "corrupt_ssd_record", "error", "corrupt_ssd_record", block=key, why=problem)
            ssd.corrupt(record)
    finally:
        ssd.let_go(record)
    return problem


async def verify_ssd(
    ssd: SsdStore,
    slabs: SlabFile,
    transfers: Transfers,
    log: RepeatedLog | None,
    at_once: int = 1,
    *,
    failing: bool = False,
) -> SsdVerified:
    """Verify the whole tier. Damaged records are dropped; they are named in ``problems`` (the first 100).

    Args:
        ssd: its state.
        slabs: its file.
        transfers: threads that read.
        log: for damaged records, None for none.
        at_once: records that are read at a time; with few, clients wait less for theirs.
        failing: see ``check_record``.
    """
    found = SsdVerified()
    try:
        validate_ssd(ssd)
    except InvariantViolation as error:
        found.problems.append(f"state: {error}")
    more = 0
    records = sorted((record for block in ssd.blocks() for record in block.parts.values()), key=lambda it: it.slot)
    for begin in range(0, len(records), at_once):
        some = [record for record in records[begin : begin + at_once] if record.state is SsdState.STORED]
        problems = await asyncio.gather(
            *[check_record(ssd, slabs, transfers, record, log, failing=failing) for record in some]
        )
        for record, problem in zip(some, problems, strict=True):
            found.records += 1
            found.record_bytes += record.record_bytes
            if problem and len(found.problems) < _MOST_PROBLEMS:
                found.problems.append(f"SSD: key {record.key.hex()} part {record.part}: {problem}")
            elif problem:
                more += 1
    if more:
        found.problems.append(f"SSD: and {more} more")
    return found

"""Checks the store's invariants and every resident record, a few MiB at a time between requests."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from kvstore.core.block import RecordState
from kvstore.core.events import FoundCorrupt
from kvstore.core.invariants import validate_state
from kvstore.errors import CorruptRecord, InvariantViolation
from kvstore.server.executor import Executor
from kvstore.server.ssd import SsdTier

_BYTES_BETWEEN_REQUESTS: Final = 4 << 20
_MAX_PROBLEMS: Final = 100


@dataclass(slots=True)
class Verified:
    """What a verification found."""

    records: int
    record_bytes: int
    seconds: float
    problems: list[str]


async def verify(executor: Executor, ssd: SsdTier | None = None) -> Verified:
    """Verify all tiers. Corrupt records leave the store; they are named in ``problems`` (the first 100)."""
    begin = time.monotonic()
    store = executor.store
    problems: list[str] = []
    try:
        validate_state(store)
    except InvariantViolation as error:
        problems.append(f"state: {error}")
    records = checked_bytes = since = more = 0
    for record in list(store.records.values()):
        if record.state is not RecordState.RESIDENT or record.block is None:
            continue
        key = record.block.key
        try:
            header = executor.arena.verify(record.slot, record.slot_bytes, record.record_bytes, key, record.part)
            if header.namespace_digest != record.block.namespace.digest:
                raise CorruptRecord("the record is of another namespace")
        except CorruptRecord as error:
            if len(problems) < _MAX_PROBLEMS:
                problems.append(f"key {key.hex()} part {record.part}: {error}")
            else:
                more += 1
            executor.apply(FoundCorrupt(record.slot, str(error)))
        records += 1
        checked_bytes += record.record_bytes
        since += record.slot_bytes
        if since >= _BYTES_BETWEEN_REQUESTS:
            since = 0
            await asyncio.sleep(0)
    if more:
        problems.append(f"and {more} more")
    if ssd is not None:
        below = await ssd.verify()
        records += below.records
        checked_bytes += below.record_bytes
        problems += below.problems
    return Verified(records, checked_bytes, time.monotonic() - begin, problems)

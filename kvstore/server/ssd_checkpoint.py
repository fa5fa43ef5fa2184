"""Checkpoints of the SSD tier: everything that the logs before one said, in one file that replaces them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from kvstore.core.ssd import SsdStore
from kvstore.format.ssd_files import CHECKPOINT_MAGIC, NumberedHeader, checkpoint_name, encode_numbered_header
from kvstore.format.ssd_log import EndEntry, encode_entry, encode_frame, frame_seed
from kvstore.tiers.disk import SsdDirectory

_RECORDS_A_FRAME: Final = 1024


async def write_checkpoint(directory: SsdDirectory, ssd: SsdStore, number: int, store_id: bytes) -> int:
    """Write the checkpoint that goes with the log of a number; its size in bytes.

    It says what holds now, which may be later than when that log began: saying the log's entries again changes nothing.

    Raises:
        OSError: whether it is there is not known; if it is, it is whole.
    """
    return await directory.write_whole(checkpoint_name(number), _chunks(ssd, number, store_id))


async def _chunks(ssd: SsdStore, number: int, store_id: bytes) -> AsyncIterator[bytes]:
    namespaces, records = ssd.snapshot()
    header = encode_numbered_header(NumberedHeader(CHECKPOINT_MAGIC, number, store_id))
    seed = frame_seed(header)
    yield header
    yield encode_frame(seed, 0, [encode_entry(entry) for entry in namespaces])
    sequence = 1
    for begin in range(0, len(records), _RECORDS_A_FRAME):
        some = records[begin : begin + _RECORDS_A_FRAME]
        entries = [encode_entry(ssd.put_entry(record, used)) for record, used in some]
        yield encode_frame(seed, sequence, entries)
        sequence += 1
        await asyncio.sleep(0)
    yield encode_frame(seed, sequence, [encode_entry(EndEntry(len(records)))])

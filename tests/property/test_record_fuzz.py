"""Mutated records against the strict decoder and the codecs: refused, or right to the byte; never more memory.

A quarter of a million of them, of all codecs. What a record is, is said twice: by the decoder, and by ``is_record``.
"""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
from collections import Counter

import pytest
import xxhash
from record_mutations import MOST, Mutator, bases, is_record

from kvstore.errors import CorruptRecord
from kvstore.format.constants import DTYPE_SIZES, EXACT_CODECS
from kvstore.format.record import decode_header, decode_record, encode_header

MUTATIONS = 250_000
KINDS = 10


def check(record: bytes) -> str:
    """Decode, and compare what comes of it with what the page says."""
    try:
        header, payload = decode_record(record)
    except CorruptRecord as error:
        if is_record(record):
            raise AssertionError(f"refused: {record[:256].hex()}") from error
        return "refused"
    assert is_record(record), f"accepted: {record[:256].hex()}"
    assert encode_header(header) == record[:256]
    assert payload == record[256:]
    assert header.payload_checksum == xxhash.xxh3_64_intdigest(record[256:])
    assert header.record_bytes == len(record) <= MOST
    assert (header.fidelity == 255) == (header.codec in EXACT_CODECS)
    assert header.effective_fidelity == min(record[190], 255 - record[191])
    logical_bytes = DTYPE_SIZES[header.dtype]
    for extent in header.shape:
        logical_bytes *= extent
    assert logical_bytes <= MOST
    return "accepted"


def test_bases_are_records_of_every_codec():
    assert {base.codec for base in bases()} == {
        *("raw", "lossless", "lossless-zstd", "fp8", "int8", "int4", "kivi4", "kivi2"),
        *("turbo4", "turbo3", "turbo2", "turbo4-3", "turbo3-2"),
        *("centred4", "centred3", "centred2", "centred4-3", "centred4-2", "centred3-2"),
    }
    assert len(bases()) > 30
    for base in bases():
        assert check(base.record) == "accepted"


@pytest.mark.timeout(170)
def test_records_mutated_are_refused_or_right():
    mutator = Mutator(seed=4)
    outcomes: Counter[str] = Counter()
    begin = time.monotonic()
    for _ in range(MUTATIONS):
        outcomes[check(mutator.one())] += 1
    print(f"{outcomes} of {mutator.made} in {time.monotonic() - begin:.1f} s")
    assert outcomes.total() == MUTATIONS >= 200_000
    assert outcomes["accepted"] > MUTATIONS / 20
    assert outcomes["refused"] > MUTATIONS / 2
    assert len(mutator.made) == KINDS
    assert min(mutator.made.values()) > 2000


def test_headers_of_huge_blocks_cost_no_memory():
    """Neither those that are refused nor those that are not: the decoder allocates a header, whatever it says."""
    mutator = Mutator(seed=5)
    records = [mutator.one() for _ in range(3000)]
    for record in list(records[:200]):
        if len(record) < 256:
            continue
        huge = bytearray(record)
        struct.pack_into("<6I", huge, 160, 1 << 14, 1 << 16, 1, 1, 1, 1)
        struct.pack_into("<4Q", huge, 192, 1 << 30, 1 << 29, 0, 0)
        struct.pack_into("<Q", huge, 16, 256 + (1 << 30) + (1 << 29))
        struct.pack_into("<Q", huge, 248, xxhash.xxh3_64_intdigest(huge[:248]))
        records.append(bytes(huge))
    tracemalloc.start()
    try:
        for record in records:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            for decode in (decode_header, decode_record):
                with contextlib.suppress(CorruptRecord):
                    decode(record)
            assert tracemalloc.get_traced_memory()[1] - before < 64_000
    finally:
        tracemalloc.stop()

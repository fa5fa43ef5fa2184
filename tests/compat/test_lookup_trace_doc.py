"""``docs/trace-format.md`` and the golden bytes of format 1 against the code that reads and writes recordings."""

from __future__ import annotations

import struct

import xxhash
from doc_tables import DOCS, examples, tables
from golden_files import golden, golden_names

from kvstore.format import lookup_trace
from kvstore.format.lookup_trace import (
    FILE_HEADER_BYTES,
    FRAME_HEADER_BYTES,
    MAX_BLOCKS_PER_LOOKUP,
    MAX_FRAME_BYTES,
    MAX_NODES,
    Lookup,
    LookupDecoder,
    LookupEncoder,
    LookupFileHeader,
    NamespaceFacts,
    RecordedLookup,
    decode_header,
    encode_header,
)

PAGE = "trace-format.md"
TEXT = " ".join((DOCS / PAGE).read_text(encoding="utf-8").split())
CODES = {"u16": "H", "u32": "I", "u64": "Q"}
HEADER = LookupFileHeader(bytes(range(16)), 2, 1_764_144_000_000_000_000, 8 << 30)
SALT = bytes(range(32))
NAMESPACE = NamespaceFacts(0, 64, 8192, "kivi4")
A, B, C, D, E, F = (bytes([number]) * 32 for number in range(6))
FRAMES = [
    [Lookup(1500, NAMESPACE, [A, B, C], 3, 0, 0), Lookup(9500, NAMESPACE, [A, B, C, D, E], 5, 3, 1)],
    [Lookup(9501, NAMESPACE, [A, F], 3, 1, 0)],
]
READ = [
    RecordedLookup(1500, 0, (0, 1, 2), 3, 0, 0),
    RecordedLookup(9500, 0, (0, 1, 2, 3, 4), 5, 3, 1),
    RecordedLookup(9501, 0, (0, 5), 3, 1, 0),
]


def written() -> list[bytes]:
    """What the code writes today where the golden file has what it wrote when the format was released."""
    encoder = LookupEncoder(SALT)
    parts = [encode_header(HEADER)]
    for lookups in FRAMES:
        for lookup in lookups:
            encoder.add(lookup)
        parts.append(encoder.frame())
    return parts


def test_lookup_golden_file_is_what_the_code_writes():
    assert written() == golden("lookups-1/file")


def test_lookup_golden_file_is_tested_and_shown():
    assert golden_names("lookups-1") == {"lookups-1/file"}
    assert examples(PAGE) == {"lookups-1/file": b"".join(golden("lookups-1/file"))}


def test_lookup_golden_file_is_read_as_it_was_meant():
    data = b"".join(golden("lookups-1/file"))
    assert decode_header(data) == HEADER
    decoder = LookupDecoder()
    assert list(decoder.lookups(data)) == READ
    assert (decoder.damage, decoder.namespaces, decoder.distinct_blocks) == ("", {0: NAMESPACE}, 6)


def values(heading: str, data: bytes) -> dict[str, object]:
    """Every field of a structure, read only with what the page says of it."""
    (found,) = [one for one in tables(PAGE) if one.heading == heading and "offset" in one.columns]
    read: dict[str, object] = {}
    end = 0
    for row in found.rows:
        offset, size = int(row["offset"]), int(row["bytes"])
        assert offset == end, f"{row} leaves a gap"
        end = offset + size
        piece = data[offset:end]
        read[row["field"]] = struct.unpack(f"<{CODES[row['type']]}", piece)[0] if row["type"] in CODES else piece
    assert end == len(data)
    return read


def test_lookup_doc_header_is_the_codes():
    header = encode_header(HEADER)
    assert values("The file", header) == {
        "magic": b"KVLOOKUP",
        "version": 1,
        "header_bytes": FILE_HEADER_BYTES,
        "zero": 0,
        "recording": HEADER.recording,
        "sequence": HEADER.sequence,
        "zero_2": 0,
        "started_unix_ns": HEADER.started_unix_ns,
        "dram_bytes": 8 << 30,
        "checksum": xxhash.xxh3_64_intdigest(header[:56]),
    }


def test_lookup_doc_frames_are_the_codes():
    for frame, entries in zip(written()[1:], (3, 1), strict=True):
        head, payload = frame[:FRAME_HEADER_BYTES], frame[FRAME_HEADER_BYTES:]
        assert values("Frames", head) == {
            "payload_bytes": len(payload),
            "entries": entries,
            "checksum": xxhash.xxh3_64_intdigest(head[:8] + payload),
        }


def test_lookup_doc_names_kinds_and_limits():
    (kinds,) = [one for one in tables(PAGE) if one.heading == "Entries"]
    assert dict(zip(kinds.column("kind"), kinds.column("entry"), strict=True)) == {
        str(lookup_trace._FORGET): "forget",
        str(lookup_trace._NAMESPACE): "namespace",
        str(lookup_trace._LOOKUP): "lookup",
    }
    for limit in (MAX_FRAME_BYTES, MAX_NODES, MAX_BLOCKS_PER_LOOKUP):
        assert f"{limit:,}" in TEXT
